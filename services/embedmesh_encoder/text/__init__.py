"""Text: from a string to token ids to the feeds of a graph, and back to one vector a text."""

from embedmesh_encoder.text.preparer import Chunking, LateChunking, TextItem, TextPreparer

__all__ = ["Chunking", "LateChunking", "TextItem", "TextPreparer"]
