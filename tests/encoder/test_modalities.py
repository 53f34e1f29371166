"""Images and sounds take the same path as text: manifest, preparer, graph, vector."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client import CollectorRegistry

from embedmesh.errors import InvalidRequest, UndecodableInput
from embedmesh.v1 import audio_pb2
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import encode_into
from embedmesh_encoder.audio import AudioItem
from embedmesh_encoder.backend import Backend, create_backend
from embedmesh_encoder.encoder import Encoded, Encoder, EncoderOptions
from embedmesh_encoder.image import ImageItem
from embedmesh_encoder.modalities import (
    audio_preparer,
    image_preparer,
    text_preparer,
    warm_audio,
    warm_images,
    warm_texts,
)
from embedmesh_encoder.model import ModelError, load_spec
from embedmesh_encoder.preparation import Preparer
from embedmesh_encoder.service import _read_audio
from embedmesh_encoder.settings import AudioSettings, ImageSettings, TextSettings
from embedmesh_server.metrics import EncoderMetrics


def picture(seed: int, size: tuple[int, int] = (40, 50)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tone(hertz: float, seconds: float) -> AudioItem:
    wave = np.sin(np.arange(round(16_000 * seconds)) * 2 * np.pi * hertz / 16_000)
    return AudioItem(samples=wave.astype(np.float32), rate=16_000)


async def test_images_are_embedded(make_tower: Any, tower_weights: Any, tmp_path: Path) -> None:
    spec = load_spec(make_tower(tmp_path / "m", "image"))
    settings = ImageSettings.model_validate({"model": [tmp_path]})
    preparer = image_preparer(spec, settings)
    encoder = Encoder(spec, preparer, create_backend(spec), EncoderMetrics(CollectorRegistry()))
    await encoder.warm_up(warm_images(spec, settings))
    items = [ImageItem(picture(1)), ImageItem(b"no picture"), ImageItem(picture(2, (33, 99)))]
    first, bad, second = await encoder.embed(items)
    assert isinstance(bad, UndecodableInput)
    for item, outcome in ((items[0], first), (items[2], second)):
        assert isinstance(outcome, Encoded)
        pixels = preparer.prepare(item, pb.TRUNCATION_END).data
        expected = pixels.mean(axis=(1, 2)) @ tower_weights("image")
        np.testing.assert_allclose(outcome.vector, expected / np.linalg.norm(expected), atol=1e-5)
        assert outcome.norm == pytest.approx(np.linalg.norm(expected), rel=1e-4)
    assert await encoder.close(1)


async def test_sounds_of_unlike_lengths_share_batches(make_tower: Any, tower_weights: Any, tmp_path: Path) -> None:
    spec = load_spec(make_tower(tmp_path / "m", "audio"))
    settings = AudioSettings.model_validate({"model": [tmp_path]})
    preparer = audio_preparer(spec, settings)
    encoder = Encoder(spec, preparer, create_backend(spec), EncoderMetrics(CollectorRegistry()))
    await encoder.warm_up(warm_audio(spec, settings))
    items = [tone(440, 0.5), AudioItem(content=b"no sound"), tone(880, 0.7), tone(220, 12)]
    outcomes = await encoder.embed(items)
    assert isinstance(outcomes[1], UndecodableInput)
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, Encoded):
            (window,) = preparer.prepare(item, pb.TRUNCATION_END).data.windows
            expected = window["input_features"].mean(axis=0) @ tower_weights("audio")
            np.testing.assert_allclose(outcome.vector, expected / np.linalg.norm(expected), atol=1e-5)
    longest = outcomes[3]
    assert isinstance(longest, Encoded)
    assert longest.truncated
    assert (longest.units, longest.original_units) == (1000, 1198)
    assert await encoder.close(1)


class Counted:
    """A backend that keeps the shapes of what it is given."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.precision, self.run_beside = backend.name, backend.precision, None
        self.shapes: list[tuple[int, ...]] = []

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        self.shapes += [feed.shape for name, feed in feeds.items() if name != "attention_mask"]
        return self._backend.run(feeds, outputs)

    def close(self) -> None:
        self._backend.close()


async def embedded(
    folder: Path, items: Sequence[Any], caplog: pytest.LogCaptureFixture
) -> tuple[Counted, list[Encoded]]:
    """Embed together, none of which may fail, and see that each is what it is alone."""
    spec = load_spec(folder)
    backend = Counted(create_backend(spec))
    preparer: Preparer
    if spec.modality == "image":
        preparer = image_preparer(spec, ImageSettings.model_validate({"model": [folder]}))
    else:
        preparer = audio_preparer(spec, AudioSettings.model_validate({"model": [folder]}))
    options = EncoderOptions(batch_cost=1 << 20)
    encoder = Encoder(spec, preparer, backend, EncoderMetrics(CollectorRegistry()), options)
    outcomes = await encoder.embed(items)
    shapes = backend.shapes.copy()
    for item, outcome in zip(items, outcomes, strict=True):
        [alone] = await encoder.embed([item])
        assert isinstance(alone, Encoded)
        assert isinstance(outcome, Encoded)
        np.testing.assert_allclose(outcome.vector, alone.vector, atol=1e-5)
    backend.shapes = shapes
    assert await encoder.close(1)
    assert "by halves" not in caplog.text
    return backend, [outcome for outcome in outcomes if isinstance(outcome, Encoded)]


