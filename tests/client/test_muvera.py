"""MaxSim, and the encodings that estimate it, on seeded data.

make test ARGS="tests/client/test_muvera.py -s"     # prints the table of protos/README.md
"""

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedmesh.muvera import Muvera, max_sim

Matrix = NDArray[np.float32]
D = 32


def unit(rows: Any) -> Matrix:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def corpus() -> tuple[list[Matrix], list[Matrix]]:
    """600 documents of 20 to 60 rows around 6 of 200 topics each; 60 queries of 8 noisy rows of a document."""
    random = np.random.default_rng(20261125)
    topics = unit(random.standard_normal((200, D)))

    def noise(*shape: int) -> Any:
        return random.standard_normal(shape) / math.sqrt(D)

    def document() -> Matrix:
        rows = int(random.integers(20, 60))
        return unit(topics[random.choice(200, 6)][random.integers(0, 6, rows)] + 0.8 * noise(rows, D))

    documents = [document() for _ in range(600)]
    queries = [unit(rows[random.choice(len(rows), 8)] + 0.7 * noise(8, D)) for rows in documents[:60]]
    return documents, queries


@pytest.fixture(scope="module")
def exact(corpus: tuple[list[Matrix], list[Matrix]]) -> Matrix:
    documents, queries = corpus
    return np.array([max_sim(query, documents) for query in queries])


def estimates(model: Muvera, corpus: tuple[list[Matrix], list[Matrix]]) -> Matrix:
    documents, queries = corpus
    encoded = np.array([model.encode_document(rows) for rows in documents])
    found: Matrix = np.array([model.encode_query(rows) for rows in queries]) @ encoded.T
    return found


def test_max_sim_is_the_sum_of_the_best_matches() -> None:
    query = np.array([[1, 0], [0, 2]], np.float16)
    documents = [np.array([[3, 1], [1, 2]]), np.array([[-1, -1]]), np.empty((0, 2))]
    assert max_sim(query, documents).tolist() == [3 + 4, -1 - 2, 0]
    assert max_sim(np.empty((0, 2)), documents).tolist() == [0, 0, 0]
    assert max_sim(query, []).shape == (0,)


def naive(model: Muvera, rows: Matrix, *, query: bool) -> NDArray[np.float64]:
    """Follow the paper's definition cell by cell."""
    hyperplanes, signs, (places, flips) = model._draws
    whole = []
    for r in range(model.repetitions):
        cells = [tuple(bool(row @ hyperplanes[r][:, i] > 0) for i in range(model.simhash_bits)) for row in rows]
        # The first hyperplane is the lowest bit of a cell's number.
        for number in itertools.product([False, True], repeat=model.simhash_bits):
            cell = number[::-1]
            inside = [row for row, own in zip(rows, cells, strict=True) if own == cell]
            if inside:
                vector = np.sum(inside, axis=0) / (1 if query else len(inside))
            elif query:
                vector = np.zeros(model.dimensions)
            else:
                others = [sum(a != b for a, b in zip(own, cell, strict=True)) for own in cells]
                vector = rows[others.index(min(others))]
            whole += list(vector @ signs[r] if model.projected else vector)
    scaled = np.array(whole) / math.sqrt(model.repetitions)
    if model.final:
        kept = np.zeros(model.final)
        for number, place, flip in zip(scaled, places, flips, strict=True):
            kept[place] += number * flip
        return kept
    return scaled


@pytest.mark.parametrize("projections", [{}, {"projected": 3}, {"projected": 3, "final": 8}])
@pytest.mark.parametrize(("bits", "rows"), [(0, 4), (3, 1), (3, 40), (4, 5)])
def test_an_encoding_is_what_the_paper_defines(projections: dict[str, int], bits: int, rows: int) -> None:
    model = Muvera(7, simhash_bits=bits, repetitions=3, seed=5, **projections)
    matrix = np.random.default_rng(rows).standard_normal((rows, 7)).astype(np.float32)
    for query, encode in ((True, model.encode_query), (False, model.encode_document)):
        encoding = encode(matrix)
        assert encoding.shape == (model.width,)
        assert encoding.dtype == np.float32
        np.testing.assert_allclose(encoding, naive(model, matrix, query=query), atol=1e-5)


def test_equal_settings_give_equal_encodings_in_every_version_of_numpy() -> None:
    rows = unit(np.arange(24).reshape(3, 8) % 7 - 3.0)
    model = Muvera(8, simhash_bits=2, repetitions=2, projected=4, final=6, seed=7)
    np.testing.assert_array_equal(model.encode_document(rows), Muvera(8, 2, 2, 4, 6, seed=7).encode_document(rows))
    golden = [0.6325294, 0.1917088, 0.0992724, -0.3646764, 1.2246175, -0.2915075]
    np.testing.assert_allclose(model.encode_document(rows), golden, atol=1e-6)
    assert not np.array_equal(model.encode_query(rows), Muvera(8, 2, 2, 4, 6, seed=8).encode_query(rows))


def test_without_projections_an_estimate_is_never_above_max_sim(
    corpus: tuple[list[Matrix], list[Matrix]], exact: Matrix
) -> None:
    for bits in (0, 2, 5):
        assert (estimates(Muvera(D, bits, 3), corpus) <= exact + 1e-4).all()


