"""Makes the starter models: real models that need no hub."""

from embedmesh_cli.starter.minilm import StarterError, cache_folder, ensure_starter

__all__ = ["StarterError", "cache_folder", "ensure_starter"]
