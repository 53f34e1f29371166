"""The models at hand: those in the folder of models, and the starter models that came with this package."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.starter import TOWERS, StarterError, cache_folder, starter_tower
from embedmesh_encoder.model import MANIFEST, ModelError, ModelSpec, find_models, load_spec

__all__ = ["find_model", "model_folders", "models_home"]


def models_home() -> Path:
    """Where pulled models and the starter text model are kept."""
    return cache_folder() / "models"


def model_folders() -> list[Path]:
    """Give the folders that hold models or are one."""
    folders = [models_home()]
    for modality in TOWERS:
        with suppress(StarterError):
            folders.append(starter_tower(modality))
    return folders


def find_model(wanted: str) -> ModelSpec:
    """Find a model by its folder, its name, "name@revision", or the name of its folder among those at hand.

    Raises:
        UserError: There is none, or it has mistakes.
    """
    folder = Path(wanted).expanduser()
    try:
        if (folder / MANIFEST).is_file():
            return load_spec(folder)
    except ModelError as error:
        raise UserError(f"{error}.") from None
    for path, spec in find_models(model_folders()).items():
        if isinstance(spec, ModelError):
            if path.name == wanted:
                raise UserError(f"{spec}.")
        elif wanted in (spec.name, f"{spec.name}@{spec.revision}", path.name):
            return spec
    raise UserError(f"there is no model {wanted} at hand: `embedmesh models list` shows those that are.", USAGE)
