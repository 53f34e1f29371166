import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedmesh import errors
from embedmesh.v1 import catalog_pb2, text_pb2
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import decode, dequantize
from embedmesh_encoder.backend.fake import FAIL, NAN, write_model
from embedmesh_encoder.service import Models

OpenHouse = Callable[..., Awaitable[Any]]


async def failure(call: Any) -> errors.EmbedMeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return errors.from_rpc_error(caught.value)


def vector(result: pb.EmbedResult) -> np.ndarray[Any, Any]:
    return dequantize(result.embedding.dense)


async def test_256_inputs_of_which_5_are_bad(open_house: OpenHouse) -> None:
    house = await open_house({"max_input_units": 64}, max_text_bytes=1000)
    request = text_pb2.EmbedTextRequest(truncation=pb.TRUNCATION_REFUSE)
    for i in range(256):
        request.inputs.add(text=f"text {i}")
    request.inputs[3].text = f"an input on which the model fails: {FAIL}"
    request.inputs[77].text = f"{NAN}"
    request.inputs[100].text = "x" * 1001
    request.inputs[200].text = "x" * 63
    request.inputs[255].role = 99  # type: ignore[assignment]
    response = await house.text.EmbedText(request)
    assert len(response.results) == 256
    bad = {i: errors.from_status(r.error) for i, r in enumerate(response.results) if r.HasField("error")}
    assert {i: (error.reason, error.field) for i, error in bad.items()} == {
        3: ("INFERENCE_FAILED", ""),
        77: ("INFERENCE_FAILED", ""),
        100: ("INPUT_TOO_LARGE", "inputs[100].text"),
        200: ("INPUT_TOO_LARGE", "inputs[200].text"),
        255: ("INVALID_REQUEST", "inputs[255].role"),
    }
    assert bad[100].metadata == {"limit": "1000", "actual": "1001", "unit": "bytes"}
    assert bad[200].metadata == {"limit": "64", "actual": "65", "unit": "tokens"}
    assert all(len(bad[i].metadata["request_id"]) == 32 for i in (3, 77))
    assert "fake model" not in bad[3].message
    good = [r for i, r in enumerate(response.results) if i not in bad]
    assert len(good) == 251
    for result in good:
        assert np.linalg.norm(vector(result)) == pytest.approx(1, abs=1e-6)
        assert result.model_index == 0
        assert not result.cached
    assert response.usage.failed_inputs == 5
    assert response.usage.input_units == sum(result.input_units for result in good)
    assert response.usage.cached_inputs == 0
    # The guilty change nothing for their neighbours.
    alone = await house.embed("text 4")
    np.testing.assert_array_equal(vector(alone.results[0]), vector(response.results[4]))


@pytest.mark.parametrize("poison", [FAIL, NAN])
async def test_poison_in_a_shared_batch_fails_only_its_own_call(open_house: OpenHouse, poison: str) -> None:
    house = await open_house()
    first = await house.block()
    calls = [house.embed(text) for text in ("a", poison, "b")]
    await house.until(lambda: house.sample("queue_inputs", priority="interactive") == 3)
    house.gate.open()
    await first
    a, bad, b = await asyncio.gather(*calls)
    assert house.gate.batches[1] == 3  # they did share one
    assert a.results[0].HasField("embedding")
    assert b.results[0].HasField("embedding")
    assert errors.from_status(bad.results[0].error).reason == "INFERENCE_FAILED"


async def test_overload_is_refused_at_once_with_a_pause(open_house: OpenHouse) -> None:
    house = await open_house(max_queue_cost=100)
    accepted = await house.fill_queue()
    call = house.embed("one more")
    error = await failure(call)
    assert isinstance(error, errors.Overloaded)
    assert error.retry_after is not None
    assert error.retry_after > 0
    trailers = dict(await call.trailing_metadata())
    assert int(trailers["grpc-retry-pushback-ms"]) == round(error.retry_after * 1000)
    assert house.sample("refused_inputs_total") == 1
    house.gate.open()
    assert all(response.results[0].HasField("embedding") for response in await asyncio.gather(*accepted))
    assert (await house.embed("one more")).results[0].HasField("embedding")


async def test_the_bulk_queue_keeps_nobody_out(open_house: OpenHouse) -> None:
    house = await open_house(max_queue_cost=100, batch_items=1)
    accepted = await house.fill_queue()
    bulk = house.embed("b" * 98, priority=pb.PRIORITY_BULK)
    await house.until(lambda: house.sample("queue_inputs", priority="bulk") == 1)
    assert isinstance(await failure(house.embed("b", priority=pb.PRIORITY_BULK)), errors.Overloaded)
    house.gate.open()
    await asyncio.gather(*accepted, bulk)


