"""`embedmesh demo`: it checks what it says by itself; here that it says it, shows it, and ends."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh_cli.demo import material, page


class Links(HTMLParser):
    """Every address that a page names, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name in {"src", "href", "srcset", "action"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_whole_show(starter_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "embedmesh_cli", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) < 90
    assert "All as it should be" in done.stdout
    shown = tmp_path / "demo-output" / "index.html"
    assert f"in a browser: {shown}" in done.stdout
    text = shown.read_text()
    links = Links(text)
    # It needs no other file and no network.
    assert {link.partition(",")[0] for link in links.found} == {"data:image/png;base64", "data:audio/ogg;base64"}
    assert not re.search(r"url\(|@import|https?://", text)
    for heading in ("Type words, see pictures", "Say words, see pictures", "Show a picture, get words", "Look around"):
        assert heading in links.text


def test_a_page_that_cannot_be_written(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for it is a mistake, told before the show begins; by default it is left out."""
    (tmp_path / "file").touch()
    done = cli("demo", "--html", tmp_path / "file" / "page.html")
    assert done.status == 2
    assert f"--html {tmp_path}/file/page.html: " in done.err
    (tmp_path / "demo-output").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("embedmesh_cli.demo.show.asyncio.run", lambda show: show.close())
    monkeypatch.setattr("embedmesh_cli.demo.show.starter_model", lambda *_: tmp_path)
    done = cli("demo")
    assert done.status == 0
    assert "No page is written: demo-output/index.html: " in done.err


def test_what_is_shown_comes_out_as_it_is() -> None:
    """Names are text, never markup; sounds of the buttons are counted as the players are."""
    picture = material.Picture("<b>&\"'$x", b"png")
    clip = material.Clip("say </q>", "a voice", b"ogg")
    vector = np.array([0.6, -0.8], np.float32)
    hits = [page.Hit(0.5, picture), page.Hit(-0.5, material.Definition("word", "a <gloss>"))]
    answers = [
        page.Answer("typed", "<i>", vector, hits),
        page.Answer("spoken", clip, vector, hits),
        page.Answer("spoken", clip, vector, hits),
        page.Answer("shown", picture, vector, hits),
    ]
    text = page.render(answers, [picture], np.stack([vector]), facts=["1 < 2"], tallies={"typed": "2 > 1"})
    links = Links(text)
    for shown in ("<i>", "say </q>", "a <gloss>", "<b>&\"'$x", "1 < 2", "2 > 1"):
        assert shown in links.text
    assert re.findall(r'data-vector="(.*?)"', text) == ["X4E="] * 4  # 95, -127
    assert re.findall(r'data-sound="(\d)"', text) == ["0", "1"]
    assert text.count("<audio") == 2


def test_the_material_is_whole() -> None:
    found = material.load()
    assert len(found.definitions) == 1000
    assert len({picture.name for picture in found.pictures}) == len(found.pictures) > 200
    assert all(picture.content.startswith(b"\x89PNG") for picture in found.pictures)
    assert all(clip.content.startswith(b"OggS") for clip in found.clips)
