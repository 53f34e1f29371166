"""`embed`, of both clients: order, options, splitting, single failures, retries, deadlines."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import numpy as np
import pytest

import embedmesh
from embedmesh import Audio, Image, Text
from embedmesh.v1 import embedding_pb2, gateway_pb2, text_pb2


def first_column(response: embedmesh.EmbedResponse) -> list[float]:
    return [float(value) for value in response.vectors[:, 0]]


def test_vectors_come_in_the_order_of_the_inputs_over_all_requests(connect: Any, gateway: Any) -> None:
    # The first request is answered last.
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        if request.inputs[0].text.text == "0":
            gateway.wait_for(lambda: len(gateway.requests) > 3)
        return gateway.answer(request)

    gateway.on_embed = answer
    response = connect(gateway.address, max_inputs=10).embed([str(i) for i in range(57)])
    assert first_column(response) == list(range(57))
    assert [result.index for result in response.results] == list(range(57))
    assert sorted(len(request.inputs) for request in gateway.requests) == [7, 10, 10, 10, 10, 10]


def test_no_more_than_concurrency_requests_are_in_flight(connect: Any, gateway: Any) -> None:
    running, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)

    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(30)
        with lock:
            running -= 1
        return gateway.answer(request)

    gateway.on_embed = answer
    connect(gateway.address, max_inputs=1, concurrency=2).embed(["a"] * 8)
    assert most == 2


def test_passes_reach_the_gateway(connect: Any, gateway: Any) -> None:
    inputs = ["plain", Text("own", instructions=["mine", "too"]), Text("asks", role="query"), Text("bare")]
    connect(gateway.address).embed(
        inputs, instructions=iter(["a", "b"]), truncation="chunk", chunk_units=64, chunk_overlap=8
    )
    (request,) = gateway.requests
    assert request.truncation == embedding_pb2.TRUNCATION_CHUNK
    assert request.chunking == embedding_pb2.Chunking(units=64, overlap=8)
    assert [list(each.text.instructions) for each in request.inputs] == [["a", "b"], ["mine", "too"], [], ["a", "b"]]
    assert [each.text.role for each in request.inputs] == [0, 0, 1, 0]


def test_a_role_of_the_call_is_not_for_texts_with_instructions(connect: Any, gateway: Any) -> None:
    connect(gateway.address).embed(["plain", Text("own", instructions=["mine"])], role="query", instruction="i")
    (request,) = gateway.requests
    assert [each.text.role for each in request.inputs] == [1, 0]
    assert [each.text.instruction for each in request.inputs] == ["i", ""]
    assert not request.HasField("chunking")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"instructions": "one"}, TypeError, "put it into a list"),
        ({"instructions": [b"one"]}, TypeError, "many str"),
        ({"instructions": ["one"], "role": "query"}, embedmesh.InvalidRequest, "not both"),
        ({"instructions": ["one"], "instruction": "two"}, embedmesh.InvalidRequest, "not both"),
        ({"instructions": ["\ud800"]}, embedmesh.InvalidRequest, "surrogate"),
        ({"chunk_units": 12}, embedmesh.InvalidRequest, "truncation='chunk'"),
        ({"chunk_overlap": 1, "truncation": "end"}, embedmesh.InvalidRequest, "truncation='chunk'"),
        ({"chunk_units": -1, "truncation": "chunk"}, embedmesh.InvalidRequest, "chunk_units is -1"),
        ({"chunk_overlap": 1.5, "truncation": "chunk"}, TypeError, "an int"),
    ],
)
def test_bad_passes_are_refused_before_anything_is_sent(
    connect: Any, gateway: Any, options: dict[str, Any], kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message):
        connect(gateway.address).embed(["a"], **options)
    assert not gateway.requests


def test_options_reach_the_gateway(connect: Any, gateway: Any) -> None:
    connect(gateway.address).embed(
        ["plain", Text("own", role="document", instruction="mine")],
        model="fake@r1",
        dimensions=2,
        dtype="float16",
        normalize=False,
        role="query",
        instruction="yours",
        truncation="refuse",
        cache="bypass",
        priority="bulk",
    )
    (request,) = gateway.requests
    assert request.model == "fake@r1"
    assert request.output == embedding_pb2.OutputOptions(
        kinds=[embedding_pb2.EMBEDDING_KIND_DENSE], dimensions=2, dtype=embedding_pb2.DTYPE_FLOAT16, normalize=False
    )
    assert request.output.HasField("normalize")
    assert request.truncation == embedding_pb2.TRUNCATION_REFUSE
    assert request.cache == gateway_pb2.CACHE_POLICY_BYPASS
    assert request.priority == embedding_pb2.PRIORITY_BULK
    assert [item.text for item in request.inputs] == [
        text_pb2.TextInput(text="plain", role=text_pb2.TEXT_ROLE_QUERY, instruction="yours"),
        text_pb2.TextInput(text="own", role=text_pb2.TEXT_ROLE_DOCUMENT, instruction="mine"),
    ]


def test_defaults_are_stated_not_left_open(connect: Any, gateway: Any) -> None:
    connect(gateway.address).embed([""])
    (request,) = gateway.requests
    assert request.inputs[0].WhichOneof("modality") == "text"
    assert not request.output.HasField("normalize")
    assert request.output.dtype == embedding_pb2.DTYPE_FLOAT32
    assert request.truncation == embedding_pb2.TRUNCATION_END
    assert request.cache == gateway_pb2.CACHE_POLICY_READ_WRITE
    assert request.priority == embedding_pb2.PRIORITY_INTERACTIVE


def test_every_modality_in_one_call(connect: Any, gateway: Any) -> None:
    pcm = Audio.from_pcm(np.zeros(7, np.float32), 16_000)
    response = connect(gateway.address).embed(["5", Image(b"ab"), Audio.from_bytes(b"abc"), pcm])
    assert first_column(response) == [5, 2, 3, 7]


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype", "width"),
    [("float32", np.float32, 12), ("float16", np.float16, 12), ("int8", np.int8, 12), ("binary", np.uint8, 2)],
)
def test_vectors_have_the_dtype_asked_for(connect: Any, gateway: Any, dtype: str, numpy_dtype: Any, width: int) -> None:
    response = connect(gateway.address).embed(["1", "2"], dtype=dtype, dimensions=12)
    assert response.vectors.dtype == numpy_dtype
    assert response.vectors.shape == (2, width)
    row = np.array([2, *range(1, 12)], np.float32)
    match dtype:
        case "int8":
            scale = response.results[1].scale
            assert scale == pytest.approx(11 / 127)
            np.testing.assert_allclose(response.vectors[1] * scale, row, atol=scale / 2)
        case "binary":
            np.testing.assert_array_equal(response.vectors[1], np.packbits(row > 0))
        case _:
            np.testing.assert_array_equal(response.vectors[1], row.astype(numpy_dtype))
            assert response.results[1].scale == 1


def test_results_say_units_truncation_cache_and_model(connect: Any, gateway: Any) -> None:
    other = embedding_pb2.ModelRef(name="other", revision="r2", space="s2")

    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        response = gateway.answer(request)
        response.models.insert(0, other)
        response.results[0].MergeFrom(
            embedding_pb2.EmbedResult(model_index=1, truncated=True, original_units=9, cached=True)
        )
        return response

    gateway.on_embed = answer
    response = connect(gateway.address, max_inputs=2).embed(["a", "b", "c"])
    cut, whole = response.results[:2]
    assert (cut.input_units, cut.original_units, cut.truncated, cut.cached) == (3, 9, True, True)
    assert (whole.input_units, whole.original_units, whole.truncated, whole.cached) == (3, 3, False, False)
    assert cut.model == embedmesh.ModelRef("fake", "r1", "fake-space")
    assert whole.model == embedmesh.ModelRef("other", "r2", "s2")
    assert response.models == (cut.model, whole.model)
    assert response.usage == embedmesh.Usage(input_units=9, cached_inputs=2, failed_inputs=0)
    assert repr(response) == "<EmbedResponse 3 results, 0 failed, models: fake, other>"


def test_nothing_to_embed_is_no_call(connect: Any, gateway: Any) -> None:
    response = connect(gateway.address).embed([])
    assert response.vectors.shape == (0, 0)
    assert response.usage == embedmesh.Usage()
    assert gateway.requests == []


def test_one_bad_input_fails_alone_and_names_its_place_in_the_call(connect: Any, gateway: Any) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        response = gateway.answer(request)
        for i, item in enumerate(request.inputs):
            if item.text.text == "bad":
                error = embedmesh.InputTooLarge("too long", field=f"inputs[{i}].text", metadata={"limit": "3"})
                response.results[i].CopyFrom(gateway.error_result(error))
        return response

    gateway.on_embed = answer
    response = connect(gateway.address, max_inputs=2).embed(["0", "1", "2", "bad", "4"])
    assert [result.error is None for result in response.results] == [True, True, True, False, True]
    assert response.results[4].vector[0] == 4
    error = response.results[3].error
    assert isinstance(error, embedmesh.InputTooLarge)
    assert error.field == "inputs[3].text"
    assert error.metadata == {"limit": "3"}
    with pytest.raises(embedmesh.InputTooLarge):
        _ = response.results[3].vector
    with pytest.raises(embedmesh.EmbedErrors, match=r"1 of 5 inputs failed: inputs\[3\]: too long") as caught:
        _ = response.vectors
    assert caught.value.errors == {3: error}
    assert response.usage.failed_inputs == 1


def test_lone_surrogates_are_answered_here_and_alone(connect: Any, gateway: Any) -> None:
    inputs = ["0", "\ud800", Text("2", instruction="\udfff"), "ünï", "4"]
    response = connect(gateway.address).embed(inputs)
    failed = {result.index: result.error for result in response.results if result.error}
    assert {i: (type(error), error.field) for i, error in failed.items()} == {
        1: (embedmesh.InvalidRequest, "inputs[1].text"),
        2: (embedmesh.InvalidRequest, "inputs[2].instruction"),
    }
    assert response.results[4].vector[0] == 4
    assert [len(request.inputs) for request in gateway.requests] == [3]


def test_an_input_over_the_message_limit_is_answered_here_and_alone(connect: Any, gateway: Any) -> None:
    response = connect(gateway.address, max_message_bytes=2**16).embed(["0", Image(bytes(2**16)), "2"])
    assert isinstance(response.results[1].error, embedmesh.InputTooLarge)
    assert response.results[1].error.metadata["unit"] == "bytes"
    assert response.results[2].vector[0] == 2


def test_all_inputs_answered_here_is_no_call(connect: Any, gateway: Any) -> None:
    response = connect(gateway.address, max_inputs=1).embed(["\ud800"] * 9)
    assert response.usage.failed_inputs == 9
    assert gateway.requests == []


def test_requests_are_bounded_in_bytes(connect: Any, gateway: Any) -> None:
    big = Image(bytes(6 * 2**20))
    response = connect(gateway.address).embed([big] * 5)
    assert len(response.results) == 5
    assert sorted(len(request.inputs) for request in gateway.requests) == [1, 2, 2]


def test_a_call_that_fails_as_a_whole_raises_its_error(connect: Any, gateway: Any) -> None:
    error = embedmesh.ModelNotFound("no model 'x'", metadata={"model": "x"})
    gateway.on_embed = lambda _, context: gateway.fail(context, error)
    with pytest.raises(embedmesh.ModelNotFound, match="no model 'x'") as caught:
        connect(gateway.address, max_inputs=1, concurrency=2).embed(["a"] * 50, model="x")
    assert caught.value.metadata == {"model": "x"}
    assert len(gateway.requests) == 2


def test_a_call_level_field_is_named_by_its_place_in_the_call(connect: Any, gateway: Any) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        if request.inputs[0].text.text == "2":
            gateway.fail(context, embedmesh.InvalidRequest("bad", field="inputs[1].text"))
        return gateway.answer(request)

    gateway.on_embed = answer
    response = connect(gateway.address, max_inputs=2, concurrency=1).embed(["0", "1", "2", "3"])
    assert [result.error and result.error.field for result in response.results] == [
        None,
        None,
        "inputs[3].text",
        "inputs[3].text",
    ]


def test_a_request_that_fails_after_others_were_answered_fails_its_inputs(connect: Any, gateway: Any) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        if request.inputs[0].text.text == "1":
            gateway.fail(context, embedmesh.InferenceFailed("broke", metadata={"request_id": "7"}))
        return gateway.answer(request)

    gateway.on_embed = answer
    response = connect(gateway.address, max_inputs=1).embed(["0", "1", "2", "3", "4", "5"])
    assert [type(result.error) for result in response.results if result.error] == [embedmesh.InferenceFailed]
    assert response.results[5].vector[0] == 5


def test_overload_is_retried_after_the_pause_the_server_names(connect: Any, gateway: Any) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        if len(gateway.requests) < 3:
            gateway.fail(context, embedmesh.Overloaded("full", retry_after=0.01))
        return gateway.answer(request)

    gateway.on_embed = answer
    assert first_column(connect(gateway.address).embed(["1"])) == [1]
    assert len(gateway.requests) == 3
    assert [entry.get("grpc-previous-rpc-attempts") for entry in gateway.metadata] == [None, "1", "2"]


def test_large_requests_are_retried_too(connect: Any, gateway: Any) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        if len(gateway.requests) < 2:
            gateway.fail(context, embedmesh.NotReady("draining", retry_after=0.01))
        return gateway.answer(request)

    gateway.on_embed = answer
    assert first_column(connect(gateway.address).embed([Image(bytes(2**20))])) == [2**20]


@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (2, 3)])
def test_retries_bound_the_attempts_at_a_call(connect: Any, gateway: Any, retries: int, attempts: int) -> None:
    gateway.on_embed = lambda _, context: gateway.fail(context, embedmesh.Overloaded("full", retry_after=0.01))
    with pytest.raises(embedmesh.Overloaded) as caught:
        connect(gateway.address, retries=retries).embed(["1"])
    assert caught.value.retry_after == 0.01
    assert len(gateway.requests) == attempts


def test_errors_that_will_not_pass_are_not_retried(connect: Any, gateway: Any) -> None:
    gateway.on_embed = lambda _, context: gateway.fail(context, embedmesh.InternalError("defect"))
    with pytest.raises(embedmesh.InternalError):
        connect(gateway.address).embed(["1"])
    assert len(gateway.requests) == 1


@pytest.mark.parametrize("retry_after", [0.01, None])
def test_inputs_with_an_error_that_may_pass_are_asked_again_alone(
    connect: Any, gateway: Any, retry_after: float | None
) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        response = gateway.answer(request)
        if len(gateway.requests) == 1:
            error = embedmesh.EncoderUnreachable("gone", retry_after=retry_after)
            response.results[1].CopyFrom(gateway.error_result(error))
            response.results[2].CopyFrom(gateway.error_result(embedmesh.UndecodableInput("no image")))
        return response

    gateway.on_embed = answer
    response = connect(gateway.address).embed(["0", "1", "2", "3"])
    assert [result.error is None for result in response.results] == [True, True, False, True]
    assert response.results[1].vector[0] == 1
    assert [[item.text.text for item in request.inputs] for request in gateway.requests] == [
        ["0", "1", "2", "3"],
        ["1"],
    ]


@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (2, 3)])
def test_retries_bound_the_attempts_at_an_input(connect: Any, gateway: Any, retries: int, attempts: int) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        full = embedmesh.Overloaded("full", retry_after=0.001)
        return gateway_pb2.EmbedResponse(results=[gateway.error_result(full)])

    gateway.on_embed = answer
    response = connect(gateway.address, retries=retries).embed(["1"])
    assert isinstance(response.results[0].error, embedmesh.Overloaded)
    assert len(gateway.requests) == attempts


def test_an_input_is_not_asked_again_when_its_pause_outlasts_the_deadline(connect: Any, gateway: Any) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        full = embedmesh.Overloaded("full", retry_after=3600)
        return gateway_pb2.EmbedResponse(results=[gateway.error_result(full)])

    gateway.on_embed = answer
    response = connect(gateway.address).embed(["1"], timeout=30)
    assert isinstance(response.results[0].error, embedmesh.Overloaded)
    assert len(gateway.requests) == 1


def test_the_deadline_holds_for_the_whole_call(connect: Any, gateway: Any) -> None:
    gateway.on_embed = lambda _, context: gateway.hold(context)
    with pytest.raises(embedmesh.DeadlineExceeded):
        connect(gateway.address).embed(["1"], timeout=0.2)
    assert gateway.cancelled.wait(30)


def test_what_was_answered_before_the_deadline_is_kept(connect: Any, gateway: Any) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        if request.inputs[0].text.text != "0":
            gateway.hold(context)
        return gateway.answer(request)

    gateway.on_embed = answer
    response = connect(gateway.address, max_inputs=1, concurrency=1).embed(["0", "1", "2"], timeout=0.5)
    assert response.results[0].vector[0] == 0
    assert [type(result.error) for result in response.results[1:]] == [embedmesh.DeadlineExceeded] * 2
    assert len(gateway.requests) == 2


def test_nobody_there_is_an_error_of_the_catalogue(connect: Any, gateway: Any) -> None:
    gateway.stop()
    with pytest.raises(embedmesh.Retryable) as caught:
        connect(gateway.address, retries=0).embed(["1"])
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda response: response.results.add(), "2 results for 1 inputs"),
        (lambda response: response.results[0].Clear(), "cannot be read"),
        (lambda response: response.results[0].embedding.dense.shape.append(2), "cannot be read"),
        (lambda response: response.results[0].embedding.dense.shape.insert(0, 1), "breaks the contract"),
        (lambda response: response.models.pop(), "breaks the contract"),
        (
            lambda response: response.results[0].embedding.dense.MergeFrom(
                embedding_pb2.Tensor(dtype=embedding_pb2.DTYPE_UINT32)
            ),
            "breaks the contract",
        ),
    ],
)
def test_answers_that_break_the_contract_are_errors_of_their_inputs(
    connect: Any, gateway: Any, spoil: Any, sentence: str
) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        response = gateway.answer(request)
        spoil(response)
        return response

    gateway.on_embed = answer
    (result,) = connect(gateway.address).embed(["1"]).results
    assert isinstance(result.error, embedmesh.InternalError)
    assert sentence in result.error.message


def test_vectors_of_different_widths_make_no_array(connect: Any, gateway: Any) -> None:
    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> Any:
        if request.inputs[0].text.text == "1":
            request.output.dimensions = 3
        return gateway.answer(request)

    gateway.on_embed = answer
    response = connect(gateway.address, max_inputs=1).embed(["0", "1"])
    with pytest.raises(ValueError, match=r"different widths \[3, 4\]"):
        _ = response.vectors


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dtype": "int4"}, "dtype"),
        ({"truncation": "middle"}, "truncation"),
        ({"cache": "none"}, "cache"),
        ({"priority": "high"}, "priority"),
        ({"role": "passage"}, "role"),
        ({"dimensions": -1}, "dimensions"),
        ({"dimensions": 2**32}, "dimensions"),
        ({"model": "\ud800"}, "model"),
        ({"instruction": "\ud800"}, "instruction"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
    ],
)
def test_options_that_do_not_exist_are_named(connect: Any, gateway: Any, options: dict[str, Any], field: str) -> None:
    client = connect(gateway.address)
    with pytest.raises(embedmesh.InvalidRequest, match=field) as caught:
        client.embed(["1"], **options)
    assert caught.value.field == field
    with pytest.raises(embedmesh.InvalidRequest):
        client.stream(["1"], **options)
    assert gateway.requests == []


@pytest.mark.parametrize(
    "options",
    [{"dimensions": 1.5}, {"dimensions": True}, {"normalize": 1}, {"model": None}, {"instruction": None}],
)
def test_options_of_a_wrong_type_are_type_errors(connect: Any, gateway: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        connect(gateway.address).embed(["1"], **options)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ("one text", "got a single str; put it into a list"),
        (Text("one"), "got a single Text"),
        (b"bytes", "got a single bytes"),
        (7, "must be a list or an iterable, got int"),
        (["a", 7], r"inputs\[1\] is a int; give str, Text, Image or Audio"),
        (["a", b"b"], r"inputs\[1\] is a bytes; .*Image.from_bytes"),
        ([None], r"inputs\[0\] is a NoneType"),
    ],
)
def test_what_is_no_input_is_a_type_error_before_anything_is_sent(
    connect: Any, gateway: Any, inputs: Any, sentence: str
) -> None:
    with pytest.raises(TypeError, match=sentence):
        connect(gateway.address).embed(inputs)
    assert gateway.requests == []


def test_inputs_may_be_any_iterable(connect: Any, gateway: Any) -> None:
    assert first_column(connect(gateway.address).embed(str(i) for i in range(3))) == [0, 1, 2]
    assert first_column(connect(gateway.address).embed(np.array(["7", "8"]))) == [7, 8]


def test_a_closed_client_says_so(connect: Any, gateway: Any) -> None:
    client = connect(gateway.address)
    client.embed(["1"])
    client.close()
    client.close()
    for call in (lambda: client.embed(["1"]), lambda: client.stream(["1"]), client.list_models):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert repr(client.client).endswith("closed>")
