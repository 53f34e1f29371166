"""Training of the image tower: pictures of emoji in several styles, and scenes of plain shapes."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from starter.towers import ImageTower
from starter.training import Report, Schedule, fit

__all__ = ["PREPROCESSOR", "STORED", "ImageLessons", "train"]

# What the tower reads; the file of the same name beside the weights.
PREPROCESSOR: Final[dict[str, Any]] = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 48, "width": 48},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}

_SEED: Final = 7
# Side of the pictures that augmentation starts from: little above what the tower reads, so that nothing aliases.
STORED: Final = 56
_BATCH: Final = 96
_SCENE_SHARE: Final = 0.25
# Share of pictures that are shown as the product would read the file.
_CLEAN_SHARE: Final = 0.25
# Vectors of so many earlier pictures are among the wrong answers to a caption (cross-batch memory, arXiv 1912.06798).
_MEMORY: Final = 4096
_COSINE_WEIGHT: Final = 8.0
_TEMPERATURE: Final = 0.03


@dataclass(frozen=True)
class ImageLessons:
    """All pictures and what they are called; a subject is an emoji or the caption of a scene.

    Attributes:
        pictures: uint8 [n, 4, 56, 56], colour multiplied by opacity, then opacity.
        clean: float32 [n, 3, 48, 48], as the product reads them.
        subjects: int64 [n], the subject of each picture.
        scene: bool [n].
        captions: float32 [k, 384], of length 1.
        shares: float32 [subjects, k], how often each caption is the right one; rows add up to 1.
        choices: int64 [subjects, 64], captions of each subject in those shares, to draw from.
        goals: float32 [subjects, 384], of length 1: where each subject's pictures should lie.
    """

    pictures: Tensor
    clean: Tensor
    subjects: Tensor
    scene: Tensor
    captions: Tensor
    shares: Tensor
    choices: Tensor
    goals: Tensor


def train(
    taught: ImageLessons,
    steps: int,
    *,
    start: ImageTower | None = None,
    rate: float = 2e-3,
    turn: float = 20.0,
    report: Report | None = None,
) -> ImageTower:
    """Train for so many steps; the same weights come out on the same kind of machine with one thread.

    Args:
        taught: Everything to learn.
        steps: How many batches.
        start: Weights to go on from; by default random ones.
        rate: Highest learning rate.
        turn: Most degrees that an emoji is turned by.
        report: See `fit`.
    """
    torch.manual_seed(_SEED)
    emoji = torch.nonzero(~taught.scene)[:, 0]
    drawn = torch.nonzero(taught.scene)[:, 0]
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY // _BATCH)
    tower = ImageTower() if start is None else copy.deepcopy(start).train()
    tower = tower.to(memory_format=torch.channels_last)

    def loss(_: int) -> Tensor:
        count = round(_BATCH * _SCENE_SHARE)
        chosen = torch.cat(
            [
                emoji[torch.randint(len(emoji), (_BATCH - count,))],
                drawn[torch.randint(len(drawn), (count,))],
            ]
        )
        subjects = taught.subjects[chosen]
        pixels = _augmented(taught.pictures[chosen], taught.scene[chosen], turn)
        clean = torch.rand(_BATCH) < _CLEAN_SHARE
        pixels[clean] = taught.clean[chosen[clean]]
        with torch.autocast("cpu", torch.bfloat16):
            vectors = tower(pixels.contiguous(memory_format=torch.channels_last))
        vectors = F.normalize(vectors.float(), dim=1)
        # Picture -> caption, among all captions.
        logits = vectors @ taught.captions.T / _TEMPERATURE
        to_text = -(taught.shares[subjects] * F.log_softmax(logits, 1)).sum(1).mean()
        # Caption -> picture, among this batch and recent ones.
        asked = taught.captions[taught.choices[subjects, torch.randint(taught.choices.shape[1], (_BATCH,))]]
        gallery = torch.cat([vectors, *(those for those, _ in recent)])
        owners = torch.cat([subjects, *(those for _, those in recent)])
        scores = asked @ gallery.T / _TEMPERATURE
        same = owners[None] == subjects[:, None]
        same.fill_diagonal_(fill_value=False)
        scores = scores.masked_fill(same, -torch.inf)  # other pictures of the subject are no wrong answers
        to_picture = F.cross_entropy(scores, torch.arange(len(subjects)))
        near = (1 - (vectors * taught.goals[subjects]).sum(1)).mean()
        recent.append((vectors.detach(), subjects))
        return to_text + 0.5 * to_picture + _COSINE_WEIGHT * near

    return fit(tower, loss, Schedule(steps=steps, rate=rate), report=report)


def _augmented(pictures: Tensor, scene: Tensor, most: float) -> Tensor:
    """Vary size, place, turn, ground, colours and sharpness: uint8 [n, 4, 72, 72] -> float32 [n, 3, 48, 48]."""
    n = len(pictures)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape)

    some = ~scene
    turn = torch.deg2rad(between(-most, most)) * some
    size = torch.where(scene, between(0.95, 1.05), between(0.6, 1.08))
    stretch = torch.where(scene, torch.ones(n), between(0.88, 1.14))
    shear = between(-0.12, 0.12) * some
    cosine, sine = torch.cos(turn), torch.sin(turn)
    rotation = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    form = torch.zeros(n, 2, 2)
    form[:, 0, 0], form[:, 1, 1], form[:, 0, 1] = stretch / size, 1 / (stretch * size), shear
    matrix = form @ rotation
    room = (1 - size).clamp_min(0)[:, None] * between(-1, 1, 2)
    shift = -(matrix @ room[:, :, None])
    grid = F.affine_grid(torch.cat([matrix, shift], 2), [n, 4, 48, 48], align_corners=False)
    moved = F.grid_sample(pictures.float() / 255, grid, align_corners=False, padding_mode="zeros")
    colour, opacity = moved[:, :3], moved[:, 3:]
    # The edges of a moved scene are filled with its own ground.
    corner = (pictures[:, :3, 1, 1].float() / 255)[:, :, None, None]
    one, two = torch.rand(n, 3, 1, 1), torch.rand(n, 3, 1, 1)
    slope = torch.linspace(0, 1, 48)
    ramp = torch.where((torch.rand(n) < 0.5)[:, None, None], slope[None, :, None], slope[None, None, :])[:, None]
    ground = one + (two - one) * ramp * (torch.rand(n) < 0.5)[:, None, None, None]
    plain = torch.rand(n)[:, None, None, None]
    ground = torch.where(plain < 0.5, torch.ones(()), ground)
    ground = torch.where(scene[:, None, None, None], corner, ground)
    pixels = colour + (1 - opacity) * ground
    # Colours: brightness, contrast, saturation; a few pictures lose theirs.
    strong = torch.where(scene, 0.35, 1.0)[:, None, None, None]
    pixels = pixels * (1 + strong * between(-0.25, 0.25, 1, 1, 1))
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * (1 + strong * between(-0.3, 0.3, 1, 1, 1))
    grey = pixels.mean(1, keepdim=True)
    faded = torch.where((torch.rand(n) < 0.04) & some, 0.0, 1 + torch.rand(n) * 0.8 - 0.4)[:, None, None, None]
    faded = torch.where(scene[:, None, None, None], torch.ones(()), faded)
    pixels = grey + (pixels - grey) * faded
    tint = torch.where(scene, 0.02, 0.08)[:, None, None, None] * between(-1, 1, 3, 1, 1)
    pixels = pixels + tint
    blurred = torch.rand(n) < 0.15
    pixels[blurred] = F.avg_pool2d(F.pad(pixels[blurred], (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = torch.rand(n) < 0.3
    pixels[noisy] += torch.randn_like(pixels[noisy]) * between(0, 0.06, 1, 1, 1)[noisy]
    pixels = pixels.clamp(0, 1)
    # Some are drawn with black lines where lightness changes.
    lined = (torch.rand(n) < 0.15) & some
    light = pixels[lined].mean(1, keepdim=True)
    change = F.max_pool2d(light, 3, 1, 1) + F.max_pool2d(-light, 3, 1, 1)
    pixels[lined] *= 1 - (change * 4 - 0.4).clamp(0, 1)
    # A patch is hidden in others.
    for i in torch.nonzero((torch.rand(n) < 0.2) & some)[:, 0].tolist():
        height, width = torch.randint(6, 17, (2,)).tolist()
        top, left = torch.randint(0, 49 - height, (1,)).item(), torch.randint(0, 49 - width, (1,)).item()
        pixels[i, :, top : top + height, left : left + width] = torch.rand(())
    return (pixels - 0.5) / 0.25
