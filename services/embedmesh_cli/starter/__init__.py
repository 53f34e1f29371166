"""The starter models: real models that need no hub."""

from embedmesh_cli.starter.minilm import StarterError, cache_folder, ensure_starter
from embedmesh_cli.starter.towers import TOWERS, starter_tower

__all__ = ["TOWERS", "StarterError", "cache_folder", "ensure_starter", "starter_tower"]
