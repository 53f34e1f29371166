"""What `embedmesh demo` shows. It checks whatever it says: the first thing that is not so ends it with status 1."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterable
from importlib import resources

import numpy as np
import redis
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from embedmesh import AsyncClient, EmbedResult
from embedmesh_cli.console import UserError, command_name, starter_model
from embedmesh_cli.mesh import Mesh, MeshError, MeshOptions

__all__ = ["demo"]

# What is asked, and the word whose definition must come first. None shares a word with its answer.
_QUESTIONS = {
    "what to wear on a freezing day": "greatcoat",
    "where to buy bread and milk": "grocery store",
    "a device to look at very tiny things": "microscope",
    "she got the job of her dreams": "fulfillment",
}
_SMALL_WORDS = re.compile(r"\b(?:an?|and|at|be|for|from|her|in|is|it|of|on|or|she|the|to|very|what|where|with)\b")
_WAIT_SECONDS = 30.0


def demo() -> None:
    """Show a mesh at work: start it, embed, search, cache, errors, metrics; ends by itself.

    Embeds 1,000 definitions of WordNet with all-MiniLM-L6-v2 (made on first use) on free ports of this
    machine. Needs no other program, leaves no process behind, and ends with 1 if anything is not as it says.
    """
    console = Console(highlight=False)
    console.print("[bold]embedmesh demo[/]: gateway, text encoder and cache on this machine")
    folder = starter_model("text", Console(stderr=True))
    try:
        asyncio.run(_Show(console).run(MeshOptions(text_models=(folder,))))
    except MeshError as error:
        raise UserError(str(error)) from None


class _Show:
    """The acts, in order; each builds on what the one before left in the mesh."""

    def __init__(self, console: Console) -> None:
        self._console = console
        table = (resources.files("embedmesh_cli.demo") / "wordnet.tsv").read_text(encoding="utf-8")
        self._words, self._glosses = zip(*(line.split("\t") for line in table.splitlines()), strict=True)

    async def run(self, options: MeshOptions) -> None:
        started = time.monotonic()
        async with Mesh(options) as mesh:
            ready = time.monotonic() - started
            pids = list(mesh.pids.values())
            async with AsyncClient(mesh.address) as client:
                (model,) = await client.list_models()
                self._say(f"  {model.name} ({model.dimensions} dimensions) at {mesh.address}, ready in {ready:.1f} s")
                for role in mesh.roles:
                    self._say(f"  {role.name:8} pid {role.process.pid:<8} {role.grpc}")
                computed, seconds = await self._embed(mesh, client)
                await self._search(client, computed)
                await self._again(mesh, client, computed, seconds)
                pids += await self._survive(mesh, client, computed)
                await self._one_bad_input(client)
                self._metrics(mesh)
        for pid in pids:
            _require(not _alive(pid), f"process {pid} is still there")
        self._say(
            f"\nAll as it should be, {time.monotonic() - started:.0f} s, no process left. Next: {command_name()} up"
        )

    async def _embed(self, mesh: Mesh, client: AsyncClient) -> tuple[NDArray[np.float32], float]:
        self._act(f"Embed {len(self._glosses):,} definitions from WordNet")
        results, seconds = await self._pass(client)
        _require(not any(result.cached for result in results), "a vector came from a cache that was empty")
        vectors = _matrix(results)
        units = sum(result.input_units for result in results)
        encoder = _read(mesh.role("text").http)
        padding = _value(encoder, "embedmesh_batch_units_total", kind="padding")
        real = _value(encoder, "embedmesh_batch_units_total", kind="real")
        self._say(
            f"  {len(vectors):,} vectors in {seconds:.1f} s: {len(vectors) / seconds:,.0f} texts/s, "
            f"{units / seconds:,.0f} tokens/s, {padding / (padding + real):.0%} padding"
        )
        return vectors, seconds

    async def _search(self, client: AsyncClient, vectors: NDArray[np.float32]) -> None:
        self._act("Search them by meaning: no question shares a word with its answer")
        questions = (await client.embed(list(_QUESTIONS), role="query")).vectors
        # Vectors have length 1, so the product is the cosine.
        for (question, expected), scores in zip(_QUESTIONS.items(), questions @ vectors.T, strict=True):
            best = np.argsort(-scores)[:3]
            self._say(f"  {question}?" if question.startswith("wh") else f"  {question}")
            for i in best:
                self._say(f"    {scores[i]:.2f}  {self._words[i]}: {self._glosses[i]}")
            _require(self._words[best[0]] == expected, f"{question!r} should have found {expected!r}")
            shared = _content(question) & _content(f"{self._words[best[0]]} {self._glosses[best[0]]}")
            _require(not shared, f"{question!r} shares {shared} with its answer")

    async def _again(self, mesh: Mesh, client: AsyncClient, computed: NDArray[np.float32], seconds: float) -> None:
        self._act("Embed the same again: nothing is computed twice")
        calls = _encoder_calls(mesh)
        results, again = await self._pass(client)
        _require(all(result.cached for result in results), "a vector was computed again")
        _require(np.array_equal(_matrix(results), computed), "a cached vector differs from the computed one")
        _require(_encoder_calls(mesh) == calls, "the encoder was called")
        self._say(
            f"  {len(results):,} identical vectors in {again:.2f} s, {seconds / again:,.0f} times as fast; "
            f"encoder calls {calls:.0f} -> {_encoder_calls(mesh):.0f}"
        )

    async def _survive(self, mesh: Mesh, client: AsyncClient, computed: NDArray[np.float32]) -> list[int]:
        self._act("Kill the gateway with -9: it comes back, and reads the vectors from Redis")
        calls, process = _encoder_calls(mesh), mesh.role("gateway").process
        # Vectors are written behind the answers.
        with redis.Redis.from_url(mesh.role("redis").grpc) as store:
            await _until(lambda: store.dbsize() >= len(computed), "the vectors did not reach Redis")
        killed = process.pid or 0
        started = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        await _until(lambda: process.state == "serving" and process.pid != killed, "the gateway did not come back")
        back = time.monotonic() - started
        results, again = await self._pass(client)
        _require(np.array_equal(_matrix(results), computed), "a vector from Redis differs from the computed one")
        hits = _value(_read(mesh.http_address), "embedmesh_cache_lookups_total", tier="redis", outcome="hit")
        _require(hits == len(computed), f"{hits:.0f} of {len(computed)} vectors came from Redis")
        _require(_encoder_calls(mesh) == calls, "the encoder was called")
        self._say(
            f"  back in {back:.1f} s, same port; {hits:,.0f} vectors in {again:.2f} s; "
            f"encoder calls {calls:.0f} -> {_encoder_calls(mesh):.0f}"
        )
        return [process.pid or 0]

    async def _one_bad_input(self, client: AsyncClient) -> None:
        self._act("One bad input hurts only itself")
        long = "All work and no play makes Jack a dull boy. " * 60
        response = await client.embed(["a fine text", "x" * 2_000_000, long])
        fine, bad, cut = response.results
        _require(fine.error is None and not fine.truncated, "the good input did not get its vector")
        _require(bad.error is not None and bad.error.reason == "INPUT_TOO_LARGE", "the huge input was not refused")
        _require(cut.truncated and cut.original_units > cut.input_units, "the long input was not marked as truncated")
        self._say(f"  [0] vector of {fine.vector.shape[0]}, {fine.input_units} tokens")
        self._say(f"  [1] {bad.error.reason}: {bad.error.message}" if bad.error else "")
        self._say(
            f"  [2] vector of {cut.vector.shape[0]}, truncated: read {cut.input_units} of {cut.original_units} tokens"
        )

    def _metrics(self, mesh: Mesh) -> None:
        self._act("What Prometheus sees (gateway since its restart, encoder since the start)")
        gateway, encoder = _read(mesh.http_address), _read(mesh.role("text").http)
        for samples, name in (
            (gateway, "embedmesh_cache_lookups_total"),
            (gateway, "embedmesh_gateway_inputs_total"),
            (encoder, "embedmesh_batch_inputs_count"),
            (encoder, "embedmesh_encoder_inputs_total"),
            (encoder, "embedmesh_truncated_inputs_total"),
        ):
            for (sample, labels), value in sorted(samples.items()):
                if sample == name and value and ("tier", "inflight") not in labels:
                    shown = ",".join(f'{key}="{text}"' for key, text in labels)
                    self._say(f"  {sample}{{{shown}}} {value:.0f}")

    async def _pass(self, client: AsyncClient) -> tuple[list[EmbedResult], float]:
        """Embed all definitions as a stream; the results in order, and the seconds."""
        bar = Progress(
            TextColumn("  embedding"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        started = time.monotonic()
        with bar:
            task = bar.add_task("", total=len(self._glosses))
            results = []
            async for result in client.embed_stream(self._glosses):
                results.append(result)
                bar.advance(task)
        return results, time.monotonic() - started

    def _act(self, title: str) -> None:
        self._console.print(f"\n[bold]{title}[/]")

    def _say(self, line: str) -> None:
        """Print one line; on a terminal it is cut at the edge."""
        if self._console.is_terminal:
            self._console.print(line, markup=False, no_wrap=True, overflow="ellipsis")
        else:
            self._console.print(line, markup=False, soft_wrap=True)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(f"the demo did not go as it should: {otherwise}.")


async def _until(condition: object, otherwise: str) -> None:
    end = time.monotonic() + _WAIT_SECONDS
    while not condition():  # type: ignore[operator]
        _require(time.monotonic() < end, otherwise)
        await asyncio.sleep(0.02)


def _matrix(results: Iterable[EmbedResult]) -> NDArray[np.float32]:
    return np.stack([result.vector for result in results])


def _content(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", _SMALL_WORDS.sub("", text.lower())))


_Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _read(http_address: str) -> _Samples:
    """Scrape /metrics, as Prometheus would."""
    with urllib.request.urlopen(f"http://{http_address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def _value(samples: _Samples, name: str, **labels: str) -> float:
    """Sum of the samples of `name` that carry `labels`."""
    wanted = set(labels.items())
    return sum(value for (sample, has), value in samples.items() if sample == name and wanted <= set(has))


def _encoder_calls(mesh: Mesh) -> float:
    return _value(_read(mesh.role("text").http), "embedmesh_requests_total", method="EmbedText")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
