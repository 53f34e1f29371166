"""`embedmesh models pull`: from a repository of the Hugging Face Hub, or a folder, to a model that is served."""

from embedmesh_cli.pull.command import pull

__all__ = ["pull"]
