"""Parity with transformers: against its figures always (golden.json), against itself where torch is installed."""

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from embedmesh.errors import InputTooLarge
from embedmesh_encoder.image.decode import decode
from embedmesh_encoder.image.processor import ImageProcessor, ImageSpec
from embedmesh_encoder.image.resample import resize_window
from embedmesh_encoder.model import ModelError

DATA = Path(__file__).parent.parent / "data" / "images"
GOLDEN: list[dict[str, Any]] = json.loads((DATA / "golden.json").read_text())["cases"]
FILTERS = [Image.Resampling(each) for each in range(6)]  # those that a configuration can name


def picture(height: int, width: int) -> Image.Image:
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((x * x * 7 + y * 13 + x * y * 3 + c * 91) % 256).astype(np.uint8))


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width, len(Image.new(mode, (1, 1)).getbands()))
    values = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def process(config: dict[str, Any], image: Image.Image) -> Any:
    return ImageProcessor(ImageSpec.from_preprocessor_config(config))(image)


@pytest.fixture(scope="module")
def library() -> ModuleType:
    """Give make_golden.py, which knows how the library is called."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("make_golden", DATA / "make_golden.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: json.dumps(case["config"])[:60])
def test_the_models_input_equals_the_librarys(case: dict[str, Any]) -> None:
    processor = ImageProcessor(ImageSpec.from_preprocessor_config(case["config"]))
    for expected in case["inputs"]:
        array = processor(picture(*expected["picture"]))
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert list(array.shape) == expected["shape"]
        assert processor.output_size(*expected["picture"]) == array.shape[1:]
        values = array.ravel()[np.linspace(0, array.size - 1, 24).astype(int)]
        np.testing.assert_allclose(values, expected["values"], rtol=0, atol=2e-5 * max(1, float(array.max())))
        assert array.mean(dtype=np.float64) == pytest.approx(expected["mean"], abs=2e-5 * max(1, float(array.max())))


@pytest.mark.torch
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: json.dumps(case["config"])[:60])
def test_equal_to_the_library_itself(case: dict[str, Any], library: ModuleType) -> None:
    reference = library.reference(case["config"])
    sizes = [(1, 1), (1, 97), (89, 1), (900, 5), (17, 23), (101, 211), (256, 256), (480, 640), (1021, 331)]
    for height, width in sizes:
        image = noise(height, width)
        expected = np.asarray(reference(image)["pixel_values"][0])
        np.testing.assert_allclose(process(case["config"], image), expected, rtol=0, atol=1e-4)


@pytest.mark.torch
def test_a_strip_equals_the_library_that_makes_a_third_of_a_gigabyte_of_it(library: ModuleType) -> None:
    config = {"image_processor_type": "CLIPImageProcessor"}
    for size in ((3, 5000), (5000, 3)):
        expected = np.asarray(library.reference(config)(noise(*size))["pixel_values"][0])
        np.testing.assert_array_equal(process(config, noise(*size)), expected)


@pytest.mark.torch
@pytest.mark.parametrize("resample", [2, 3])
def test_dinov3_equals_torchs_resampling_of_floats(resample: int) -> None:
    torch = pytest.importorskip("torch")
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast", "resample": resample}
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for size in ((1, 1), (3, 500), (97, 31), (640, 480), (1021, 331)):
        image = noise(*size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] * (1 / 255)
        mode = {2: "bilinear", 3: "bicubic"}[resample]
        resized = torch.nn.functional.interpolate(pixels, (224, 224), mode=mode, antialias=True, align_corners=False)
        expected = ((resized[0] - mean) / std).numpy()
        np.testing.assert_allclose(process(config, image), expected, rtol=0, atol=1e-4)


def test_dinov3_is_the_same_without_rounding_to_levels() -> None:
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    crop = {"do_center_crop": True, "crop_size": 200}
    image = noise(97, 301)
    exact = process({"image_processor_type": "DINOv3ViTImageProcessor", **crop}, image)
    rounded = process({"image_processor_type": "ViTImageProcessor", **statistics, **crop}, image)
    assert exact.flags.c_contiguous
    assert 0 < np.abs(exact - rounded).max() <= 1.01 / 255 / 0.224


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_colours_equal_the_librarys(mode: str, library: ModuleType) -> None:
    from transformers.image_transforms import convert_to_rgb  # type: ignore[import-not-found]

    rgb = noise(37, 53)
    image = noise(37, 53, mode) if mode in {"LA", "RGBA", "CMYK", "YCbCr"} else rgb.convert(mode)
    for kind, options in (
        ("PNG", {}),
        ("PNG", {"transparency": 0}),
        ("TIFF", {}),
        ("JPEG", {"quality": 90}),
        ("WEBP", {"lossless": True}),
        ("GIF", {"transparency": 3}),
    ):
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind, **options)
        except (OSError, KeyError, ValueError, TypeError):
            continue  # this format has no such mode
        loaded = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
        expected = convert_to_rgb(loaded, return_numpy=True)
        np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), expected, err_msg=f"{kind} {options}")


@pytest.mark.parametrize("resample", FILTERS, ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("source", "target"), [((3, 60), (61, 1220)), ((60, 3), (1221, 61)), ((97, 301), (31, 96)), ((50, 50), (50, 777))]
)
def test_a_window_equals_the_same_part_of_pillows_resized_picture(
    resample: int, source: tuple[int, int], target: tuple[int, int]
) -> None:
    image = noise(*source)
    whole = np.asarray(image.resize(target[::-1], Image.Resampling(resample)))
    for rows, columns in (
        ((0, target[0]), (0, target[1])),
        ((7, 29), (3, 60)),
        ((target[0] - 1, target[0]), (target[1] - 5, target[1])),
    ):
        part, expected = resize_window(image, target, resample, rows, columns), whole[slice(*rows), slice(*columns)]
        assert part.shape == expected.shape
        # Where two pixels are equally near, Pillow's sums of steps decide.
        assert np.mean(part != expected) <= (0.05 if resample == Image.Resampling.NEAREST else 0)


def test_the_longest_strip_costs_no_more_than_what_is_kept() -> None:
    array = process({"image_processor_type": "CLIPImageProcessor"}, Image.new("RGB", (50_000_000, 1), (255, 0, 0)))
    assert array.shape == (3, 224, 224)
    assert np.ptp(array, axis=(1, 2)).tolist() == [0, 0, 0]


def test_a_strip_that_is_wanted_whole_is_refused() -> None:
    config = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}
    with pytest.raises(InputTooLarge, match="resized to 1120000 x 224"):
        process(config, Image.new("RGB", (5000, 1)))


def test_no_resizing_keeps_the_picture() -> None:
    config = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_rescale": False}
    image = picture(5, 7)
    array = process({**config, "do_normalize": False}, image)
    np.testing.assert_array_equal(array, np.asarray(image).transpose(2, 0, 1))


def test_channels_may_come_in_the_other_order() -> None:
    config = {"image_processor_type": "MobileViTImageProcessor", "size": 4, "crop_size": 4}
    array = process(config, Image.new("RGB", (4, 4), (255, 0, 51)))
    assert array[:, 0, 0].tolist() == pytest.approx([0.2, 0, 1])


def test_null_means_the_processors_default() -> None:
    bare = ImageSpec.from_preprocessor_config({"image_processor_type": "CLIPImageProcessor"})
    config = dict.fromkeys(("do_resize", "size", "resample", "image_mean", "do_convert_rgb", "crop_size"))
    assert ImageSpec.from_preprocessor_config({"image_processor_type": "CLIPImageProcessor", **config}) == bare


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, 'names no "image_processor_type"'),
        ({"image_processor_type": "Siglip2ImageProcessor"}, 'the image processor "Siglip2ImageProcessor" is not suppo'),
        ({"do_pad": True}, "CLIPImageProcessor: do_pad changes pixels and is not supported"),
        ({"size": {"max_height": 3, "max_width": 3}}, "size must be height and width, or shortest_edge, got {'max_"),
        ({"size": {"shortest_edge": 0}}, "size must be numbers of pixels from 1 to 8192, got {'shortest_edge': 0}"),
        ({"size": 1 << 20}, "size must be numbers of pixels"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size must be height and width, got"),
        ({"crop_size": "224"}, "crop_size must be height and width, got '224'"),
        ({"resample": 9}, "resample must be one of 0 nearest"),
        ({"resample": "bicubic"}, "resample must be one of 0 nearest"),
        ({"do_resize": "yes"}, "do_resize must be true or false, got 'yes'"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers, got"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be three numbers other than 0"),
        ({"image_std": ["a", 1, 1]}, "image_std must be three numbers"),
        ({"rescale_factor": float("nan")}, "rescale_factor must be a positive number"),
        ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, "crop_size must be height and width"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": [3, 3]}, "takes a size with shortest_edge alone"),
        ({"image_processor_type": "DINOv3ViTImageProcessor", "size": {"shortest_edge": 3}}, "height and width"),
    ],
)
def test_what_cannot_be_equalled_is_refused_in_a_sentence(config: dict[str, Any], sentence: str) -> None:
    base = {"image_processor_type": "CLIPImageProcessor"} if config else {}
    with pytest.raises(ModelError) as error:
        ImageSpec.from_preprocessor_config({**base, **config})
    assert sentence in str(error.value)