async def test_interactive_goes_before_bulk(open_house: OpenHouse) -> None:
    house = await open_house(batch_items=1)
    running = await house.block()
    done: list[str] = []

    async def finish(name: str, call: Any) -> None:
        await call
        done.append(name)

    bulk = [asyncio.create_task(finish("bulk", house.embed(f"b{i}", priority=pb.PRIORITY_BULK))) for i in range(3)]
    await house.until(lambda: house.sample("queue_inputs", priority="bulk") == 3)
    urgent = asyncio.create_task(finish("urgent", house.embed("u")))
    await house.until(lambda: house.sample("queue_inputs", priority="interactive") == 1)
    house.gate.open()
    await asyncio.gather(running, urgent, *bulk)
    assert done == ["urgent", "bulk", "bulk", "bulk"]


async def test_a_caller_that_leaves_takes_its_work_along(open_house: OpenHouse) -> None:
    house = await open_house(max_queue_cost=100)
    running, waiting = await house.fill_queue()
    waiting.cancel()
    await house.until(lambda: house.sample("dropped_inputs_total", reason="cancelled") == 1)
    assert house.sample("queue_cost_units") == 0
    house.gate.open()
    await running
    assert house.gate.batches == [1]


async def test_a_deadline_before_inference(open_house: OpenHouse) -> None:
    house = await open_house()
    running = await house.block()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.embed("a", "b", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await house.until(lambda: house.sample("queue_inputs", priority="interactive") == 0)
    dropped = [house.sample("dropped_inputs_total", reason=reason) for reason in ("expired", "cancelled")]
    assert sum(dropped) == 2
    house.gate.open()
    await running
    assert house.gate.batches == [1]


async def test_calls_without_a_deadline_get_one(open_house: OpenHouse) -> None:
    house = await open_house(default_timeout_seconds=0.1)
    house.gate.shut()
    call = house.embed("a", timeout=None)
    assert isinstance(await failure(call), errors.DeadlineExceeded)


@pytest.mark.parametrize("normalized", [True, False])
async def test_every_dtype_width_and_normalisation(open_house: OpenHouse, normalized: bool) -> None:
    house = await open_house({"normalized": normalized})
    full = (
        await house.embed("a text", output=pb.OutputOptions(normalize=False, kinds=[pb.EMBEDDING_KIND_DENSE]))
    ).results[0]
    pooled = vector(full)
    assert full.embedding.dense_norm == pytest.approx(np.linalg.norm(pooled), rel=1e-5)
    for dtype, width, normalize in itertools.product(
        (pb.DTYPE_UNSPECIFIED, pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16, pb.DTYPE_INT8, pb.DTYPE_BINARY),
        (0, 64, 32, 16),
        (None, True, False),
    ):
        output = pb.OutputOptions(dtype=dtype, dimensions=width, normalize=normalize)
        tensor = (await house.embed("a text", output=output)).results[0].embedding.dense
        assert tensor.dtype == (dtype or pb.DTYPE_FLOAT32)
        assert tensor.shape == [width or 64]
        expected = pooled[: width or 64]
        if normalize or (normalize is None and normalized):
            expected = expected / np.linalg.norm(expected)
        if dtype == pb.DTYPE_BINARY:
            np.testing.assert_array_equal(decode(tensor), np.packbits(expected > 0))
        else:
            atol = {pb.DTYPE_FLOAT16: 2e-3, pb.DTYPE_INT8: float(np.abs(expected).max()) / 250}.get(dtype, 1e-5)
            np.testing.assert_allclose(dequantize(tensor), expected, atol=atol)


async def test_truncation_is_never_silent(open_house: OpenHouse) -> None:
    house = await open_house({"max_input_units": 32})
    end, start, fits = [
        (await house.embed(text, truncation=truncation)).results[0]
        for text, truncation in (
            ("a" + "b" * 99, pb.TRUNCATION_UNSPECIFIED),
            ("a" + "b" * 99, pb.TRUNCATION_START),
            ("a", pb.TRUNCATION_REFUSE),
        )
    ]
    for cut in (end, start):
        assert (cut.truncated, cut.input_units, cut.original_units) == (True, 32, 102)
    assert (fits.truncated, fits.input_units, fits.original_units) == (False, 3, 0)
    assert not np.array_equal(vector(end), vector(start))
    assert house.sample("truncated_inputs_total") == 2


async def test_role_and_instruction_reach_the_model(open_house: OpenHouse) -> None:
    house = await open_house({"prompts": {"query": "query: ", "document": "passage: "}})
    request = text_pb2.EmbedTextRequest()
    request.inputs.add(text="a", role=text_pb2.TEXT_ROLE_QUERY)
    request.inputs.add(text="query: a")
    request.inputs.add(text="a", role=text_pb2.TEXT_ROLE_DOCUMENT, instruction="query: ")
    request.inputs.add(text="a")
    one, two, three, four = [vector(r) for r in (await house.text.EmbedText(request)).results]
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)
    assert not np.array_equal(one, four)


