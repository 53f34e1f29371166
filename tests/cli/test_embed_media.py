"""`embedmesh embed --media`: pictures and sounds from files and folders, against a mesh of real processes."""

import io
import json
import os
import pty
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import embedmesh
from embedmesh.results import EmbedResult
from embedmesh_cli.embed.entries import Entry
from embedmesh_cli.embed.media import is_media_file
from embedmesh_cli.embed.output import Failure, open_writer


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def sound(hertz: float, kind: str = "WAV") -> bytes:
    wave = 0.5 * np.sin(np.arange(8000) * 2 * np.pi * hertz / 16_000)
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format=kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def address(start_up: Any, make_tower: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A mesh with the smallest of real towers, which take a picture of at most 100,000 bytes."""
    folder = tmp_path_factory.mktemp("towers")
    (folder / "mesh.toml").write_text("[image]\nmax_image_bytes = 100000\n")
    options = [f"--{kind}-model={make_tower(folder / kind, kind)}" for kind in ("image", "audio")]
    return str(start_up(*options, "--redis", "none", "--config", str(folder / "mesh.toml")).address)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder of five pictures and sounds, and of other files."""
    folder = tmp_path / "album"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.png").write_bytes(picture(1))
    (folder / "b" / "z.jpg").write_bytes(picture(2, "JPEG"))
    (folder / "b" / "untold").write_bytes(sound(300, "FLAC"))
    (folder / "c.ogg").write_bytes(sound(400, "OGG"))
    (folder / "d.png").write_bytes(sound(500))  # a sound, whatever its name
    (folder / ".hidden" / "x.png").write_bytes(picture(3))
    (folder / ".hidden.png").write_bytes(picture(4))
    (folder / "notes.txt").write_text("BMW, ID cards, RIFFs")
    (folder / "b" / "empty").touch()
    return folder


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_folder(cli: Any, address: str, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album.parent)
    (album / "b" / "loop").symlink_to(album)
    (album / "e.png").symlink_to(album / "a.png")
    done = cli("embed", "--address", address, "--media", "album")
    assert done.status == 0
    assert done.err == "2 other files were skipped: neither pictures nor sounds.\n"
    got = lines(done.out)
    expected = ["a.png", "b/untold", "b/z.jpg", "c.ogg", "d.png", "e.png"]
    assert [line["file"] for line in got] == [f"album/{name}" for name in expected]
    assert [line["index"] for line in got] == list(range(6))
    kinds: dict[str, Any] = {"tiny-image": embedmesh.Image.from_file, "tiny-audio": embedmesh.Audio.from_file}
    assert [line["model"].removeprefix("tiny-") for line in got] == [
        *("image", "audio", "image", "audio", "audio", "image")
    ]
    with embedmesh.Client(address) as client:
        vectors = client.embed([kinds[line["model"]](line["file"]) for line in got]).vectors
    np.testing.assert_allclose([line["vector"] for line in got], vectors, atol=1e-6)


def test_a_bad_file_fails_alone(cli: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "2.png").write_bytes(picture(2)[:40])
    (tmp_path / "3.wav").touch()
    (tmp_path / "4.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "5.png").symlink_to("nowhere")
    (tmp_path / "6.png").write_bytes(picture(6) + bytes(100_000))
    (tmp_path / "7.txt").write_text("a text")
    (tmp_path / "8.wav").write_bytes(sound(200))
    os.mkfifo(tmp_path / "9.png")  # opening it would wait for ever
    done = cli("embed", "--address", address, "--media", *sorted(tmp_path.iterdir()))
    assert done.status == 1
    got = lines(done.out)
    assert ["vector" in line for line in got] == [True] + [False] * 6 + [True, False]
    assert [line["error"]["reason"] for line in got if "error" in line] == [
        *("UNDECODABLE_INPUT", "UNDECODABLE_INPUT", "UNDECODABLE_INPUT", "UNREADABLE", "INPUT_TOO_LARGE"),
        *("UNREADABLE", "UNREADABLE"),
    ]
    for sentence in (
        f"{tmp_path}/4.heic: the bytes are no image of a known format (AVIF, BMP",
        f"{tmp_path}/5.png: No such file or directory [UNREADABLE]",
        f"{tmp_path}/6.png: the image file has ",
        "bytes, the limit is 100000 [INPUT_TOO_LARGE]",
        f"{tmp_path}/7.txt: neither its content nor its name is that of a picture or a sound [UNREADABLE]",
        f"{tmp_path}/9.png: neither a file nor a folder [UNREADABLE]",
        "7 of 9 files failed.",
    ):
        assert sentence in done.err


def test_the_rows_of_a_matrix_are_named(cli: Any, address: str, album: Path, tmp_path: Path) -> None:
    (album / "broken.gif").write_bytes(b"GIF89a")
    target = tmp_path / "vectors.npy"
    done = cli("embed", "--address", address, "--media", album, "--output", target, "--dtype", "float16")
    assert done.status == 1
    assert done.out == ""
    matrix = np.load(target)
    names = lines((tmp_path / "vectors.npy.jsonl").read_text())
    assert matrix.shape == (len(names), 16) == (6, 16)
    assert [Path(line["file"]).name for line in names] == ["a.png", "untold", "z.jpg", "broken.gif", "c.ogg", "d.png"]
    assert np.isnan(matrix).all(axis=1).tolist() == ["error" in line for line in names]
    assert names[0].keys() == {"index", "file", "model", "units", "truncated", "cached"}
    assert (names[0]["index"], names[0]["file"], names[0]["model"]) == (0, str(album / "a.png"), "tiny-image")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["album", "vectors.npy", "vectors.npy.jsonl"]


def test_many_files_in_bounded_chunks(cli: Any, address: str, tmp_path: Path) -> None:
    for i in range(150):
        (tmp_path / f"{i:03}.png").write_bytes(picture(i) if i % 50 else b"")
    done = cli("embed", "--address", address, "--media", tmp_path, "--output", tmp_path / "out.npy")
    assert done.status == 1
    assert "3 of 150 files failed." in done.err
    assert np.isnan(np.load(tmp_path / "out.npy")).all(axis=1).nonzero()[0].tolist() == [0, 50, 100]


def test_an_empty_folder_is_no_mistake(cli: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = cli("embed", "--address", address, "--media", tmp_path / "in", "--output", tmp_path / "out.npy")
    assert (done.status, done.err) == (0, "")
    assert np.load(tmp_path / "out.npy").shape == (0, 0)
    assert (tmp_path / "out.npy.jsonl").read_bytes() == b""


def test_a_modality_that_the_mesh_lacks(cli: Any, mesh: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    done = cli("embed", "--address", mesh.address, "--media", tmp_path / "a.png")
    assert done.status == 1
    assert "this mesh embeds no image [MODEL_NOT_FOUND]" in done.err


def test_who_watches_sees_the_progress(address: str, album: Path) -> None:
    watcher, terminal = pty.openpty()
    command = [sys.executable, "-m", "embedmesh_cli", "embed", "--address", address, "--media", str(album)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, check=True, timeout=60)
    os.close(terminal)
    seen = os.read(watcher, 1 << 16).decode()
    os.close(watcher)
    assert len(done.stdout.splitlines()) == 5
    assert "0/5" in seen
    assert "5 files in " in seen


def words_of_this_python(path: str) -> str:
    """What it says of a path that cannot be one: "embedded null byte" in 3.11, in others something else."""
    with pytest.raises(ValueError, match="embedded null") as raised:
        Path(path).lstat()
    return str(raised.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--media"], "--media needs files or folders: embedmesh embed --media photos/ talk.mp3."),
        (["--media", "no/such"], "--media no/such: No such file or directory."),
        (["--media", "a\0b"], f"--media a\\0b: {words_of_this_python('a' + chr(0) + 'b')}."),
        (["--media", "x.png", "--file", "x"], "give --media or --file, not both."),
        (["--media", "x.png", "--role", "query"], "--role, --instruction and --with-text are for texts; --media takes"),
        (["--file", "."], "--file .: is a folder. Of pictures or sounds? --media ."),
    ],
)
def test_mistakes(cli: Any, words: list[str], sentence: str) -> None:
    done = cli("embed", *words)
    assert done.status == 2
    assert sentence in done.err.replace("\0", "\\0")


def test_a_text_is_never_taken_for_a_file_but_its_writer_is_told(cli: Any, mesh: Any, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(picture(1))
    done = cli("embed", "--address", mesh.address, tmp_path / "cat.png")
    assert done.status == 0
    assert lines(done.out)[0]["model"] == "fake-text"
    assert done.err.endswith("cat.png' was embedded as a text; --media embeds what is in the file.\n")
    assert not any(map(is_media_file, ["x" * 10_000 + ".png", "a\0.png", str(tmp_path), "no.png", ""]))


def test_a_vector_of_another_width_has_no_place_in_a_matrix(tmp_path: Path) -> None:
    results = [EmbedResult(i, _vector=np.ones(width, np.float32)) for i, width in enumerate((3, 2, 3))]
    with ExitStack() as stack:
        writer = open_writer(stack, tmp_path / "v.npy", with_text=False, media=True)
        told = [writer.write(i, Entry("", f"{i}.png"), result) for i, result in enumerate(results)]
        writer.finish()
    assert [isinstance(one, Failure) for one in told] == [False, True, False]
    assert "its vector has 2 numbers, the matrix has 3 columns; write JSON lines" in str(told[1])
    assert np.isnan(np.load(tmp_path / "v.npy")).all(axis=1).tolist() == [False, True, False]
    assert lines((tmp_path / "v.npy.jsonl").read_text())[1]["error"]["reason"] == "OTHER_WIDTH"
