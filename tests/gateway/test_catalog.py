from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedmesh.v1 import catalog_pb2

NEW = {"revision": "r1", "space": "shared", "modality": "text", "family": "fake"}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health(mesh: Any, service: str = "") -> Any:
    stub: Any = health_pb2_grpc.HealthStub(mesh.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)).status


async def listed(mesh: Any) -> dict[str, bool]:
    response = await mesh.catalog.ListModels(catalog_pb2.ListModelsRequest(), timeout=20)
    return {info.model.name: info.ready for info in response.models}


async def until(mesh: Any, models: dict[str, bool]) -> None:
    async with asyncio.timeout(20):
        while await listed(mesh) != models:
            await asyncio.sleep(0.01)


async def test_the_gateway_lists_the_models_of_all_its_encoders(open_mesh: Any, make_encoder: Any) -> None:
    encoders = {modality: [make_encoder(modality)] for modality in ("text", "image")}
    async with open_mesh(encoders) as mesh:
        assert await listed(mesh) == {"fake-text": True, "fake-image": True}
        response = await mesh.catalog.ListModels(catalog_pb2.ListModelsRequest(), timeout=20)
        assert list(response.models) == [encoders["text"][0].info, encoders["image"][0].info]


async def test_ready_with_the_first_ready_model_and_ever_after(open_mesh: Any, make_encoder: Any) -> None:
    encoder, late = make_encoder("text", ready=False), make_encoder("image")
    late.address = "127.0.0.1:1"
    async with open_mesh({"text": [encoder], "image": [late]}, ready=False, catalog_refresh_seconds=0.05) as mesh:
        await until(mesh, {"fake-text": False})
        assert await health(mesh) == NOT_SERVING
        assert await health(mesh, "embedmesh.v1.Gateway") == NOT_SERVING
        assert await health(mesh, "embedmesh.v1.ModelCatalog") == SERVING
        encoder.info.ready = True
        await until(mesh, {"fake-text": True})
        async with asyncio.timeout(20):
            while await health(mesh) != SERVING:
                await asyncio.sleep(0.01)
        await encoder.stop()
        await until(mesh, {"fake-text": False})  # kept, as not ready
        assert await health(mesh, "embedmesh.v1.Gateway") == SERVING
        await encoder.start(encoder.address)
        await until(mesh, {"fake-text": True})


async def test_a_request_finds_an_encoder_that_came_a_moment_ago(
    open_mesh: Any, encoder: Any, make_encoder: Any
) -> None:
    address = encoder.address
    await encoder.stop()
    async with open_mesh({"text": [encoder]}, ready=False, catalog_refresh_seconds=1000) as mesh:
        await encoder.start(address)
        async with asyncio.timeout(20):
            while True:
                try:
                    response = await mesh.embed(["a"])
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.01)
                else:
                    break
        assert response.results[0].HasField("embedding")


async def test_a_new_model_is_looked_for_when_asked_for(open_mesh: Any, encoder: Any, settle: Any) -> None:
    async with open_mesh({"text": [encoder]}, catalog_refresh_seconds=1000) as mesh:
        encoder.info.model.name = "new"
        async with asyncio.timeout(20):
            while True:
                try:
                    response = await mesh.embed(["a"], model="new")
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)
                else:
                    break
        assert response.models[0].name == "new"
        labels = {"revision": "r1", "space": "shared", "modality": "text", "family": "fake"}
        assert mesh.metric("embedmesh_gateway_model_info", model="new", **labels) == 1
        assert mesh.metric("embedmesh_gateway_model_info", model="fake-text", **labels) == 0


async def test_nothing_is_shown_of_a_model_that_is_gone(open_mesh: Any, encoder: Any, settle: Any) -> None:
    async with open_mesh({"text": [encoder]}, catalog_refresh_seconds=0.05) as mesh:
        await mesh.embed(["x" * 1000])
        assert mesh.metric("embedmesh_gateway_truncated_inputs_total", model="fake-text") == 1
        encoder.info.model.name = "new"
        await settle(lambda: mesh.metric("embedmesh_gateway_model_info", model="new", **NEW) == 1)
        assert not [s for metric in mesh.registry.collect() for s in metric.samples if "fake-text" in s.labels.values()]


async def test_revisions_side_by_side_have_entries_of_their_own(open_mesh: Any, encoder: Any) -> None:
    old = catalog_pb2.ModelInfo()
    old.CopyFrom(encoder.info)
    old.model.revision, old.is_default = "r0", False

    async def both(request: Any, context: Any) -> catalog_pb2.ListModelsResponse:
        del request, context
        return catalog_pb2.ListModelsResponse(models=[encoder.info, old])

    await encoder.stop()
    encoder.ListModels = both
    await encoder.start(encoder.address)
    async with open_mesh({"text": [encoder]}) as mesh:
        assert (await mesh.embed(["a"], model="fake-text")).models[0].revision == "r1"
        # What the other revision made is no answer here; this encoder says r1 to everything.
        pinned = await mesh.embed(["a"], model="fake-text@r0")
        assert "instead of the one asked for" in pinned.results[0].error.message
        assert [call.model for call in encoder.calls] == ["fake-text", "fake-text@r0"]
        assert (await mesh.embed(["a"], model="fake-text@r1")).results[0].cached


async def test_of_several_models_the_default_answers(open_mesh: Any, encoder: Any) -> None:
    second = catalog_pb2.ModelInfo()
    second.CopyFrom(encoder.info)
    second.model.name, second.is_default = "second", False

    async def both(request: Any, context: Any) -> catalog_pb2.ListModelsResponse:
        del request, context
        return catalog_pb2.ListModelsResponse(models=[second, encoder.info])

    await encoder.stop()
    encoder.ListModels = both
    await encoder.start(encoder.address)
    async with open_mesh({"text": [encoder]}) as mesh:
        await mesh.embed(["a"], model="fake")
        await mesh.embed(["b"], model="second")
        await mesh.embed(["c"])
        assert [call.model for call in encoder.calls] == ["fake-text", "second", ""]