async def test_an_empty_text_has_a_vector_and_an_empty_request_an_empty_answer(open_house: OpenHouse) -> None:
    house = await open_house()
    response = await house.embed("", "  ")
    assert all(np.isfinite(vector(result)).all() for result in response.results)
    assert len((await house.embed()).results) == 0


@pytest.mark.parametrize(
    ("request_fields", "kind", "field"),
    [
        ({"model": "nobody"}, errors.ModelNotFound, "model"),
        ({"model": "fake-text@0000"}, errors.ModelNotFound, "model"),
        ({"model": "@"}, errors.ModelNotFound, "model"),
        ({"truncation": 17}, errors.InvalidRequest, "truncation"),
        ({"priority": 17}, errors.InvalidRequest, "priority"),
        ({"output": pb.OutputOptions(dtype=17)}, errors.InvalidRequest, "output.dtype"),  # type: ignore[arg-type]
        ({"output": pb.OutputOptions(dtype=pb.DTYPE_UINT8)}, errors.UnsupportedOutput, "output.dtype"),
        ({"output": pb.OutputOptions(dimensions=63)}, errors.UnsupportedOutput, "output.dimensions"),
        ({"output": pb.OutputOptions(dimensions=65)}, errors.UnsupportedOutput, "output.dimensions"),
        ({"output": pb.OutputOptions(kinds=[pb.EMBEDDING_KIND_SPARSE])}, errors.UnsupportedOutput, "output.kinds"),
        ({"output": pb.OutputOptions(kinds=[17])}, errors.InvalidRequest, "output.kinds"),  # type: ignore[list-item]
    ],
)
async def test_wrong_requests_fail_as_a_whole(
    open_house: OpenHouse, request_fields: dict[str, Any], kind: type[errors.EmbedMeshError], field: str
) -> None:
    house = await open_house()
    error = await failure(house.embed("a", **request_fields))
    assert type(error) is kind
    assert error.field == field
    assert house.gate.batches == []


async def test_too_many_inputs(open_house: OpenHouse) -> None:
    house = await open_house(max_inputs=3)
    assert len((await house.embed("a", "b", "c")).results) == 3
    error = await failure(house.embed("a", "b", "c", "d"))
    assert isinstance(error, errors.InputTooLarge)
    assert error.metadata == {"limit": "3", "actual": "4", "unit": "inputs"}


async def test_models_by_name_and_revision(open_house: OpenHouse) -> None:
    house = await open_house({"name": "one"}, {"name": "two", "seed": 7})
    one, two = house.models.specs
    default = await house.embed("a")
    assert default.models[0] == pb.ModelRef(name="one", revision=one.revision, space="one")
    for wanted, spec in (("one", one), ("two", two), (f"two@{two.revision}", two)):
        response = await house.embed("a", model=wanted)
        assert [model.name for model in response.models] == [spec.name]
    error = await failure(house.embed("a", model=f"one@{two.revision}"))
    assert isinstance(error, errors.ModelNotFound)
    assert error.metadata == {"model": f"one@{two.revision}"}
    assert f"one@{one.revision}" in error.message


async def test_a_model_that_is_not_loaded_is_named_but_not_ready(open_house: OpenHouse) -> None:
    house = await open_house({"name": "one"}, {"name": "two", "normalized": False}, loaded=1)
    error = await failure(house.embed("a", model="two"))
    assert isinstance(error, errors.NotReady)
    assert error.retry_after is not None
    models = (await house.catalog.ListModels(catalog_pb2.ListModelsRequest())).models
    assert [(model.model.name, model.ready, model.is_default) for model in models] == [
        ("one", True, True),
        ("two", False, False),
    ]
    one = models[0]
    assert one.model == house.models.specs[0].ref()
    assert (one.family, one.modality) == ("one", catalog_pb2.MODALITY_TEXT)
    assert list(one.kinds) == [pb.EMBEDDING_KIND_DENSE]
    assert (one.dimensions, list(one.truncatable_dimensions)) == (64, [32, 16])
    assert (one.max_input_units, one.max_inputs, one.normalized) == (256, 256, True)
    assert dict(one.limits) == {"text_bytes": 1 << 20, "text_passes": 128}
    assert not models[1].normalized
    assert repr(house.models) == "<Models ready=1/2>"


