"""What `embedmesh demo` shows. It checks whatever it says: the first thing that is not so ends it with status 1."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import redis
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from embedmesh import AsyncClient, Audio, EmbedResult, Image
from embedmesh.inputs import Input
from embedmesh_cli.console import USAGE, UserError, command_name, starter_model
from embedmesh_cli.demo import material
from embedmesh_cli.demo.material import Clip, Definition, Picture
from embedmesh_cli.demo.metrics import read, value
from embedmesh_cli.demo.page import Answer, Hit, Kind, render
from embedmesh_cli.mesh import MODALITIES, Mesh, MeshError, MeshOptions

__all__ = ["demo"]

# What is typed, and a picture that must be among the first five; "" promises nothing: what small models do not get.
_TYPED: Final = {
    "breakfast in bed": "pancakes",
    "rock and roll": "guitar",
    "under the sea": "shark",
    "outer space": "astronaut",
    "winter is coming": "snowman",
    "send a letter": "envelope",
    "my boyfriend left me": "broken heart",
    "will you marry me": "ring",
    "a pet that barks": "",
}
# What is spoken, where its picture must be among the first five. Many clips are beyond the small models.
_SPOKEN: Final = ("alarm clock", "butterfly", "crown", "fire engine", "guitar", "full moon")
# What is shown, and a word whose definition must be among the first five.
_SHOWN: Final = {
    "shopping cart": "grocery store",
    "trophy": "champion",
    "train": "railway station",
    "face with tears of joy": "exhilaration",
}
# What is asked, and the word whose definition must come first. None shares a word with its answer.
_QUESTIONS: Final = {
    "what to wear on a freezing day": "greatcoat",
    "where to buy bread and milk": "grocery store",
    "a device to look at very tiny things": "microscope",
    "she got the job of her dreams": "fulfillment",
}
_FIRST: Final = 5
# Of the pictures, by the split that `services/starter/` trains with.
_HELD_OUT: Final = 48
_SMALL_WORDS: Final = re.compile(
    r"\b(?:an?|and|at|be|for|from|her|in|is|it|of|on|or|she|the|to|very|what|where|with)\b"
)
_CALLS: Final = {"text": "EmbedText", "image": "EmbedImage", "audio": "EmbedAudio"}
_WAIT_SECONDS: Final = 30.0
_PAGE: Final = Path("demo-output/index.html")


def demo(
    *,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Write the page with the pictures here.  [default: {_PAGE}]"),
    ] = None,
) -> None:
    """Show a mesh at work: words find pictures, spoken words find pictures, pictures find words.

    Starts gateway, three encoders and a cache on free ports of this machine, with the starter models (the one for
    text is made on first use). Then nothing is computed twice, the gateway survives a kill -9, and bad inputs hurt
    only themselves. Needs no other program, leaves no process behind, and ends with 1 if anything is not as it says.
    """
    console = Console(highlight=False)
    console.print("[bold]embedmesh demo[/]: one address for words, pictures and sounds, all on this machine")
    written = _writable(html)
    text, image, audio = ((starter_model(modality, Console(stderr=True)),) for modality in MODALITIES)
    try:
        # A busy machine may keep the gateway from Redis for a moment; that each vector is there must not hang on it.
        gateway = {"cache_timeout_ms": 5000}
        options = MeshOptions(text_models=text, image_models=image, audio_models=audio, gateway=gateway)
        shown = asyncio.run(_Show(console).run(options))
    except MeshError as error:
        raise UserError(str(error)) from None
    if written:
        written.write_text(shown, encoding="utf-8")
        console.print(f"To look at and listen to, in a browser: {written.resolve()}", soft_wrap=True)
    console.print(f"Next: {command_name()} up", soft_wrap=True)


def _writable(html: Path | None) -> Path | None:
    """See at once whether the page can be written; unless it was asked for, no page is better than no demo."""
    page = html or _PAGE
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.touch()
    except OSError as error:
        if html:
            raise UserError(f"--html {html}: {error.strerror}.", USAGE) from None
        Console(stderr=True).print(f"No page is written: {page}: {error.strerror}; --html FILE names another place.")
        return None
    return page


class _Show:
    """The acts, in order; each builds on what the one before left in the mesh."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._material = material.load()
        self._inputs: list[Input] = [
            *(definition.gloss for definition in self._material.definitions),
            *(Image(picture.content) for picture in self._material.pictures),
            *(Audio(clip.content) for clip in self._material.clips),
        ]
        self._answers: list[Answer] = []
        self._facts: list[str] = []
        self._tallies: dict[Kind, str] = {}

    async def run(self, options: MeshOptions) -> str:
        """Play all acts; gives the page that shows their answers."""
        started = time.monotonic()
        async with Mesh(options) as mesh:
            ready = time.monotonic() - started
            pids = list(mesh.pids.values())
            async with AsyncClient(mesh.address) as client:
                await self._introduce(mesh, client, ready)
                vectors, seconds = await self._embed(mesh, client)
                await self._type(client)
                self._speak()
                self._show()
                await self._ask(client)
                await self._again(mesh, client, vectors, seconds)
                pids += await self._survive(mesh, client, vectors)
                await self._bad_inputs(client)
                self._count(mesh)
        for pid in pids:
            _require(not _alive(pid), f"process {pid} is still there")
        self._say(f"\nAll as it should be, {time.monotonic() - started:.0f} s, no process left.")
        return render(self._answers, self._material.pictures, self._pictures, facts=self._facts, tallies=self._tallies)

    async def _introduce(self, mesh: Mesh, client: AsyncClient, ready: float) -> None:
        models = {info.modality: info for info in await client.list_models()}
        _require(set(models) == set(MODALITIES), f"the mesh serves {sorted(models)}")
        _require(len({info.space for info in models.values()}) == 1, "the models do not share a space")
        for role in mesh.roles:
            what = f"{models[role.name].name}, {models[role.name].dimensions} numbers" if role.name in models else ""
            self._say(f"  {role.name:8} pid {role.process.pid:<8} {role.grpc:18}{what}".rstrip())
        self._say(f"  ready in {ready:.1f} s")
        self._facts.append(f"gateway, three encoders and cache ready in {ready:.1f} s")

    async def _embed(self, mesh: Mesh, client: AsyncClient) -> tuple[NDArray[np.float32], float]:
        texts, pictures, clips = map(len, (self._material.definitions, self._material.pictures, self._material.clips))
        self._act(f"Embed {texts:,} definitions from WordNet, {pictures} emoji and {clips} spoken words")
        parts, seconds = [], []
        for noun, start, end in (
            ("texts", 0, texts),
            ("pictures", texts, texts + pictures),
            ("sounds", texts + pictures, len(self._inputs)),
        ):
            results, took = await self._pass(client, self._inputs[start:end])
            _require(not any(result.cached for result in results), "a vector came from a cache that was empty")
            parts.append(_matrix(results))
            seconds.append(took)
            self._say(f"  {end - start:5,} {noun:9}in {took:.2f} s: {(end - start) / took:,.0f} a second")
            self._facts.append(f"{end - start:,} {noun} in {took:.2f} s")
        self._definitions, self._pictures, self._clips = parts
        encoder = read(_http(mesh, "text"))
        padding = value(encoder, "embedmesh_batch_units_total", kind="padding")
        real = value(encoder, "embedmesh_batch_units_total", kind="real")
        self._say(f"  {padding / (padding + real):.0%} padding among the tokens that the text encoder computed")
        return np.concatenate(parts), sum(seconds)

    async def _type(self, client: AsyncClient) -> None:
        self._act("Type words, see pictures: the image encoder knows nothing of a picture but its pixels")
        queries = (await client.embed(list(_TYPED), role="query")).vectors
        for (words, expected), vector in zip(_TYPED.items(), queries, strict=True):
            hits = self._best_pictures(vector)
            note = "" if expected else "small models do not get everything"
            self._say(f"  {words:28}{_in_line(hits)}{f' ({note})' if note else ''}")
            self._answers.append(Answer("typed", words, vector, hits, note))
            _require_among(hits, expected, words)
        results, _ = await self._pass(client, [picture.name for picture in self._material.pictures])
        self._names = _matrix(results)
        places = self._places(self._material.pictures, self._names, self._pictures)
        tally = f"Of all {len(places)} names, {_tally(places, 'picture')}"
        self._tell("typed", f"{tally}; {_HELD_OUT} of the pictures were kept out of training.")

    def _speak(self) -> None:
        self._act("Say words, see pictures: from sound to picture, with no text on the way")
        pictures, clips = self._material.pictures, self._material.clips
        for clip, vector in zip(clips, self._clips, strict=True):
            if clip.name in _SPOKEN:
                hits = self._best_pictures(vector)
                heard = pictures[int(np.argmax(self._names @ vector))].name
                self._say(f"  {f'{clip.name} ({clip.voice.split()[0]})':28}{_in_line(hits)}")
                self._answers.append(Answer("spoken", clip, vector, hits, f"nearest name: {heard}"))
                _require_among(hits, clip.name, f"{clip.name} (spoken)")
        by_picture = _tally(self._places(clips, self._clips, self._pictures), "picture")
        by_name = _tally(self._places(clips, self._clips, self._names), "name")
        self._tell(
            "spoken", f"Of all {len(clips)} clips, {by_picture} of {len(pictures)}; among written names, {by_name}."
        )

    def _show(self) -> None:
        self._act("Show a picture, get words: the nearest of the definitions")
        for picture, vector in zip(self._material.pictures, self._pictures, strict=True):
            if picture.name in _SHOWN:
                hits = _best(vector, self._definitions, self._material.definitions)
                self._say(f"  {picture.name:28}{hits[0].score:.2f} {hits[0].described}")
                self._answers.append(Answer("shown", picture, vector, hits))
                _require_among(hits, _SHOWN[picture.name], f"the picture of {picture.name}")

    async def _ask(self, client: AsyncClient) -> None:
        self._act("Ask for a word by its meaning: no question shares a word with its answer")
        queries = (await client.embed(list(_QUESTIONS), role="query")).vectors
        for (question, expected), vector in zip(_QUESTIONS.items(), queries, strict=True):
            hits = _best(vector, self._definitions, self._material.definitions)
            self._say(f"  {question:40}{hits[0].score:.2f} {hits[0].described}")
            self._answers.append(Answer("asked", question, vector, hits))
            _require(hits[0].item.name == expected, f"{question!r} should have found {expected!r}")
            shared = _content(question) & _content(hits[0].described)
            _require(not shared, f"{question!r} shares {shared} with its answer")

    async def _again(self, mesh: Mesh, client: AsyncClient, computed: NDArray[np.float32], seconds: float) -> None:
        self._act("Embed everything again, in one stream: nothing is computed twice")
        calls = _encoder_calls(mesh)
        results, again = await self._pass(client, self._inputs)
        _require(all(result.cached for result in results), "a vector was computed again")
        _require(np.array_equal(_matrix(results), computed), "a cached vector differs from the computed one")
        _require(_encoder_calls(mesh) == calls, "an encoder was called")
        self._say(
            f"  {len(results):,} identical vectors in {again:.2f} s, {seconds / again:,.0f} times as fast; "
            f"encoder calls {calls:.0f} -> {_encoder_calls(mesh):.0f}"
        )
        self._facts.append(f"all of them again, from the cache, in {again:.2f} s")

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
        results, again = await self._pass(client, self._inputs)
        _require(np.array_equal(_matrix(results), computed), "a vector from Redis differs from the computed one")
        hits = value(read(mesh.http_address), "embedmesh_cache_lookups_total", tier="redis", outcome="hit")
        _require(hits == len(computed), f"{hits:.0f} of {len(computed)} vectors came from Redis")
        _require(_encoder_calls(mesh) == calls, "an encoder was called")
        self._say(
            f"  back in {back:.1f} s, same port; {hits:,.0f} vectors in {again:.2f} s; "
            f"encoder calls {calls:.0f} -> {_encoder_calls(mesh):.0f}"
        )
        return [process.pid or 0]

    async def _bad_inputs(self, client: AsyncClient) -> None:
        self._act("Bad inputs hurt only themselves")
        long = "All work and no play makes Jack a dull boy. " * 60
        half = Image(self._material.pictures[0].content[:200])
        response = await client.embed(["a fine text", half, Audio(b"no sound"), "x" * 2_000_000, long])
        fine, picture, sound, huge, cut = response.results
        _require(fine.error is None and not fine.truncated, "the good input did not get its vector")
        for bad, reason in ((picture, "UNDECODABLE_INPUT"), (sound, "UNDECODABLE_INPUT"), (huge, "INPUT_TOO_LARGE")):
            _require(bad.error is not None and bad.error.reason == reason, f"input {bad.index} was not refused")
        _require(cut.truncated and cut.original_units > cut.input_units, "the long input was not marked as truncated")
        for result in response.results:
            if result.error:
                self._say(f"  [{result.index}] {result.error.reason}: {result.error.message}")
            else:
                read_of = f", truncated: read {result.input_units} of {result.original_units} tokens"
                self._say(f"  [{result.index}] vector of {result.vector.shape[0]}{read_of if result.truncated else ''}")

    def _count(self, mesh: Mesh) -> None:
        self._act("What Prometheus sees (gateway since its restart, encoders since the start)")
        gateway = read(mesh.http_address)
        for samples, name in (
            (gateway, "embedmesh_cache_lookups_total"),
            (gateway, "embedmesh_gateway_inputs_total"),
            *((read(_http(mesh, modality)), "embedmesh_batch_inputs_count") for modality in MODALITIES),
        ):
            for (sample, labels), count in sorted(samples.items()):
                if sample == name and count and ("tier", "inflight") not in labels:
                    shown = ",".join(f'{key}="{text}"' for key, text in labels)
                    self._say(f"  {sample}{{{shown}}} {count:.0f}")

    async def _pass(self, client: AsyncClient, inputs: Sequence[Input]) -> tuple[list[EmbedResult], float]:
        """Embed as a stream; the results in order, and the seconds."""
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
            task = bar.add_task("", total=len(inputs))
            results = []
            async for result in client.embed_stream(inputs):
                results.append(result)
                bar.advance(task)
        return results, time.monotonic() - started

    def _best_pictures(self, vector: NDArray[np.float32]) -> list[Hit]:
        return _best(vector, self._pictures, self._material.pictures)

    def _places(
        self, queries: Sequence[Picture | Clip], vectors: NDArray[np.float32], among: NDArray[np.float32]
    ) -> list[int]:
        """Give the place, from 1, that each query's own picture takes; `among` has a row for each picture."""
        row = {picture.name: i for i, picture in enumerate(self._material.pictures)}
        scores = vectors @ among.T
        return [int(np.sum(s > s[row[query.name]])) + 1 for query, s in zip(queries, scores, strict=True)]

    def _tell(self, kind: Kind, tally: str) -> None:
        self._tallies[kind] = tally
        if self._console.is_terminal:
            self._console.print(Padding(Text(tally), (0, 0, 0, 2)))  # a sentence, not cut at the edge
        else:
            self._say(f"  {tally}")

    def _act(self, title: str) -> None:
        self._console.print(f"\n[bold]{title}[/]", soft_wrap=True)

    def _say(self, line: str) -> None:
        """Print one line; on a terminal it is cut at the edge."""
        if self._console.is_terminal:
            self._console.print(line, markup=False, no_wrap=True, overflow="ellipsis")
        else:
            self._console.print(line, markup=False, soft_wrap=True)


