"""Audio: from a file's bytes or samples to features to the feeds of a graph, and back to one vector a sound."""

from embedmesh_encoder.audio.decode import AudioLimits
from embedmesh_encoder.audio.features import AudioSpec
from embedmesh_encoder.audio.preparer import AudioItem, AudioPreparer

__all__ = ["AudioItem", "AudioLimits", "AudioPreparer", "AudioSpec"]
