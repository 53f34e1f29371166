"""Training of the audio tower: phrases by many voices, and plain sounds, at the vectors of their words."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from starter.towers import AudioTower
from starter.training import Report, Schedule, fit

__all__ = ["LONGEST", "PREPROCESSOR", "AudioLessons", "train"]

# What the tower reads; the file of the same name beside the weights.
PREPROCESSOR: Final[dict[str, Any]] = {
    "feature_extractor_type": "EmbedMeshLogMel",
    "sampling_rate": 16_000,
    "window_length": 400,
    "hop_length": 160,
    "n_fft": 512,
    "num_mels": 64,
    "frequency_min": 50.0,
    "frequency_max": 7800.0,
    "mel_scale": "htk",
    "rms_normalize": True,
    "log_floor": 0.01,
    "mean": 3.0,
    "std": 3.5,
}

_SEED: Final = 11
_BATCH: Final = 96
_SOUND_SHARE: Final = 0.08
_COSINE_WEIGHT: Final = 6.0
_TEMPERATURE: Final = 0.02
_PHONEME_WEIGHT: Final = 1.0
LONGEST: Final = 300


@dataclass(frozen=True)
class AudioLessons:
    """All clips and what they say.

    Attributes:
        frames: float16 [all frames, 64].
        starts: int64 [clips + 1], where each clip's frames begin.
        said: int64 [clips], the row of its words in `vectors`.
        vectors: float32 [captions, 384], of length 1.
        kind: int64 [clips], 0 espeak-ng, 1 flite, 2 plain sounds; of the latter nothing is varied, nor spelled.
        flite_share: Share of flite's clips in a batch.
        spelled: The phonemes of each caption that is speech, which are the first.
    """

    frames: NDArray[np.float16]
    starts: NDArray[np.int64]
    said: NDArray[np.int64]
    vectors: Tensor
    kind: NDArray[np.int64]
    spelled: list[list[str]]
    flite_share: float


class _Phonemes(nn.Module):
    """Hears phonemes in the states; taught along with the tower and thrown away.

    One head spells a phrase (connectionist temporal classification, Graves 2006), one says which pairs occur in it.
    """

    def __init__(self, width: int, spelled: list[list[str]]) -> None:
        super().__init__()
        letters = {each: i + 1 for i, each in enumerate(sorted({each for those in spelled for each in those}))}
        pairs = Counter(pair for those in spelled for pair in set(itertools.pairwise(those)))
        common = {pair: i for i, (pair, _) in enumerate(sorted(pairs.most_common(600)))}
        self.spelled = [torch.tensor([letters[each] for each in those]) for those in spelled]
        self.pairs = torch.zeros(len(spelled), len(common))
        for row, those in zip(self.pairs, spelled, strict=True):
            for pair in itertools.pairwise(those):
                if pair in common:
                    row[common[pair]] = 1
        self.spell = nn.Conv1d(width, len(letters) + 1, 1)
        self.pair = nn.Conv1d(width, len(common), 1)

    def forward(self, states: Tensor, mask: Tensor, said: Tensor) -> Tensor:
        lengths = mask[:, 0].sum(1).long()
        letters = self.spell(states).float().log_softmax(1).permute(2, 0, 1)
        words = [self.spelled[i] for i in said.tolist()]
        spelling = F.ctc_loss(
            letters, torch.cat(words), lengths, torch.tensor([len(each) for each in words]), zero_infinity=True
        )
        heard = (self.pair(states).float() + (mask.float() - 1) * 1e4).amax(2)
        return spelling + 30 * F.binary_cross_entropy_with_logits(heard, self.pairs[said])


def train(
    taught: AudioLessons,
    steps: int,
    *,
    start: AudioTower | None = None,
    rate: float = 2e-3,
    report: Report | None = None,
) -> AudioTower:
    """Train for so many steps; the same weights come out on the same kind of machine with one thread.

    Args:
        taught: Everything to learn.
        steps: How many batches.
        start: Weights to go on from; by default random ones.
        rate: Highest learning rate.
        report: See `fit`.
    """
    torch.manual_seed(_SEED)
    draw = np.random.default_rng(_SEED)
    tower = AudioTower() if start is None else copy.deepcopy(start).train()
    phonemes = _Phonemes(tower.width, taught.spelled)
    lengths = np.diff(taught.starts)
    kinds = [np.flatnonzero(taught.kind == kind) for kind in range(3)]
    kinds = [those[np.argsort(lengths[those], kind="stable")] for those in kinds]
    shares = (1 - taught.flite_share - _SOUND_SHARE, taught.flite_share, _SOUND_SHARE)
    counts = [round(_BATCH * share) for share in shares]

    def loss(_: int) -> Tensor:
        # Clips of like length share a batch.
        middle = draw.random()
        chosen = np.concatenate(
            [
                those[
                    np.clip((middle * len(those) + draw.normal(0, 0.04 * len(those), n)).astype(int), 0, len(those) - 1)
                ]
                for those, n in zip(kinds, counts, strict=True)
            ]
        )
        features, mask = _batch(taught, chosen, draw)
        said = torch.from_numpy(taught.said[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            states, inside = tower.states(features, mask)
            vectors = tower.pooled(states, inside)
        vectors = F.normalize(vectors.float(), dim=1)
        words = torch.from_numpy(taught.kind[chosen] < 2)
        heard = phonemes(states[words].float(), inside[words].float(), said[words])
        to_text = F.cross_entropy(vectors @ taught.vectors.T / _TEMPERATURE, said)
        near = (1 - (vectors * taught.vectors[said]).sum(1)).mean()
        return to_text + _COSINE_WEIGHT * near + _PHONEME_WEIGHT * heard

    return fit(tower, loss, Schedule(steps=steps, rate=rate), beside=phonemes, report=report)


def _batch(taught: AudioLessons, chosen: NDArray[np.int64], draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Vary tempo, timbre, room and noise of clips: float32 [n, longest, 64], int64 [n, longest]."""
    clips = []
    for clip in chosen:
        frames = torch.from_numpy(taught.frames[taught.starts[clip] : taught.starts[clip + 1]].astype(np.float32))
        clips.append(_varied(frames, draw) if taught.kind[clip] < 2 else frames)
    longest = max(map(len, clips))
    features = torch.zeros(len(clips), longest, 64)
    mask = torch.zeros(len(clips), longest, dtype=torch.int64)
    for i, clip in enumerate(clips):
        features[i, : len(clip)] = clip
        mask[i, : len(clip)] = 1
    return features, mask


