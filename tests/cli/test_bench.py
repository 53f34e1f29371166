"""`embedmesh bench` on the fake backend, and how its reports read."""

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile

from embedmesh.v1 import gateway_pb2, text_pb2
from embedmesh_cli.bench import material
from embedmesh_cli.bench.bound import Bound, Pass
from embedmesh_cli.bench.measure import Seen, Use
from embedmesh_cli.bench.page import as_html, svg
from embedmesh_cli.bench.report import Check, Plot, Report, Section, Series, Table, describe_machine, speed_table
from embedmesh_cli.console import UserError
from embedmesh_encoder.backend.fake import write_model

QUICK = ("--seconds", 0.3, "--warm-seconds", 0.1, "--rounds", 2, "--inputs", 24)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "fake", base_ms=1)
    return tmp_path / "fake"


def test_the_scenarios_are_listed(cli: Any) -> None:
    done = cli("bench", "--list")
    assert done.status == 0
    assert re.search(r"^fairness +bulk and interactive", done.out, re.MULTILINE)
    assert re.search(r"^peers .*\(only when named\)$", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sped"], "no scenario sped; there is text, image,"),
        (["text", "overload", "--address", "a:1"], "overload: needs a mesh of its own, leave --address out"),
        (["text", "--texts", "no/such/file"], "--texts no/such/file: cannot be read"),
        (["text", "--text-model", "no/such/folder"], "--text-model no/such/folder: no model there"),
    ],
)
def test_mistakes(cli: Any, words: list[str], sentence: str) -> None:
    done = cli("bench", *words)
    assert done.status == 2
    assert sentence in done.err


def test_a_whole_run(cli: Any, model: Path, tmp_path: Path) -> None:
    done = cli("bench", "text", "image", "--text-model", model, *QUICK, "--output", tmp_path / "out", "--check")
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["command"].startswith("embedmesh bench text image --text-model")
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["versions"]["grpcio"]
    rows = found["scenarios"]["text"]["rows"]
    bound = rows.pop("in process: the bound")
    assert len(bound) == 2
    assert all(one["vectors_per_second"] > 0 for one in bound)
    served = {name: rounds for name, rounds in rows.items() if name.startswith(("mesh", "encoder"))}
    assert len(served) == 4
    for rounds in served.values():
        for one in rounds:
            assert one["failed_calls"] == {}
            assert one["failed_inputs"] == 0
            assert one["cached_share"] == 0
            assert one["vectors_per_second"] > 0
            if one["latency"]["count"]:  # no call may begin in so short a window on a busy machine
                assert one["latency"]["p50"] <= one["latency"]["p99.9"] <= one["latency"]["max"]
            assert base64.b64decode(one["latency"]["hdr"])
            assert set(one["roles"]) == {"text", "gateway"}
            assert one["roles"]["text"]["rss_mib"] > 10
            assert one["batch_inputs"] >= 1
    # Pictures are the demo's, and the model is the starter's, where none are named.
    assert "image inputs from the demo's pictures" in found["scenarios"]["image"]["notes"][0]
    assert any(name.startswith("mesh") for name in found["scenarios"]["image"]["rows"])
    text = (tmp_path / "out" / "report.txt").read_text()
    assert re.search(r"in process: the bound .* 1\.00 ", text)
    assert text.splitlines()[2:] == done.out.splitlines()[2 : len(text.splitlines())]
    assert "24 text inputs from" in text


def test_pictures_and_sounds(cli: Any, make_tower: Any, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "files" / f"{i}.png")
        wave = 0.5 * np.sin(np.arange(8000) * (200 + 20 * i) * 2 * np.pi / 16_000)
        soundfile.write(tmp_path / "files" / f"{i}.flac", wave, 16_000)
    towers = {modality: make_tower(tmp_path / modality, modality) for modality in ("image", "audio")}
    words = [word for modality, folder in towers.items() for word in (f"--{modality}-model", folder)]
    files = ("--images", tmp_path / "files", "--sounds", tmp_path / "files")
    done = cli("bench", *towers, *words, *files, *QUICK, "--rounds", 1, "--output", tmp_path / "out")
    assert done.status == 0, done.err
    scenarios = json.loads((tmp_path / "out" / "report.json").read_text())["scenarios"]
    for modality in towers:
        rows = scenarios[modality]["rows"]
        assert set(rows) >= {"in process: the bound", "mesh, 4 callers of 32", "encoder alone, 4 callers of 32"}
        for rounds in rows.values():
            assert rounds[0]["vectors_per_second"] > 0
            assert rounds[0].get("failed_inputs", 0) == 0


