"""`embedmesh embed` against a mesh of real processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh_encoder.backend.fake import write_model


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_arguments(cli: Any, mesh: Any) -> None:
    done = cli("embed", "--address", mesh.address, "one", "two", "one", "--with-text")
    assert done.status == 0
    assert done.err == ""
    got = lines(done.out)
    assert [line["index"] for line in got] == [0, 1, 2]
    assert [line["text"] for line in got] == ["one", "two", "one"]
    assert len(got[0]["vector"]) == 384
    assert got[0]["vector"] == got[2]["vector"] != got[1]["vector"]
    assert np.linalg.norm(got[0]["vector"]) == pytest.approx(1, abs=1e-5)
    assert got[0]["units"] == 5
    assert got[0]["truncated"] is False
    assert got[0]["model"] == "fake-text"


def test_the_second_time_it_comes_from_the_cache(cli: Any, mesh: Any) -> None:
    assert cli("embed", "--address", mesh.address, "cached or not").status == 0
    assert lines(cli("embed", "--address", mesh.address, "cached or not").out)[0]["cached"] is True
    bypassed = cli("embed", "--address", mesh.address, "--cache", "bypass", "cached or not")
    assert lines(bypassed.out)[0]["cached"] is False


def test_dtype(cli: Any, mesh: Any) -> None:
    got = lines(cli("embed", "--address", mesh.address, "--dtype", "int8", "x").out)[0]
    assert max(map(abs, got["vector"])) == 127
    assert got["scale"] > 0
    assert len(lines(cli("embed", "--address", mesh.address, "--dtype", "binary", "x").out)[0]["vector"]) == 48


def test_kinds(cli: Any, start_up: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "all", name="all", kinds=("dense", "sparse", "multi_vector"), dimensions=8)
    address = start_up("--text-model", str(tmp_path / "all")).address
    (line,) = lines(cli("embed", "--address", address, "--kinds", "sparse,multi_vector", "abc").out)
    assert "vector" not in line
    assert sorted(line["sparse"]) == ["indices", "values"]
    assert len(line["sparse"]["indices"]) == len(line["sparse"]["values"]) > 0
    assert [len(row) for row in line["multi_vector"]] == [16] * 4
    assert len(lines(cli("embed", "--address", address, "--kinds", "dense,sparse", "abc").out)[0]["vector"]) == 8
    done = cli("embed", "--address", address, "--kinds", "dense,sparse", "abc", "--output", tmp_path / "x.npy")
    assert (done.status, "holds dense vectors only: write --kinds dense,sparse to JSON lines" in done.err) == (2, True)
    assert cli("embed", "--address", address, "--kinds", "dense,bits", "abc").status == 2


def test_decimals_read_back_exactly(cli: Any, mesh: Any, tmp_path: Path) -> None:
    got = lines(cli("embed", "--address", mesh.address, "exact").out)[0]["vector"]
    assert cli("embed", "--address", mesh.address, "exact", "--output", tmp_path / "x.npy").status == 0
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.load(tmp_path / "x.npy")[0])


def test_truncation_is_told(cli: Any, mesh: Any) -> None:
    done = cli("embed", "--address", mesh.address, "x" * 1000)
    assert done.status == 0
    assert lines(done.out)[0]["truncated"] is True
    assert lines(done.out)[0]["original_units"] == 1002
    assert "1 of 1 texts were longer than the model reads and were cut" in done.err
    refused = cli("embed", "--address", mesh.address, "--truncation", "refuse", "x" * 1000, "short")
    assert refused.status == 1
    assert lines(refused.out)[0]["error"]["reason"] == "INPUT_TOO_LARGE"
    assert "vector" in lines(refused.out)[1]


def test_instructions_and_chunks(cli: Any, mesh: Any) -> None:
    several = cli("embed", "--address", mesh.address, "--instruction", "a: ", "--instruction", "bb: ", "x")
    assert lines(several.out)[0]["units"] == 6 + 7
    options = ("--truncation", "chunk", "--chunk-units", 102, "--chunk-overlap", 10)
    chunked = cli("embed", "--address", mesh.address, *options, "x" * 190)
    assert (lines(chunked.out)[0]["units"], lines(chunked.out)[0]["truncated"]) == (102 * 2, False)
    wrong = cli("embed", "--address", mesh.address, "--chunk-units", 100, "x")
    assert wrong.status == 1
    assert "chunk_units is for truncation='chunk'" in wrong.err


def test_file_with_bad_lines(cli: Any, mesh: Any, tmp_path: Path) -> None:
    """A line that is not UTF-8 fails alone, in its place, and an empty line is a text."""
    source = tmp_path / "texts.txt"
    source.write_bytes("\ufefffirst\r\n\nna\u00efve\n".encode() + b"b\xff\xfed\n" + b"last")
    done = cli("embed", "--address", mesh.address, "--file", source, "--with-text")
    assert done.status == 1
    got = lines(done.out)
    assert [line["text"] for line in got] == ["first", "", "na\u00efve", "", "last"]
    assert ["vector" in line for line in got] == [True, True, True, False, True]
    assert got[3]["error"]["reason"] == "UNREADABLE"
    assert "text 3: the line is not UTF-8 (byte 1 is 0xff)" in done.err
    assert "1 of 5 texts failed" in done.err


def test_json_lines(cli: Any, mesh: Any, tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text('{"id": 1, "body": "one"}\n\nnonsense\n{"body": 3}\n[1]\n{"body": "two"}\n')
    done = cli("embed", "--address", mesh.address, "--file", source, "--field", "body", "--with-text")
    assert done.status == 1
    assert [line["text"] for line in lines(done.out)] == ["one", "", "", "", "two"]
    assert "text 1: the line is not JSON" in done.err
    assert "no JSON object with a text in 'body'" in done.err


def test_many_lines_to_npy(cli: Any, mesh: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    with source.open("wb") as file:
        file.write(b"\xff\n")
        file.writelines(f"text {i}\n".encode() for i in range(3000))
        file.write(b"\xff\n")
    done = cli("embed", "--address", mesh.address, "--file", source, "--output", target)
    assert done.status == 1
    matrix = np.load(target)
    assert matrix.shape == (3002, 384)
    assert matrix.dtype == np.float32
    assert np.isnan(matrix[[0, -1]]).all()
    assert np.isfinite(matrix[1:-1]).all()
    one = lines(cli("embed", "--address", mesh.address, "text 2999").out)[0]
    np.testing.assert_allclose(matrix[-2], one["vector"], atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".npy"] == ["vectors.npy"]


def test_npy_without_any_vector(cli: Any, mesh: Any, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_bytes(b"\xff\n\xfe\n")
    assert cli("embed", "--address", mesh.address, "--file", source, "--output", tmp_path / "v.npy").status == 1
    assert np.load(tmp_path / "v.npy").shape == (2, 0)
    source.write_bytes(b"")
    assert cli("embed", "--address", mesh.address, "--file", source, "--output", tmp_path / "v.npy").status == 0
    assert np.load(tmp_path / "v.npy").shape == (0, 0)


def test_standard_input(mesh: Any) -> None:
    command = [sys.executable, "-m", "embedmesh_cli", "embed", "--address", mesh.address]
    done = subprocess.run(command, input=b"a\nb\n", capture_output=True, check=True, timeout=60)
    assert [line["index"] for line in lines(done.stdout.decode())] == [0, 1]
    assert done.stderr == b""  # no progress bar where nobody watches


def test_a_reader_that_stops_early_is_no_error(mesh: Any, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("".join(f"{i}\n" for i in range(2000)))
    command = [sys.executable, "-m", "embedmesh_cli", "embed", "--address", mesh.address, "--file", str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_environment_names_the_mesh(cli: Any, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDMESH_ADDRESS", mesh.address)
    assert cli("embed", "hello").status == 0


def test_nobody_answers(cli: Any) -> None:
    done = cli("embed", "--address", "localhost:1", "hello")
    assert done.status == 3
    assert done.out == ""
    assert done.err.startswith("embedmesh: no mesh answers at localhost:1: start one with `")


def test_nobody_answers_and_nothing_is_written(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hello\n")
    assert (
        cli("embed", "--address", "localhost:1", "--file", tmp_path / "t.txt", "--output", tmp_path / "v.npy").status
        == 3
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.txt"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--file", "no/such/file"], "--file no/such/file: No such file or directory."),
        (["hello", "--file", "x"], "give texts or --file, not both."),
        (["hello", "--output", "no/such/folder/x.npy"], "--output no/such/folder/x.npy: No such file or directory."),
        (["hello", "--dtype", "float7"], "float7"),
        (["hello", "--dimensions", "-1"], "greater than or equal to 0"),
    ],
)
def test_mistakes_in_the_options(cli: Any, words: list[str], sentence: str) -> None:
    done = cli("embed", *words)
    assert done.status == 2
    assert sentence in done.err
    assert "Traceback" not in done.err


def test_unknown_model_and_width(cli: Any, mesh: Any) -> None:
    done = cli("embed", "--address", mesh.address, "--model", "no-such-model", "hello")
    assert done.status == 1
    assert "MODEL_NOT_FOUND" in done.err
    done = cli("embed", "--address", mesh.address, "--dimensions", "7", "hello")
    assert done.status == 1
    assert "UNSUPPORTED_OUTPUT" in done.err
