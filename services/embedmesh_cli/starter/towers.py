"""The starter image and audio models: small towers of our own, trained into the space of the starter text model.

Their weights come with this package, so nothing is fetched or made. In a checkout `models` is a link to what the
training in `services/starter/` wrote; the wheel holds the files themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from embedmesh_cli.starter.minilm import StarterError
from embedmesh_encoder.model import MANIFEST

__all__ = ["TOWERS", "starter_tower"]

TOWERS: Final = ("image", "audio")

_MODELS: Final = Path(__file__).with_name("models")


def starter_tower(modality: str) -> Path:
    """Give the folder of the starter model of a modality, one of `TOWERS`.

    Raises:
        StarterError: It is not where it was installed.
    """
    folder = _MODELS / modality
    if not (folder / MANIFEST).is_file():
        raise StarterError(
            f"the starter {modality} model is missing from {_MODELS}: install embedmesh again (in a checkout: "
            f"`git checkout services/starter/models`), or go without it: embedmesh up --without {modality}"
        )
    return folder.resolve()