async def test_images_of_one_shape_share_a_batch(
    make_tower: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = {"do_resize": False, "do_center_crop": False}
    folder = make_tower(tmp_path / "m", "image", config=free, max_input_units=1000)
    sizes = [(40, 50), (33, 99), (64, 16)]
    items = [ImageItem(picture(i, sizes[i * i % 3])) for i in range(24)]
    backend, _ = await embedded(folder, items, caplog)
    counts = Counter(sizes[i * i % 3] for i in range(24))
    # A run for each shape in all, none of which failed and was halved.
    assert sorted(backend.shapes) == sorted((n, 3, *size) for size, n in counts.items())


@pytest.mark.parametrize("masked", [True, False])
async def test_sounds_share_a_batch_where_the_graph_can_tell_them_apart(
    make_tower: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, masked: bool
) -> None:
    folder = make_tower(tmp_path / "m", "audio", masked=masked)
    items = [tone(200 + 10 * i, (0.5, 0.6, 0.75)[i % 3]) for i in range(24)]
    backend, outcomes = await embedded(folder, items, caplog)
    lengths = [outcome.units for outcome in outcomes[:3]]
    if masked:
        assert backend.shapes == [(24, lengths[2], 64)]
    else:
        assert backend.shapes == [(8, length, 64) for length in lengths]


@pytest.mark.parametrize("masked", [True, False])
async def test_long_sounds_are_averaged_over_windows(
    make_tower: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, masked: bool
) -> None:
    audio = {"processor": "preprocessor_config.json", "window_units": 100}
    folder = make_tower(tmp_path / "m", "audio", masked=masked, audio=audio)
    backend, outcomes = await embedded(folder, [tone(300, 2.5), tone(500, 2.3), tone(700, 0.5)], caplog)
    assert [outcome.units for outcome in outcomes] == [300, 300, 48]
    assert backend.shapes == [(6, 100, 64), (1, 48, 64)]


def test_a_changed_setting_of_pre_processing_changes_the_revision(make_tower: Any, tmp_path: Path) -> None:
    specs = [
        load_spec(make_tower(tmp_path / "a", "image")),
        load_spec(make_tower(tmp_path / "b", "image", config={"do_normalize": False})),
        load_spec(
            make_tower(tmp_path / "c", "image", image={"processor": "preprocessor_config.json", "patch_size": 8})
        ),
        load_spec(make_tower(tmp_path / "d", "audio")),
        load_spec(
            make_tower(tmp_path / "e", "audio", audio={"processor": "preprocessor_config.json", "window_units": 100})
        ),
    ]
    assert len({spec.revision for spec in specs}) == len(specs)
    assert load_spec(make_tower(tmp_path / "f", "image", name="other")).revision == specs[0].revision


@pytest.mark.parametrize(
    ("modality", "changes", "message"),
    [
        ("image", {"image": {"processor": "none.json"}}, 'names "none.json", which is not listed in [files]'),
        ("image", {"audio": {"processor": "preprocessor_config.json"}}, 'audio is only for the modality "audio"'),
        ("image", {"graph": {"file": "m.onnx", "layout": "padded"}}, 'must have the layout "stacked"'),
        ("audio", {"graph": {"file": "m.onnx", "layout": "stacked"}}, "must name its inputs"),
    ],
)
def test_mistakes_in_a_manifest_are_named(
    make_tower: Any, tmp_path: Path, modality: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        make_tower(tmp_path / "m", modality, **changes)
    assert message in str(caught.value)


def test_an_unknown_processor_is_named(make_tower: Any, tmp_path: Path) -> None:
    spec = load_spec(make_tower(tmp_path / "m", "image", config={"image_processor_type": "StrangeImageProcessor"}))
    with pytest.raises(ModelError, match="StrangeImageProcessor"):
        image_preparer(spec, ImageSettings.model_validate({"model": [tmp_path]}))


@pytest.mark.parametrize("text", ["[", "[]"])
def test_a_config_that_is_none_is_named(make_tower: Any, tmp_path: Path, text: str) -> None:
    spec = load_spec(make_tower(tmp_path / "m", "audio"))
    (spec.folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        audio_preparer(spec, AudioSettings.model_validate({"model": [tmp_path]}))


def test_samples_and_files_are_read_from_the_contract() -> None:
    message = audio_pb2.AudioInput()
    with pytest.raises(InvalidRequest):
        _read_audio(message)
    message.pcm.sample_rate_hz = 8000
    encode_into(message.pcm.samples, np.zeros((5, 2), np.float32))
    item = _read_audio(message)
    assert item.samples is not None
    assert (item.samples.shape, item.rate, item.content) == ((5, 2), 8000, None)
    message.pcm.samples.data = b"123"
    with pytest.raises(InvalidRequest) as caught:
        _read_audio(message)
    assert caught.value.field == "pcm.samples"
    assert _read_audio(audio_pb2.AudioInput(content=b"x")).content == b"x"


@pytest.mark.parametrize(
    ("backend", "limit", "flags", "widths"),
    [
        ("onnxruntime", 64, {}, {3, 64}),
        ("openvino", 64, {}, {16, 32, 48, 64}),
        ("openvino", 64, {"row_multiple": 32}, {32, 64}),
        ("openvino", 2048, {}, {16, *range(64, 2049, 64)}),
        ("cuda", 256, {}, {64, 128, 192, 256}),
    ],
)
def test_texts_warm_every_shape_that_the_backend_will_see(
    starter_model: Path, backend: Any, limit: int, flags: dict[str, int], widths: set[int]
) -> None:
    spec = load_spec(starter_model).run_by(backend, "float32").model_copy(update={"max_input_units": limit})
    settings = TextSettings.model_validate({"model": [starter_model], **flags})
    preparer = text_preparer(spec, settings)
    items = warm_texts(spec, settings)
    batches = [[preparer.prepare(item, pb.TRUNCATION_END)] for item in items]
    assert {preparer.collate(batch)["input_ids"].shape for batch in batches} == {(1, width) for width in widths}
