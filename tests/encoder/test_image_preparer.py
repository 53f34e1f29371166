import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedmesh.errors import InputTooLarge, UndecodableInput
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.image import ImageItem, ImagePreparer, ImageSpec
from embedmesh_encoder.preparation import Prepared, Preparer

SQUARE = ImageSpec(size=(32, 48))


def item(width: int = 20, height: int = 10, colour: tuple[int, int, int] = (255, 0, 0)) -> ImageItem:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return ImageItem(buffer.getvalue())


def make(spec: ImageSpec = SQUARE, **options: Any) -> ImagePreparer:
    return ImagePreparer(spec, **{"output": "embeds", **options})


def prepare(
    preparer: ImagePreparer, each: ImageItem, truncation: pb.Truncation.ValueType = pb.TRUNCATION_END
) -> Prepared:
    return preparer.prepare(each, truncation)


def test_it_is_a_preparer_that_publishes_its_limits() -> None:
    preparer: Preparer = make()
    assert preparer.limits == {"image_bytes": 20 << 20, "image_pixels": 50_000_000}
    assert not preparer.padded


@pytest.mark.parametrize("truncation", pb.Truncation.values())
def test_a_picture_becomes_the_models_input_whole(truncation: pb.Truncation.ValueType) -> None:
    prepared = prepare(make(patch_size=16, extra_tokens=1), item(), truncation)
    assert prepared.data.shape == (3, 32, 48)
    assert prepared.data.dtype == np.float32
    assert prepared.data[:, 0, 0].tolist() == [1, 0, 0]
    assert (prepared.units, prepared.original_units, prepared.truncated) == (2 * 3 + 1, 7, False)


def test_units_without_patches_are_256_pixels() -> None:
    assert prepare(make(), item()).units == 6
    assert prepare(make(ImageSpec(size=(1, 1))), item()).units == 1
    assert prepare(make(ImageSpec(size=(16, 17))), item()).units == 2


def test_limits_are_named_in_the_error() -> None:
    content = item().content
    with pytest.raises(InputTooLarge) as error:
        prepare(make(max_bytes=len(content) - 1), item())
    assert error.value.metadata["unit"] == "bytes"
    with pytest.raises(InputTooLarge) as error:
        prepare(make(max_pixels=199), item())
    assert error.value.metadata == {"limit": "199", "actual": "200", "unit": "pixels"}
    with pytest.raises(UndecodableInput):
        prepare(make(), ImageItem(content[:40]))


def test_a_model_of_any_size_refuses_what_it_cannot_read_before_it_is_made() -> None:
    preparer = make(ImageSpec(), patch_size=2, extra_tokens=1, max_input_units=51)
    assert prepare(preparer, item()).units == 51
    with pytest.raises(InputTooLarge, match="the image has 56 patches, the limit is 51"):
        prepare(preparer, item(22))
    strip = make(ImageSpec(shortest_edge=224), max_input_units=1000)
    with pytest.raises(InputTooLarge, match="units of 256 pixels, the limit is 1000"):
        prepare(strip, item(5000, 1))


def test_a_batch_is_a_stack() -> None:
    preparer = make(input_name="image")
    batch = [prepare(preparer, item(colour=colour)) for colour in ((255, 0, 0), (0, 255, 0))]
    feeds = preparer.collate(batch)
    assert list(feeds) == ["image"]
    assert batch[0].group == batch[1].group != prepare(make(ImageSpec()), item()).group
    assert feeds["image"].shape == (2, 3, 32, 48)
    assert feeds["image"][:, :, 0, 0].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_vectors_are_pooled_by_the_graph_or_here() -> None:
    batch = [prepare(make(), item())] * 2
    hidden = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    for pooling, expected in (("cls", hidden[:, 0]), ("mean", hidden.mean(1)), ("max", hidden.max(1))):
        vectors = make(pooling=pooling).split({"embeds": hidden}, batch)
        np.testing.assert_array_equal(vectors, expected)
    for shape in ((2, 4), (2, 4, 1, 1)):
        pooled = hidden[:, 0].reshape(shape)
        np.testing.assert_array_equal(make().split({"other": hidden, "embeds": pooled}, batch), hidden[:, 0])


def test_the_item_does_not_print_its_bytes() -> None:
    assert repr(ImageItem(b"secret")) == "ImageItem()"


def test_threads_may_share_it() -> None:
    preparer = make(ImageSpec(shortest_edge=24, crop=(24, 24)))
    items = [item(20 + i, 50 - i, (i, 2 * i, 3 * i)) for i in range(32)]
    alone = [prepare(preparer, each).data for each in items]
    with ThreadPoolExecutor(8) as pool:
        for expected, prepared in zip(
            alone * 4, pool.map(lambda each: prepare(preparer, each), items * 4), strict=True
        ):
            np.testing.assert_array_equal(prepared.data, expected)
