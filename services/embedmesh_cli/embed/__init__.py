"""`embedmesh embed`: texts, pictures and sounds in, vectors out."""

from embedmesh_cli.embed.command import EXAMPLES, embed

__all__ = ["EXAMPLES", "embed"]
