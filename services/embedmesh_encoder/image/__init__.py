"""Images: from a file's bytes to the pixels that a model was trained on, and back to one vector an image."""

from embedmesh_encoder.image.preparer import ImageItem, ImagePreparer
from embedmesh_encoder.image.processor import ImageProcessor, ImageSpec

__all__ = ["ImageItem", "ImagePreparer", "ImageProcessor", "ImageSpec"]
