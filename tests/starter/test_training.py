"""A training of a minute: scenes and plain sounds alone, which need no fonts and no voices. Needs torch."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedmesh_encoder.audio import AudioSpec
from embedmesh_encoder.image import ImageProcessor, ImageSpec
from starter.scenes import draw_scene, png, scenes
from starter.served import Tower
from starter.sounds import SOUNDS, synthetic
from starter.vectors import ranks, recalls, text_vectors

pytestmark = [pytest.mark.torch, pytest.mark.timeout(400)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_image_tower_learns_scenes_it_never_saw(tmp_path: Path, one_thread: None) -> None:
    import torch

    from starter import export, train_image

    chance = random.Random(1)
    some = [scene for scene in scenes() if scene.kind in ("single", "big", "pattern")]
    captions = [scene.caption for scene in some]
    vectors = torch.from_numpy(text_vectors(captions))
    processor = ImageProcessor(ImageSpec.from_preprocessor_config(train_image.PREPROCESSOR))
    drawn = [(i, draw_scene(scene, chance)) for _ in range(3) for i, scene in enumerate(some) if not scene.heldout]
    side = train_image.STORED
    small = [np.asarray(Image.fromarray(rgb).resize((side, side))) for _, rgb in drawn]
    rgba = np.stack([np.dstack([each, np.full((side, side), 255, np.uint8)]) for each in small])
    taught = train_image.ImageLessons(
        pictures=torch.from_numpy(rgba.transpose(0, 3, 1, 2).copy()),
        clean=torch.from_numpy(np.stack([processor(Image.fromarray(rgb)) for _, rgb in drawn])),
        subjects=torch.tensor([i for i, _ in drawn]),
        # Most are varied as emoji are, so that all of it is done.
        scene=torch.arange(len(drawn)) % 3 == 0,
        captions=vectors,
        shares=torch.eye(len(some)),
        choices=torch.arange(len(some))[:, None],
        goals=vectors,
    )
    tower = train_image.train(taught, 150)
    again = train_image.train(taught, 2)
    assert _same(again, train_image.train(taught, 2))
    spec = export.export_image(tower, train_image.PREPROCESSOR, tmp_path / "image")

    kept = [i for i, scene in enumerate(some) if scene.heldout]
    files = [png(draw_scene(some[i], chance)) for i in kept]
    served = Tower(spec.folder)(files)
    with torch.no_grad():
        pixels = np.stack([processor(Image.open(io.BytesIO(file))) for file in files])
        direct = torch.nn.functional.normalize(tower(torch.from_numpy(pixels)), dim=1).numpy()
    assert (served * direct).sum(1).min() >= 0.9999
    # By chance 10 of them would be among the first 10 in a hundred.
    assert recalls(ranks(served, vectors.numpy(), np.array(kept)))["R@10"] >= 30


def test_an_audio_tower_learns_plain_sounds_it_never_heard(tmp_path: Path, one_thread: None) -> None:
    import torch

    from starter import export, train_audio

    chance = random.Random(2)
    spec = AudioSpec.from_preprocessor_config(train_audio.PREPROCESSOR)
    kinds = list(SOUNDS)
    said = [i for i in range(len(kinds)) for _ in range(40)]
    clips = [spec.features(synthetic(kinds[i], chance, unseen=False))["input_features"] for i in said]
    vectors = text_vectors(list(SOUNDS.values()))
    taught = train_audio.AudioLessons(
        frames=np.concatenate(clips).astype(np.float16),
        starts=np.cumsum([0, *map(len, clips)]),
        said=np.array(said),
        vectors=torch.from_numpy(vectors),
        # A few count as speech, spelled by letters, so that all of the loss is computed.
        kind=np.array([i % 3 for i in range(len(said))]),
        spelled=[list(words) for words in SOUNDS.values()],
        flite_share=0.2,
    )
    tower = train_audio.train(taught, 60)
    again = train_audio.train(taught, 2)
    assert _same(again, train_audio.train(taught, 2))
    folder = export.export_audio(tower, train_audio.PREPROCESSOR, tmp_path / "audio").folder
    tests = [i for i in range(len(kinds)) for _ in range(6)]
    waves = [synthetic(kinds[i], chance, unseen=True) for i in tests]
    served = Tower(folder)(waves)
    with torch.no_grad():
        features = [torch.from_numpy(spec.features(wave)["input_features"])[None] for wave in waves]
        alone = [tower(each, torch.ones(each.shape[:2], dtype=torch.int64)) for each in features]
        direct = torch.nn.functional.normalize(torch.cat(alone), dim=1).numpy()
    assert (served * direct).sum(1).min() >= 0.9999
    assert recalls(ranks(served, vectors, np.array(tests)))["R@1"] >= 50  # by chance 12


def _same(one: object, two: object) -> bool:
    import torch

    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)  # type: ignore[attr-defined]
    return all(torch.equal(a, b) for a, b in pairs)
