"""The reference library in process beside the mesh: what transformers makes of the same weights on the same device.

On a GPU it computes in float16, as its users do there; on a CPU in float32. Batches are sorted over all texts and
filled to a budget of padded tokens, so that it is the library's best and not what a first loop would give.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh_cli.bench.bound import Pass, until_over
from embedmesh_cli.bench.load import Closed
from embedmesh_cli.bench.material import requests
from embedmesh_cli.bench.report import Section, speed_table
from embedmesh_cli.bench.session import BOUND, Session, Skipped
from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.starter import StarterError, cache_folder
from embedmesh_cli.starter.minilm import original_model

__all__ = ["library"]

# Padded tokens of a batch: enough to fill either device.
_BUDGET: Final = {"cpu": 1024, "cuda": 32_768}
_LONGEST: Final = 256
# float16 keeps 11 bits.
_SAME_COSINE: Final = {"cpu": 0.9999, "cuda": 0.999}
_COMPARED: Final = 32
# Callers of so many texts, and single texts: a GPU wants more at a time than a CPU.
_LOADS: Final = ((32, 4), (128, 4), (1, 64))


class _Library:
    """MiniLM in transformers: mean pooling, normalised. Its methods block."""

    def __init__(self, folder: Path) -> None:
        self._torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        self.device = "cuda" if self._torch.cuda.is_available() else "cpu"
        self.dtype = "float16" if self.device == "cuda" else "float32"
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder, dtype=getattr(self._torch, self.dtype))
        self._model = model.to(self.device).eval()
        self.about = f"transformers {transformers.__version__}, torch {self._torch.__version__}, {self._name()}"

    def _name(self) -> str:
        return str(self._torch.cuda.get_device_name()) if self.device == "cuda" else "on the CPU"

    def prepare(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise."""
        ids: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=_LONGEST)["input_ids"]
        return ids

    def batches(self, ids: Sequence[list[int]]) -> list[list[list[int]]]:
        """Like lengths together, within the budget."""
        made: list[list[list[int]]] = []
        for one in sorted(ids, key=len):
            if not made or len(one) * (len(made[-1]) + 1) > _BUDGET[self.device]:
                made.append([])
            made[-1].append(one)
        return made

    def vectors(self, batch: Sequence[list[int]]) -> NDArray[np.float32]:
        """Embed a batch: float32 [n, d], on the host."""
        torch = self._torch
        longest = max(map(len, batch))
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, one in enumerate(batch):
            ids[i, : len(one)] = torch.tensor(one)
            mask[i, : len(one)] = 1
        with torch.inference_mode():
            mask = mask.to(self.device)
            hidden = self._model(input_ids=ids.to(self.device), attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
            rows: NDArray[np.float32] = torch.nn.functional.normalize(pooled, dim=1).float().cpu().numpy()
        return rows

    def best(self, ids: Sequence[list[int]], seconds: float) -> Pass:
        """As fast as it goes for so many seconds."""
        inputs = units = computed = 0
        started, cpu = time.perf_counter(), time.process_time()
        for batch in until_over(self.batches(ids), seconds):
            self.vectors(batch)
            inputs += len(batch)
            units += sum(map(len, batch))
            computed += len(batch) * max(map(len, batch))
        elapsed = time.perf_counter() - started
        return Pass(elapsed, inputs, units, 1 - units / computed, time.process_time() - cpu)


async def library(session: Session) -> Section:
    """Texts by transformers in process, by our model in process, and through the mesh."""
    section = Section("library", "the reference library in process beside the mesh and its bound; nothing cached.")
    if session.options.address:
        raise UserError("library: compares what runs on this machine; leave --address out.", USAGE)
    try:
        original = await asyncio.to_thread(original_model, cache_folder() / "peers", session.tell)
        reference = await asyncio.to_thread(_Library, original)
    except StarterError as error:
        raise UserError(f"{error}.") from None
    except ModuleNotFoundError as error:
        raise Skipped(
            f"{error.name} is not here: `make bench-gpu` installs it, or pip install torch transformers."
        ) from None
    material = session.material("text")
    texts = material.inputs
    section.notes += [material.about(), f"the library: {reference.about}, {reference.dtype}"]
    async with (
        session.mesh("text", redis="none") as target,
        session.bound(target, "text", texts) as bound,
    ):
        section.notes.append(f"ours: {bound.about}")
        ids = await asyncio.to_thread(reference.prepare, texts)
        theirs = await asyncio.to_thread(reference.vectors, ids[:_COMPARED])
        ours = await asyncio.to_thread(
            lambda: np.stack([bound.vectors(bound.prepare([text]))[0] for text in texts[:_COMPARED]])
        )
        worst = float((ours * theirs).sum(1).min())
        if not worst >= _SAME_COSINE[reference.device]:
            raise UserError(f"transformers gives other vectors: cosine {worst:.6f}. It is not compared.")
        section.notes.append(f"least cosine between the two: {worst:.6f}")
        plans = await session.best(bound, texts)
        plans[f"in process: transformers, {reference.dtype}"] = lambda: asyncio.to_thread(
            reference.best, ids, session.options.seconds
        )
        for size, callers in _LOADS:
            payloads = requests("gateway", texts, size)
            plans[f"mesh, {callers} callers of {size}"] = _through(session, target, payloads, callers)
        rows = await session.rounds(plans)
    section.tables.append(speed_table("texts, nothing cached", rows, BOUND))
    section.data["rows"] = {name: [each.as_dict() for each in rounds] for name, rounds in rows.items()}
    return section


def _through(session: Session, target: Any, payloads: Sequence[bytes], callers: int) -> Any:
    return lambda: session.one(target, payloads, Closed(callers))
