"""Fill golden.json with what transformers makes of a few pictures: needs transformers, torch and pillow.

    .venv-torch/bin/python tests/data/images/make_golden.py

For each configuration and size of picture there is the shape of the model's input, its mean, and 24 of
its values, evenly spread. The pictures are a formula, so that they need no files.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers  # type: ignore[import-not-found]
from PIL import Image, __version__
from transformers.models.auto import image_processing_auto  # type: ignore[import-not-found]

GOLDEN = Path(__file__).parent / "golden.json"
SIZES = [(1, 1), (1, 97), (89, 1), (5, 900), (17, 23), (101, 211), (224, 224), (331, 257)]
BIT = {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CONFIGS: list[dict[str, Any]] = [
    {"image_processor_type": "CLIPImageProcessor"},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 30, "crop_size": 33},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": [61, 50], "resample": 1},
    {
        "image_processor_type": "CLIPImageProcessorFast",
        "size": {"shortest_edge": 60, "longest_edge": 200},
        "do_center_crop": False,
    },
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 256, "width": 192}},
    {"image_processor_type": "ViTImageProcessor"},
    {"image_processor_type": "ViTImageProcessor", "resample": 0, "do_normalize": False},
    {"image_processor_type": "ViTImageProcessor", "resample": 4, "size": 64, "image_mean": 0.4},
    {"image_processor_type": "ViTImageProcessor", "resample": 5, "do_rescale": False},
    {"image_processor_type": "BitImageProcessor", "crop_size": {"height": 224, "width": 224}, **BIT},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875},
    {"image_processor_type": "ConvNextImageProcessor"},
    {"image_processor_type": "DeiTImageProcessor"},
    {"image_processor_type": "BlipImageProcessor"},
    {"image_processor_type": "BeitImageProcessor", "do_center_crop": True},
    {"image_processor_type": "PvtImageProcessor"},
    {"image_processor_type": "LevitImageProcessor"},
    {"image_processor_type": "ChineseCLIPImageProcessor"},
    {"image_processor_type": "EfficientNetImageProcessor", "rescale_factor": 1 / 127.5, "rescale_offset": True},
    {"image_processor_type": "MobileViTImageProcessor"},
]


def picture(height: int, width: int) -> Image.Image:
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((x * x * 7 + y * 13 + x * y * 3 + c * 91) % 256).astype(np.uint8))


def reference(config: dict[str, Any]) -> Any:
    name = config.get("image_processor_type") or config["feature_extractor_type"]
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    kind: Any = image_processing_auto.get_image_processor_class_from_name(f"{name}Pil")
    return kind(**{key: value for key, value in config.items() if not key.endswith("_type")})


def main() -> None:
    cases = []
    for config in CONFIGS:
        processor = reference(config)
        inputs = []
        for height, width in SIZES:
            array = np.asarray(processor(picture(height, width))["pixel_values"][0], np.float32)
            values = array.ravel()[np.linspace(0, array.size - 1, 24).astype(int)]
            inputs.append(
                {
                    "picture": [height, width],
                    "shape": list(array.shape),
                    "mean": round(float(array.mean(dtype=np.float64)), 6),
                    "values": [round(float(value), 6) for value in values],
                }
            )
        cases.append({"config": config, "inputs": inputs})
    lines = ",\n".join(json.dumps(case) for case in cases)
    made_with = f"transformers {transformers.__version__}, pillow {__version__}"
    GOLDEN.write_text(f'{{"made_with": "{made_with}", "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
