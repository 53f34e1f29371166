"""`embedmesh models whiten` on the real text model and on the fake one, against the paper's code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedmesh_cli.console import UserError
from embedmesh_cli.local import LocalModel, demo_texts
from embedmesh_cli.whiten import fit
from embedmesh_encoder.backend.fake import NAN, write_model
from embedmesh_encoder.model import ModelSpec, load_spec, verify_files
from embedmesh_encoder.text import TextItem

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "sleeps")


def compute_kernel_bias(vecs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The paper's own (github.com/bojone/BERT-whitening): y = (x + bias).dot(kernel)."""
    mu = vecs.mean(axis=0, keepdims=True)
    cov = np.cov(vecs.T)
    u, s, _ = np.linalg.svd(cov)
    return np.dot(u, np.diag(1 / np.sqrt(s))), -mu


def embed(spec: ModelSpec, texts: Sequence[str], *, raw: bool = False) -> NDArray[np.float64]:
    model = LocalModel(spec.model_copy(update={"normalized": False}) if raw else spec)
    vectors = [model.embed(batch, unit=False) for batch in model.batches([TextItem(text) for text in texts])]
    model.close()
    return np.concatenate(vectors).astype(np.float64)


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    normed: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normed


def signed(theirs: NDArray[np.float64], ours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn directions as ours point: a decomposition leaves their signs open."""
    turned: NDArray[np.float64] = theirs * np.sign((theirs * ours).sum(axis=0))
    return turned


def lines(count: int) -> list[str]:
    random = np.random.default_rng(count)
    return [" ".join(random.choice(WORDS, size=1 + i % 12)) + f" {i}" for i in range(count)]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_model(tmp_path / "tiny", name="tiny", dimensions=48, truncatable_dimensions=(8,), prompts={"query": "q: "})
    return tmp_path / "tiny"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("\n\n".join(lines(200)) + "\n")
    return tmp_path / "texts.txt"


def test_the_real_model_is_whitened_as_in_the_paper(cli: Any, starter_model: Path, tmp_path: Path) -> None:
    fitted = demo_texts()[:150]
    (tmp_path / "texts.txt").write_text("\n".join(fitted))
    words = ("models", "whiten", starter_model, "--file", tmp_path / "texts.txt", "--dimensions", 64)
    done = cli(*words, "--output", tmp_path / "made")
    assert done.status == 0, done.err
    original, made = load_spec(starter_model), load_spec(tmp_path / "made")
    verify_files(made)
    assert (made.name, made.family) == (f"{original.name}-whitened-64",) * 2
    assert made.space.startswith(f"{original.space}-whitened-")
    assert (made.dimensions, made.truncatable_dimensions, made.normalized) == (64, (32,), True)
    assert "do not mix its vectors with the original's" in done.out
    kernel, bias = compute_kernel_bias(embed(original, fitted, raw=True))
    others = [*demo_texts()[150:180], "a", " ".join(demo_texts()[200:260])]
    vectors = embed(made, others)
    whitened = signed((embed(original, others, raw=True) + bias).dot(kernel[:, :64]), vectors)
    assert (vectors * unit(whitened)).sum(axis=1).min() >= 0.9999
    # A shorter vector is that of a whitening to fewer dimensions.
    assert (unit(vectors[:, :32]) * unit(whitened[:, :32])).sum(axis=1).min() >= 0.9999
    done = cli("models", "show", tmp_path / "made")
    assert "then dense: 384 -> 64 (whitening.safetensors)" in done.out
    assert f"made from   {original.name}@{original.revision}, whitened on 150 texts" in done.out


def test_whitened_vectors_have_no_direction_of_their_own(cli: Any, tiny: Path, texts: Path) -> None:
    done = cli("models", "whiten", tiny, "--file", texts, "--no-normalize", "--name", "org/white")
    assert done.status == 0, done.err
    made = load_spec(tiny.with_name("tiny-whitened"))
    assert (made.name, made.dimensions, made.normalized) == ("org/white", 48, False)
    # Widths that the original was trained for are no widths of these.
    assert made.truncatable_dimensions == (32,)
    assert made.text == load_spec(tiny).text
    vectors = embed(made, [line for line in texts.read_text().splitlines() if line])
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(vectors.T), np.eye(48), atol=1e-3)


def test_other_texts_are_another_space(cli: Any, tiny: Path, texts: Path, tmp_path: Path) -> None:
    specs = [load_spec(tiny)]
    for count in (200, 150, 200):
        texts.write_text("\n".join(lines(count)))
        place = tmp_path / f"made{len(specs)}"
        assert cli("models", "whiten", tiny, "--file", texts, "--output", place).status == 0
        specs.append(load_spec(place))
    assert len({spec.space for spec in specs}) == len({spec.revision for spec in specs}) == 3
    assert (specs[1].space, specs[1].revision) == (specs[3].space, specs[3].revision)


def test_a_fit_in_batches_is_that_of_the_whole() -> None:
    random = np.random.default_rng(3)
    # Far from the origin, where sums of squares would lose what is fitted.
    vectors = (1000 + random.normal(size=(300, 6)) @ random.normal(size=(6, 6))).astype(np.float32)
    kernel, bias = compute_kernel_bias(vectors.astype(np.float64))
    weights = fit([vectors[:1], vectors[1:40], vectors[40:]], 4)
    whitened = (vectors.astype(np.float64) + bias).dot(kernel[:, :4])
    ours = vectors.astype(np.float64) @ weights["linear.weight"].T + weights["linear.bias"]
    np.testing.assert_allclose(ours, signed(whitened, ours), atol=2e-3)


def test_few_directions_may_be_missing() -> None:
    vectors = np.random.default_rng(4).normal(size=(300, 20)).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)  # as a layer norm leaves them
    assert len(fit([vectors], None)["linear.bias"]) == 19
    with pytest.raises(UserError, match="differ in 19 directions, of which 20 cannot be made"):
        fit([vectors], 20)
    with pytest.raises(UserError, match="differ in 17 directions, of which 18 cannot be made"):
        fit([vectors * (np.arange(20) > 2)], None)


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ((), None, "texts.txt: No such file or directory."),
        ((), "\n \n", "texts.txt holds nothing to embed."),
        ((), "\n".join(lines(48)), "texts.txt holds 48 texts, and 48 dimensions need more than that"),
        ((), "one text\n" * 60, "the vectors of these texts differ in 0 directions, of which 44 cannot be made"),
        (
            ("--dimensions", 48),
            "\n".join(lines(20) * 3),
            "of which 48 cannot be made: give more and other texts, or keep fewer dimensions with --dimensions 19.",
        ),
        (("--dimensions", 49), "\n".join(lines(200)), "tiny gives 48 numbers, of which --dimensions cannot keep 49."),
        ((), "\n".join([*lines(100), "x" * 2_000_000]), "sample 101 cannot be embedded: the text has"),
        ((), "\n".join([*lines(100), NAN]), "tiny gives numbers that are not finite for texts "),
    ],
)
def test_what_cannot_be_fitted(
    cli: Any, tiny: Path, texts: Path, options: Any, content: str | None, message: str
) -> None:
    texts.unlink()
    if content is not None:
        texts.write_text(content)
    done = cli("models", "whiten", tiny, "--file", texts, *options)
    assert done.status in {1, 2}
    assert message in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1
    assert {path.name for path in tiny.parent.iterdir()} <= {"tiny", "texts.txt", "cache"}


def test_what_is_not_whitened(cli: Any, tiny: Path, texts: Path, tmp_path: Path, make_tower: Any) -> None:
    assert cli("models", "whiten", tiny, "--file", texts).status == 0
    done = cli("models", "whiten", tiny, "--file", texts)
    assert done.status == 2
    assert "tiny-whitened exists: remove it" in done.err
    done = cli("models", "whiten", tiny.with_name("tiny-whitened"), "--file", texts)
    assert done.status == 2
    assert f"tiny-whitened is whitened already: whiten tiny@{load_spec(tiny).revision}." in done.err
    done = cli("models", "whiten", make_tower(tmp_path / "tower", "image"), "--file", texts)
    assert done.status == 2
    assert "tiny-image makes no dense vectors of texts" in done.err
    write_model(tmp_path / "sparse", name="sparse", kinds=("sparse",))
    assert "makes no dense vectors of texts" in cli("models", "whiten", tmp_path / "sparse", "--file", texts).err
    (tiny / "tokenizer.json").write_text("{}")
    assert "has sha256" in cli("models", "whiten", tiny, "--file", texts, "--output", tmp_path / "made").err
