"""`embedmesh models verify`: whether a model's vectors are those of the reference library."""

from embedmesh_cli.verify.command import verify

__all__ = ["verify"]