def _varied(frames: Tensor, draw: np.random.Generator) -> Tensor:
    """Vary one clip, float32 [frames, 64], in the logarithm of power."""
    if draw.random() < 0.7:  # tempo, and the length of the vocal tract
        length = int(np.clip(len(frames) * draw.uniform(0.8, 1.3), 16, LONGEST))
        rows = torch.linspace(-1, 1, length)
        columns = torch.linspace(-1, 1, 64)
        warp = draw.uniform(-0.12, 0.12)
        columns = columns + warp * (1 - columns**2)
        grid = torch.stack(torch.broadcast_tensors(columns[None, :], rows[:, None]), 2)[None]
        frames = F.grid_sample(frames[None, None], grid, align_corners=True, padding_mode="border")[0, 0]
    std = PREPROCESSOR["std"]
    if draw.random() < 0.6:  # timbre: a smooth filter
        slope = np.interp(np.arange(64), np.linspace(0, 63, 5), draw.normal(0, 1.2, 5)) / std
        frames = frames + torch.from_numpy(slope.astype(np.float32))
    if draw.random() < 0.3:  # room: what was heard rings on
        ring = float(draw.uniform(0.3, 0.75))
        decay = (torch.arange(len(frames)) * float(2 * np.log(ring)) / std)[:, None]
        frames = (frames - decay).cummax(0).values + decay
    if draw.random() < 0.5:  # noise below the speech
        level = (draw.uniform(-4, 3) - PREPROCESSOR["mean"]) / std
        colour = np.interp(np.arange(64), np.linspace(0, 63, 4), draw.normal(0, 1, 4)) / std
        noise = torch.from_numpy((level + colour).astype(np.float32)) + 0.3 * torch.randn(frames.shape)
        frames = torch.logaddexp(frames * std, noise * std) / std
    if draw.random() < 0.3:
        start, width = draw.integers(0, 56), draw.integers(2, 9)
        frames = frames.clone()
        frames[:, start : start + width] = 0
    return frames
