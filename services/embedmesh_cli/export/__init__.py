"""`embedmesh models export`: from the weights of a repository to an ONNX graph, and so to a model that is served."""

from embedmesh_cli.export.command import export

__all__ = ["export"]