def test_more_cells_are_closer_to_max_sim(corpus: tuple[list[Matrix], list[Matrix]], exact: Matrix) -> None:
    errors = [float((exact - estimates(Muvera(D, bits, 1), corpus)).mean()) / 8 for bits in (0, 2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.75 * errors[0]


def test_one_repetition_is_within_epsilon_as_often_as_the_theorem_says(
    corpus: tuple[list[Matrix], list[Matrix]], exact: Matrix
) -> None:
    """With k = ln(m / delta) / epsilon bits no more than a share delta of the pairs is off by epsilon a row.

    The theorem leaves the constant open; it is 1 here. The pairs are queries and what they were made from, in which
    the best match of a row is far better than the mean.
    """
    epsilon, delta = 0.5, 0.1
    documents, queries = corpus

    def off(bits: int) -> float:
        model = Muvera(D, bits, 1)
        pairs = zip(queries, documents, strict=False)
        found = [float(model.encode_query(query) @ model.encode_document(document)) for query, document in pairs]
        return float(np.mean((exact.diagonal() - found) / 8 > epsilon))

    assert off(math.ceil(math.log((60 + 8) / delta) / epsilon)) <= delta
    assert off(0) > 0.5


def test_projections_add_noise_of_mean_zero_and_of_a_variance_that_falls_with_their_width() -> None:
    random = np.random.default_rng(3)
    query, document = unit(random.standard_normal((4, D))), unit(random.standard_normal((10, D)))

    def spread(**projections: int) -> tuple[float, float]:
        """Mean and variance over seeds of the noise, in cells that do not depend on the seed: there is one."""
        found = []
        for seed in range(400):
            model = Muvera(D, simhash_bits=0, repetitions=1, seed=seed, **projections)
            found.append(float(model.encode_query(query) @ model.encode_document(document)))
        plain = Muvera(D, simhash_bits=0, repetitions=1)
        noise = np.array(found) - float(plain.encode_query(query) @ plain.encode_document(document))
        return float(noise.mean()), float(noise.var())

    size = np.linalg.norm(query.sum(axis=0)) * np.linalg.norm(document.mean(axis=0))
    for name in ("projected", "final"):
        narrow, wide = spread(**{name: 4}), spread(**{name: 16})
        for (mean, variance), width in ((narrow, 4), (wide, 16)):
            assert abs(mean) < 4 * math.sqrt(variance / 400)
            # Of a sketch: (|x|^2 |y|^2 + <x, y>^2) / width at most, and half of it for a test with room.
            assert variance < 2.5 * size**2 / width
        assert 2 < narrow[1] / wide[1] < 8


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"simhash_bits": 4, "repetitions": 10}, 0.95),
        ({"simhash_bits": 5, "repetitions": 20}, 0.98),
        ({"simhash_bits": 5, "repetitions": 20, "projected": 8}, 0.95),
        ({"simhash_bits": 5, "repetitions": 20, "projected": 8, "final": 2560}, 0.85),
    ],
)
def test_recall_against_brute_force(
    corpus: tuple[list[Matrix], list[Matrix]], exact: Matrix, settings: dict[str, int], least: float
) -> None:
    model = Muvera(D, **settings)
    estimated = estimates(model, corpus)
    best = exact.argmax(axis=1)
    ahead = (estimated > np.take_along_axis(estimated, best[:, None], axis=1)).sum(axis=1)
    ten = np.argsort(-exact, axis=1)[:, :10]
    hundred = np.argsort(-estimated, axis=1)[:, :100]
    shared = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(ten, hundred, strict=True)])
    first, among = np.mean(ahead == 0), np.mean(ahead < 10)
    sys.stdout.write(f"| {settings} | {model.width} | {first:.2f} | {among:.2f} | {shared:.2f} |\n")
    assert among >= least


def test_rows_that_are_not_there_have_an_encoding() -> None:
    model = Muvera(4, 2, 3, 2, 5)
    assert model.encode_query(np.empty((0, 4))).tolist() == [0] * 5
    assert model.encode_document(np.empty((0, 4))).tolist() == [0] * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimensions": 0}, "dimensions is 0; give 1"),
        ({"dimensions": 4, "simhash_bits": 17}, "simhash_bits is 17; give 0 to 16"),
        ({"dimensions": 4, "repetitions": 0}, "repetitions is 0; give 1"),
        ({"dimensions": 4, "projected": 5}, "projected is 5; give 0 to 4"),
        ({"dimensions": 4, "simhash_bits": 0, "repetitions": 2, "final": 9}, "final is 9; give 0 to 8"),
        ({"dimensions": 4, "seed": -1}, "seed is -1; give 0 to"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muvera(**settings)


@pytest.mark.parametrize("rows", [np.zeros(4), np.zeros((2, 5)), np.zeros((1, 2, 4)), np.full((1, 4), np.nan)])
def test_what_is_no_multi_vector(rows: Any) -> None:
    model = Muvera(4, 2, 1)
    for call in (model.encode_query, model.encode_document, lambda wrong: max_sim(np.ones((1, 4)), [wrong])):
        with pytest.raises(ValueError, match="a multi-vector h"):
            call(rows)
