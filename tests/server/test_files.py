import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from embedmesh_server.files import FileError, Files, Followed
from embedmesh_server.metrics import FileMetrics


@pytest.fixture
def number(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


@pytest.fixture
def follow(registry: CollectorRegistry, number: Path) -> Callable[[], Followed[int]]:
    def read() -> int:
        try:
            return int(number.read_text())
        except (OSError, ValueError):
            raise FileError(f"{number} holds no number") from None

    return lambda: Files(FileMetrics(registry)).follow("number", [number], read)


def test_a_change_is_read_when_it_has_been_still_for_one_look(
    follow: Callable[[], Followed[int]], number: Path
) -> None:
    followed = follow()
    heard: list[int] = []
    followed.on_change(heard.append)
    followed.look()
    number.write_text("2")
    followed.look()
    assert followed.value == 1
    number.write_text("234")  # its writer had not finished
    followed.look()
    assert (followed.value, heard) == (1, [])
    followed.look()
    followed.look()
    assert (followed.value, heard) == (234, [234])


def test_what_cannot_be_used_changes_nothing_and_is_told_once(
    follow: Callable[[], Followed[int]],
    number: Path,
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stale() -> float | None:
        return registry.get_sample_value("embedmesh_file_stale", {"file": "number"})

    def reloads(outcome: str) -> float | None:
        return registry.get_sample_value("embedmesh_file_reloads_total", {"file": "number", "outcome": outcome})

    followed = follow()
    assert (stale(), reloads("ok"), reloads("failed")) == (0, 0, 0)
    number.write_text("nonsense")
    for _ in range(4):
        followed.look()
    assert (followed.value, stale(), reloads("failed")) == (1, 1, 1)
    number.unlink()
    for _ in range(4):
        followed.look()
    assert (followed.value, stale(), reloads("failed")) == (1, 1, 2)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert told == [f"{number} holds no number; what was read before stays in use"] * 2
    number.write_text("3")
    for _ in range(2):
        followed.look()
    assert (followed.value, stale(), reloads("ok")) == (3, 0, 1)


def test_a_secret_of_kubernetes_is_swapped_by_links(tmp_path: Path, registry: CollectorRegistry) -> None:
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "key").write_text(version)
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "key").symlink_to("..data/key")
    followed = Files(FileMetrics(registry)).follow("keys", [tmp_path / "key"], (tmp_path / "key").read_text)
    (tmp_path / "..new").symlink_to("two")
    (tmp_path / "..new").replace(tmp_path / "..data")
    followed.look()
    followed.look()
    assert followed.value == "two"


def test_at_the_start_what_cannot_be_used_is_an_error(follow: Callable[[], Followed[int]], number: Path) -> None:
    number.write_text("nonsense")
    with pytest.raises(FileError, match="holds no number"):
        follow()


async def test_a_file_that_breaks_its_reader_leaves_the_others_followed(
    registry: CollectorRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("embedmesh_server.files._LOOK_SECONDS", 0.01)
    paths = [tmp_path / name for name in ("bad", "good")]
    for path in paths:
        path.write_text("1")
    followed = Files(FileMetrics(registry))
    numbers = [followed.follow(path.name, [path], lambda path=path: int(path.read_text())) for path in paths]  # type: ignore[misc]
    watching = asyncio.create_task(followed.watch())
    for path in paths:
        path.write_text("two" if path.name == "bad" else "22")
    while numbers[1].value != 22:
        await asyncio.sleep(0.01)
    watching.cancel()
    assert numbers[0].value == 1
    assert "cannot follow <Followed bad" in caplog.text