async def test_no_model_at_all() -> None:
    with pytest.raises(errors.ModelNotFound, match="there is none"):
        Models([]).find("")


async def test_two_revisions_of_one_name(open_house: OpenHouse) -> None:
    house = await open_house({"name": "other"}, {"seed": 1}, {"seed": 2}, {"seed": 3}, loaded=3)
    other, second, first, broken = house.models.specs
    assert [spec.fake.seed for spec in (second, first, broken) if spec.fake] == [2, 1, 3]
    made_by = (await house.embed("a", model="fake-text")).models[0]
    assert made_by == second.ref()  # the last one that is loaded
    for spec in (first, second):
        assert (await house.embed("a", model=f"fake-text@{spec.revision}")).models[0] == spec.ref()
    assert (await house.embed("a")).models[0] == other.ref()
    assert isinstance(await failure(house.embed("a", model=f"fake-text@{broken.revision}")), errors.NotReady)
    models = (await house.catalog.ListModels(catalog_pb2.ListModelsRequest())).models
    assert [(info.model.revision, info.ready, info.is_default) for info in models] == [
        (other.revision, True, True),
        (second.revision, True, False),
        (first.revision, True, False),
        (broken.revision, False, False),
    ]


def test_the_default_may_be_named(tmp_path: Any) -> None:
    specs = [write_model(tmp_path / name, name=name, seed=seed) for seed, name in enumerate(("a", "b"))]
    newer = write_model(tmp_path / "newer", name="b", seed=7)
    models = Models([*specs, newer], default="b")
    assert models.default is newer
    models.offer(specs[:1])
    with pytest.raises(errors.ModelNotFound, match='no model "b" here; there is a@'):
        models.find("")


async def test_health_by_service(open_house: OpenHouse) -> None:
    house = await open_house()
    stub: Any = health_pb2_grpc.HealthStub(house.channel)
    for service in ("", "embedmesh.v1.TextEncoder", "embedmesh.v1.ModelCatalog"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_batch_that_holds_the_last_lane_shows_as_stalled(open_house: OpenHouse) -> None:
    house = await open_house()
    (encoder,) = house.models.encoders
    assert encoder.stalled_seconds == 0
    house.gate.shut()
    call = house.embed("a")
    await house.gate.entered(len(house.gate.batches) + 1)
    await asyncio.sleep(0.01)
    assert encoder.stalled_seconds > 0
    house.gate.open()
    await call
    assert encoder.stalled_seconds == 0


async def test_stages_are_timed(open_house: OpenHouse) -> None:
    house = await open_house()
    await house.embed("a", "b", "c")
    counts = {
        stage: house.sample("encoder_stage_seconds_count", stage=stage)
        for stage in ("prepare", "queue", "infer", "finish")
    }
    assert counts == {"prepare": 1, "queue": 3, "infer": 1, "finish": 1}
    assert house.sample("encoder_inputs_total", outcome="ok") == 3


async def test_an_answer_tells_how_long_the_model_worked(open_house: OpenHouse) -> None:
    house = await open_house()
    first = await house.block()
    await asyncio.sleep(0.1)
    house.gate.open()
    slow = (await first).usage.model_seconds
    assert slow >= 0.1
    bad = await house.embed("quick", FAIL)
    assert 0 < bad.usage.model_seconds != slow


async def test_a_flood_is_answered_or_refused_but_never_hangs(open_house: OpenHouse) -> None:
    house = await open_house({"base_ms": 20.0}, max_queue_cost=500)

    async def one(number: int) -> str:
        try:
            response = await house.embed("w" * (number % 90 + 1), timeout=30)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "ok" if response.results[0].HasField("embedding") else "bad"

    outcomes = await asyncio.gather(*(one(number) for number in range(300)))
    assert set(outcomes) == {"ok", "RESOURCE_EXHAUSTED"}
    assert house.sample("queue_cost_units") == 0
    assert house.sample("refused_inputs_total") == outcomes.count("RESOURCE_EXHAUSTED")