def test_a_folder_without_pictures(cli: Any, make_tower: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    done = cli("bench", "image", "--image-model", make_tower(tmp_path / "i", "image"), "--images", tmp_path / "none")
    assert done.status == 2
    assert "no files for image in" in done.err


def test_a_mesh_that_runs_already(cli: Any, mesh: Any, tmp_path: Path) -> None:
    """Only its load can be seen; and a model that it does not serve bounds nothing."""
    write_model(tmp_path / "other", seed=1)
    done = cli("bench", "text", "--address", mesh.address, "--text-model", tmp_path / "other", *QUICK)
    assert done.status == 0, done.err
    assert "mesh, 32 callers of 1" in done.out
    assert "in process" not in done.out
    assert "does not serve fake-text@" in done.out


def test_nobody_there(cli: Any, model: Path) -> None:
    done = cli("bench", "latency", "--address", "localhost:1", "--text-model", model, *QUICK)
    assert done.status == 3
    assert "no mesh answers at localhost:1" in done.err


def test_without_the_extra(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("session", "measure", "bound"):
        monkeypatch.delitem(sys.modules, f"embedmesh_cli.bench.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "hdrh.histogram", None)
    done = cli("bench", "text")
    assert done.status == 1
    assert "hdrh is missing: `pip install 'embedmesh[bench]'` brings it." in done.err


# Material


def test_texts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("".join(f"text {i}\n\n" for i in range(50)))
    found = material.texts(tmp_path / "texts", 20)
    assert len(set(found.inputs)) == 20
    assert found == material.texts(tmp_path / "texts", 20)
    assert found.about().startswith("20 text inputs from texts; characters: mean ")


def test_fortunes_are_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wisdom").write_text("one\n%\ntwo\nlines\n%\n\n%\n")
    (tmp_path / "wisdom.dat").write_bytes(b"\x00\xff")
    monkeypatch.setattr(material, "FORTUNES", tmp_path)
    assert sorted(material.texts(None, 10).inputs) == ["one", "two\nlines"]
    monkeypatch.setattr(material, "FORTUNES", tmp_path / "none")
    assert "not installed" in material.texts(None, 10).source


def test_unseen_texts_keep_their_words() -> None:
    texts = ["a b c d e f g h i j", "short"]
    fresh = list(islice(material.unseen(texts, 1), 100))
    assert len(set(fresh)) == 100
    assert sorted(fresh[2].split()) == sorted(texts[0].split())
    assert fresh[3].split()[0] == "short"


def test_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.PNG").write_bytes(b"picture")
    (tmp_path / "b.txt").write_bytes(b"none")
    assert material.pictures(tmp_path, 5).inputs == [b"picture"]
    with pytest.raises(UserError, match=r"no files for audio in .*: name a folder of .wav, .*with --sounds DIR"):
        material.sounds(tmp_path, 5)


def test_requests() -> None:
    texts = [f"text {i}" for i in range(5)]
    made = material.requests("gateway", texts, 2, cache="read_write", priority="bulk", model="m")
    read = [gateway_pb2.EmbedRequest.FromString(each) for each in made]
    assert [[each.text.text for each in one.inputs] for one in read] == [
        ["text 0", "text 1"],
        ["text 2", "text 3"],
        ["text 4", "text 0"],
    ]
    assert {(one.model, one.cache, one.priority) for one in read} == {("m", 1, 2)}
    alone = text_pb2.EmbedTextRequest.FromString(material.requests("text", texts, 1)[3])
    assert alone.inputs[0].text == "text 3"
    picture = gateway_pb2.EmbedRequest.FromString(material.requests("stream", [b"png"], 1, modality="image")[0])
    assert picture.inputs[0].image.content == b"png"


def test_json_vectors() -> None:
    packed = base64.b64encode(np.array([3, 4], "<f4").tobytes()).decode()
    body = json.dumps({"data": [{"index": 1, "embedding": packed}, {"index": 0, "embedding": [1, 2]}]})
    np.testing.assert_array_equal(material.json_vectors(body.encode()), [[1, 2], [3, 4]])


def test_the_kserve_protocol() -> None:
    payloads = material.kserve_requests(["a", "b", "c"], 2, {"outputs": []}, "text")
    assert [json.loads(payload)["inputs"] for payload in payloads] == [
        [{"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": data}] for data in (["a", "b"], ["c", "a"])
    ]
    header = json.dumps({"outputs": [{"name": "embedding", "shape": [2, 2]}]}).encode()
    body = header + np.array([[1, 2], [3, 4]], "<f4").tobytes()
    np.testing.assert_array_equal(material.kserve_vectors(body, len(header)), [[1, 2], [3, 4]])


# The bound


def test_the_bound_runs_every_input_within_the_budget(model: Path) -> None:
    with Bound(model, "text") as bound:
        texts = [("word " * (1 + i % 9))[:-1] for i in range(40)]
        prepared = bound.prepare(texts)
        whole = bound.best(prepared, 0.1)
        assert whole.padding == 0
        assert whole.vectors > 0
        padded = bound.as_they_come(prepared, 0.1, 8)
        assert 0.1 < padded.padding < 0.8
        assert bound.one_by_one(prepared, 0.05).inputs > 0
        assert bound.with_preparation(texts, 0.05, 8).units > 0
        assert len(bound.alone(texts, 0.05)) > 0
        # Vectors do not depend on who computes them in which batch.
        together = bound.vectors(prepared)
        np.testing.assert_array_equal(together[3], bound.vectors([prepared[3]])[0])


# The report


class Wellformed(HTMLParser):
    """Raises where a tag is closed that was not opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        for name, value in attrs:
            assert name not in ("src", "href"), (tag, value)
        if tag not in ("meta", "line", "polyline", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def report() -> Report:
    section = Section(
        "some",
        "What < it > does.",
        tables=[Table("rows", ("", "a", "never", "b"), [("x", "1", "", "22"), ("long name", "333", "", "")])],
        plots=[Plot("curves", "x", "y", [Series("s & t", [1, 10, 1000], [0.5, math.nan, 2]), Series("empty", [], [])])],
        checks=[Check("it is fast", "3 ms", held=True), Check("it is small", "9 GB", held=False)],
        notes=["A note."],
        data={"value": math.nan, "rows": {"x": [(1, math.inf)]}},
    )
    return Report("embedmesh bench some", describe_machine(), [section])


def test_the_report_as_text(report: Report) -> None:
    *_, title, _, header, first, second, _, held, broken, _, note = report.as_text().splitlines()
    assert title == "== some: What < it > does."
    assert (header, first, second) == ("rows         a   b", "x            1  22", "long name  333")
    assert held == "  held  it is fast: 3 ms"
    assert broken == "BROKEN  it is small: 9 GB"
    assert note == "* A note."
    assert not report.held


def test_the_report_as_json(report: Report) -> None:
    found = json.loads(report.as_json())["scenarios"]["some"]
    assert found["value"] is None
    assert found["rows"] == {"x": [[1, None]]}
    assert found["checks"][1] == {"claim": "it is small", "found": "9 GB", "held": False}


def test_the_report_as_a_page(report: Report) -> None:
    page = as_html(report)
    parser = Wellformed()
    parser.feed(page)
    assert parser.open == []
    assert {"table", "svg", "polyline", "style"} <= parser.seen
    assert "script" not in parser.seen
    assert "http" not in page
    assert "What &lt; it &gt; does." in page
    assert "s &amp; t" in page


@pytest.mark.parametrize("log", [True, False])
def test_plots_stay_within_their_frame(log: bool) -> None:
    drawn = svg(Plot("p", "x", "y", [Series("s", [0, 1, 50, 700], [-1, 3, 0.02, 90])], log_x=log, log_y=log))
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', drawn)]
    assert len(dots) == (3 if log else 4)
    assert all(58 <= x <= 548 and 30 <= y <= 296 for x, y in dots)
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    assert "nan" not in drawn


def test_the_part_of_the_bound_is_that_of_units() -> None:
    bound = [Pass(1.0, 100, 1000, 0.0, 2.0)]
    shorter = [Pass(1.0, 100, 500, 0.0, 2.0), Pass(1.0, 90, 400, 0.0, 2.0), Pass(1.0, 110, 600, 0.0, 2.0)]
    table = speed_table("t", {"bound": bound, "row": shorter}, "bound")
    assert [row[:5] for row in table.rows] == [
        ["bound", "100", "100 to 100", "1,000", "1.00"],
        ["row", "100", "90 to 110", "500", "0.50"],
    ]


def test_what_was_seen_adds_up() -> None:
    units = "embedmesh_batch_units_total"
    counted = {
        "text-1": {(units, frozenset({("kind", "real"), ("model", "m")})): 60.0},
        "text-2": {(units, frozenset({("kind", "padding"), ("model", "m")})): 20.0},
    }
    seen = Seen({"text-1": Use(1.5, 10), "gateway": Use(0.5, 10)}, counted)
    assert seen.padding == 0.25
    assert seen.cpu_seconds == 2.0
    assert math.isnan(seen.batch_seconds)
