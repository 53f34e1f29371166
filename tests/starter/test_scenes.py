"""What is kept for the examination does not leak into what is taught."""

import random

import numpy as np

from starter.scenes import HELDOUT_PAIRS, HELDOUT_PATTERNS, SIDE, draw_scene, scenes
from starter.sounds import RATE, SOUNDS, synthetic


def test_scenes_with_a_kept_pair_or_pattern_are_all_held_out() -> None:
    kept = {scene.parts for scene in scenes() if scene.kind == "single" and scene.heldout}
    assert len(kept) == HELDOUT_PAIRS
    assert sum(scene.heldout for scene in scenes() if scene.kind == "pattern") == HELDOUT_PATTERNS
    for scene in scenes():
        if scene.kind == "relation":
            one, _, two = scene.parts
            assert scene.heldout == bool(kept & {one, two})
        elif scene.kind != "pattern":
            assert scene.heldout == (scene.parts[:2] in kept)
    captions = [scene.caption for scene in scenes()]
    assert len(captions) == len(set(captions))


def test_a_scene_is_drawn_the_same_from_the_same_seed() -> None:
    for scene in random.Random(1).sample(scenes(), 60):
        drawn = draw_scene(scene, random.Random(9))
        assert drawn.shape == (SIDE, SIDE, 3)
        assert drawn.std() > 0, scene
        assert np.array_equal(drawn, draw_scene(scene, random.Random(9)))


def test_sounds_of_the_examination_differ_from_those_of_training() -> None:
    for kind in SOUNDS:
        seen, unseen = (synthetic(kind, random.Random(2), unseen=which) for which in (False, True))
        for wave in (seen, unseen):
            assert wave.dtype == np.float32
            assert 0.6 * RATE < len(wave) < 2 * RATE
            assert 0 < np.abs(wave).max() <= 0.31
        assert len(seen) != len(unseen) or not np.array_equal(seen, unseen)