def _best(vector: NDArray[np.float32], among: NDArray[np.float32], items: Sequence[Picture | Definition]) -> list[Hit]:
    """Give the nearest items, the best first."""
    scores = among @ vector  # vectors have length 1, so the product is the cosine
    return [Hit(float(scores[i]), items[i]) for i in np.argsort(-scores)[:_FIRST]]


def _in_line(hits: Iterable[Hit]) -> str:
    return ", ".join(hit.item.name for hit in hits)


def _tally(places: Sequence[int], what: str) -> str:
    first, among = (sum(place <= most for place in places) for most in (1, _FIRST))
    return f"{first} find their {what} first and {among} among the first five"


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(f"the demo did not go as it should: {otherwise}.")


def _require_among(hits: Sequence[Hit], expected: str, query: str) -> None:
    found = [hit.item.name for hit in hits]
    _require(expected in [*found, ""], f"{query!r} found {', '.join(found)}, and not {expected!r}")


async def _until(condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + _WAIT_SECONDS
    while not condition():
        _require(time.monotonic() < end, otherwise)
        await asyncio.sleep(0.02)


def _matrix(results: Iterable[EmbedResult]) -> NDArray[np.float32]:
    return np.stack([result.vector for result in results])


def _content(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", _SMALL_WORDS.sub("", text.lower())))


def _http(mesh: Mesh, role: str) -> str:
    return mesh.role(role).http


def _encoder_calls(mesh: Mesh) -> float:
    return sum(value(read(_http(mesh, role)), "embedmesh_requests_total", method=_CALLS[role]) for role in _CALLS)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
