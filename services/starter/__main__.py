"""`python -m starter`, which `make starter` calls: from fonts, words and voices to two models and their figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from starter.material import require_programs

_STEPS: Final = {"image": 9000, "audio": 7000}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m starter",
        description="Makes the starter towers. Pictures, clips and text vectors are kept in build/starter; the models "
        "are written to services/starter/models and the figures to services/starter/figures.json.",
    )
    parts = parser.add_subparsers(dest="part", metavar="PART")
    for tower, minutes in (("image", 60), ("audio", 60)):
        part = parts.add_parser(tower, help=f"train and export the {tower} tower (about {minutes} minutes of one core)")
        part.add_argument(
            "--steps", type=int, default=_STEPS[tower], help="batches of the first course, instead of %(default)s"
        )
    parts.add_parser("evaluate", help="examine the models that are there, print and keep the figures (no torch)")
    parts.add_parser("samples", help="write the pictures and clips of the demo and of the tests (no torch)")
    options = parser.parse_args(arguments)
    require_programs()
    for tower in ("image", "audio"):
        if options.part in (None, tower):
            _train(tower, options.steps if options.part else _STEPS[tower])
    if options.part in (None, "evaluate"):
        sys.exit(_evaluate())
    if options.part == "samples":
        from starter.samples import write  # noqa: PLC0415  (each part loads what it needs)

        write()


def _train(tower: str, steps: int) -> None:
    import torch  # noqa: PLC0415

    from starter import export, lessons, train_audio, train_image  # noqa: PLC0415

    torch.set_num_threads(1)  # more would change the order of sums, and so the weights
    sys.stderr.write(f"Collecting what the {tower} tower is taught ...\n")
    if tower == "image":
        taught = lessons.image_lessons()
        first = train_image.train(taught, steps)
        trained = train_image.train(taught, steps * 5 // 18, start=first, rate=1e-3, turn=32.0)
        spec = export.export_image(trained, train_image.PREPROCESSOR)
    else:
        heard = train_audio.train(lessons.audio_lessons(1), steps)
        spoken = train_audio.train(lessons.audio_lessons(2), steps // 3, start=heard, rate=1e-3)
        spec = export.export_audio(spoken, train_audio.PREPROCESSOR)
    sys.stdout.write(f"{spec.name}@{spec.revision} is in {spec.folder}\n")


def _evaluate() -> int:
    from starter.evaluate import evaluate, save, table  # noqa: PLC0415

    figures = evaluate()
    save(figures)
    sys.stdout.write(table(figures) + "\n")
    missed = [each.test for each in figures if not each.passed]
    for each in missed:
        sys.stdout.write(f"missed: {each}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    main()
