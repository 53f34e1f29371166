"""The starter image and audio models: small towers of our own, trained into the space of the starter text model.

Their weights come with this package, so nothing is fetched or made. `services/starter/` holds the training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from embedmesh_cli.starter.minilm import StarterError
from embedmesh_encoder.model import MANIFEST

__all__ = ["TOWERS", "starter_tower"]

TOWERS: Final = ("image", "audio")

# Where the wheel puts them; in a checkout, where training writes them.
_HOMES: Final = (Path(__file__).with_name("models"), Path(__file__).parents[2] / "starter" / "models")


def starter_tower(modality: str) -> Path:
    """Give the folder of the starter model of a modality, one of `TOWERS`.

    Raises:
        StarterError: It is not where it was installed.
    """
    for home in _HOMES:
        if (home / modality / MANIFEST).is_file():
            return home / modality
    raise StarterError(
        f"the starter {modality} model is missing from {_HOMES[0].parent.parent}: install embedmesh again, or in a "
        f"checkout run `git checkout services/starter/models`; to go without it, leave {modality} out "
        f"(embedmesh up --without {modality})"
    )
