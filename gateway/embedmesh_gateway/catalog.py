"""Which models the encoders offer, kept fresh, and which of them a request means."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from embedmesh.errors import EmbedMeshError, EncoderUnreachable, ModelNotFound
from embedmesh.v1 import catalog_pb2
from embedmesh_gateway.upstream import Upstream
from embedmesh_server.metrics import GatewayMetrics

__all__ = ["Catalog"]

_log = logging.getLogger(__name__)

# While a modality has no ready model it is asked this often.
_EAGER_SECONDS: Final = 0.25
_CALL_SECONDS: Final = 2.0
# Requests for unknown models may each cause a look, but no more often than this.
_ON_DEMAND_SECONDS: Final = 1.0


class Catalog:
    """The models of every modality, as the encoders last said.

    An encoder that goes away keeps its entries (shown as not ready), so that what is cached
    can still be answered. Replicas behind one target are taken to offer the same models; while a
    rolling upgrade lasts, the catalog shows those of the replica asked last.

    Args:
        upstreams: By modality.
        refresh_seconds: How often encoders are asked once they have answered.
        metrics: Shows one line per model.
        on_ready: Called once, when the first model is ready.
    """

    def __init__(
        self,
        upstreams: Mapping[str, Upstream],
        *,
        refresh_seconds: float,
        metrics: GatewayMetrics,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._upstreams = upstreams
        self._refresh_seconds = refresh_seconds
        self._metrics = metrics
        self._on_ready = on_ready
        self._was_ready = False
        self._models: dict[str, Sequence[catalog_pb2.ModelInfo]] = dict.fromkeys(upstreams, ())
        self._errors: dict[str, EmbedMeshError | None] = dict.fromkeys(upstreams)
        self._asked_at: dict[str, float] = dict.fromkeys(upstreams, -math.inf)
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._pollers: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        shown = " ".join(
            f"{modality}={','.join(info.model.name for info in models) or '-'}"
            for modality, models in self._models.items()
        )
        return f"<Catalog {shown}>"

    def start(self) -> None:
        """Begin to ask the encoders, until `aclose`."""
        self._pollers = [asyncio.create_task(self._poll(modality)) for modality in self._upstreams]

    async def aclose(self) -> None:
        """Stop asking."""
        tasks = (*self._pollers, *self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def models(self) -> list[catalog_pb2.ModelInfo]:
        """Give all models; those whose encoder does not answer now are not ready."""
        listed: list[catalog_pb2.ModelInfo] = []
        for modality, models in self._models.items():
            for info in models:
                shown = catalog_pb2.ModelInfo()
                shown.CopyFrom(info)
                shown.ready = info.ready and self._errors[modality] is None
                listed.append(shown)
        return listed

    async def resolve(self, modality: str, wanted: str, deadline: float) -> catalog_pb2.ModelInfo:
        """Find the model that `wanted` means for one modality.

        Args:
            modality: "text", "image" or "audio".
            wanted: Name of a model, "name@revision", name of a family, or "" for the default.
            deadline: Until when the encoder may be asked, in seconds of the running loop's clock.

        Raises:
            ModelNotFound: There is no such model.
            EmbedMeshError: No encoder has ever answered; what went wrong the last time.
        """
        if modality not in self._upstreams:
            raise ModelNotFound(f"this mesh embeds no {modality}", field="model", metadata={"model": wanted})
        info = self._find(modality, wanted)
        now = asyncio.get_running_loop().time()
        if info is None and (modality in self._asking or now - self._asked_at[modality] >= _ON_DEMAND_SECONDS):
            # Shielded by `wait`: a caller that leaves does not stop the look for others.
            await asyncio.wait({self.refresh(modality)}, timeout=max(0.0, min(deadline - now, _CALL_SECONDS)))
            info = self._find(modality, wanted)
        if info is not None:
            return info
        if not self._models[modality]:
            raise self._errors[modality] or EncoderUnreachable(
                f"no {modality} encoder has answered yet", retry_after=1.0, metadata={"modality": modality}
            )
        raise ModelNotFound(f"no {modality} model {wanted!r}", field="model", metadata={"model": wanted})

    def _find(self, modality: str, wanted: str) -> catalog_pb2.ModelInfo | None:
        name, _, revision = wanted.partition("@")
        models = self._models[modality]
        fitting = [
            info for info in models if info.model.name == name and (not revision or info.model.revision == revision)
        ]
        if not wanted:
            fitting = list(models)
        elif not fitting:
            fitting = [info for info in models if info.family == wanted]
        # Of several, the default; otherwise the first.
        return next((info for info in fitting if info.is_default), fitting[0] if fitting else None)

    def refresh(self, modality: str) -> asyncio.Task[None]:
        """Ask the encoders of one modality soon; calls while asking share the answer."""
        task = self._asking.get(modality)
        if task is None:
            task = self._asking[modality] = asyncio.create_task(self._ask(modality))
            task.add_done_callback(lambda _: self._asking.pop(modality, None))
        return task

    async def _ask(self, modality: str) -> None:
        self._asked_at[modality] = asyncio.get_running_loop().time()
        try:
            models = await self._upstreams[modality].list_models(within=_CALL_SECONDS)
        except EmbedMeshError as error:
            if self._errors[modality] is None:
                why = "; ".join(getattr(error, "__notes__", ()))
                _log.warning("%s encoders do not answer", modality, extra={"detail": error.message, "why": why})
            self._errors[modality] = error
            return
        self._errors[modality] = None
        if models != self._models[modality]:
            before = {info.model.name for info in self._models[modality]}
            self._models[modality] = models
            self._show(before)
            _log.info("%s models", modality, extra={"models": [f"{m.model.name}@{m.model.revision}" for m in models]})
        if not self._was_ready and any(info.ready for info in models):
            self._was_ready = True
            self._on_ready()

    def _show(self, before: set[str]) -> None:
        """Show the models of now, and nothing more of those `before` that are gone."""
        self._metrics.model_info.clear()
        for name in before - {info.model.name for models in self._models.values() for info in models}:
            self._metrics.truncated_inputs.remove_by_labels({"model": name})
        for modality, models in self._models.items():
            for info in models:
                ref = info.model
                self._metrics.model_info.labels(ref.name, ref.revision, ref.space, modality, info.family).set(1)

    async def _poll(self, modality: str) -> None:
        while True:
            await asyncio.wait({self.refresh(modality)})
            fine = self._errors[modality] is None and any(info.ready for info in self._models[modality])
            await asyncio.sleep(self._refresh_seconds if fine else min(_EAGER_SECONDS, self._refresh_seconds))
