"""How ColBERT-style repositories make a row of each token: those of sentence-transformers, PyLate and Stanford.

As `MultiVectorEncoder` of sentence-transformers 6.2 reads them: prompts before texts, limits of queries and documents,
queries filled up with mask tokens, and words that have no row.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tokenizers import Tokenizer

from embedmesh_cli.console import UserError
from embedmesh_cli.pull.repository import Repository, read_json

__all__ = ["Rows", "is_late_interaction", "is_stanford", "named_token", "read_rows"]

_CONFIG: Final = "config_sentence_transformers.json"
_STANFORD: Final = "HF_ColBERT"
# Keys by which a repository is known to be of PyLate, and queries to be filled up unless it says otherwise.
_PYLATE: Final = frozenset(
    {
        "query_length", "document_length", "query_expansion", "do_query_expansion", "attend_to_expansion_tokens",
        "attend_to_mask_tokens", "query_prefix", "document_prefix", "skiplist_words",
    }
)  # fmt: skip
_LENGTH: Final = 32


@dataclass(frozen=True, slots=True)
class Rows:
    """How tokens become rows.

    Attributes:
        layers: Dense layers that each token's vector goes through, as in the manifest's head.
        table: Keys of the manifest's table `multi_vector`, but the output and its width.
        text: Keys of its table `text`, in place of those that other models have.
        limit: Most tokens of a document; 0 where it is not said.
        notes: What a user should know.
    """

    layers: Sequence[Mapping[str, Any]] = ()
    table: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    limit: int = 0
    notes: Sequence[str] = ()


@dataclass(slots=True)
class _Settings:
    """What a repository says, whichever way.

    Attributes:
        query_length: Most tokens of a query.
        document_length: Most tokens of a document.
        expansion: How queries are filled up.
        skip: Words without a row.
        skip_tasks: Of which texts.
        prompts: Before texts, by role.
        markers: Prompts that are tokens, not text, where the vocabulary has them.
    """

    query_length: int = 0
    document_length: int = 0
    expansion: Mapping[str, Any] | None = None
    skip: Sequence[str] = ()
    skip_tasks: Sequence[str] = ("document",)
    prompts: Mapping[str, str] = field(default_factory=dict)
    markers: Sequence[str] = ()


def is_stanford(repository: Repository) -> bool:
    """Tell whether a repository is in Stanford's layout, with the projection among the weights."""
    return _STANFORD in (read_json(repository, "config.json").get("architectures") or ())


def is_late_interaction(repository: Repository, kinds: Sequence[str]) -> bool:
    """Tell whether modules make a row of each token."""
    config = read_json(repository, _CONFIG)
    return config.get("model_type") in ("ColBERT", "MultiVectorEncoder") or "MultiVectorMask" in kinds


def read_rows(
    repository: Repository,
    prefix: str,
    modules: Sequence[tuple[str, str]],
    read_layer: Callable[[str], Mapping[str, Any]],
) -> Rows:
    """Find out how a repository makes rows.

    Args:
        repository: Where the files are.
        prefix: Folder of the transformer in it, with its slash.
        modules: Class names and folders of the modules after the transformer.
        read_layer: Reads a dense layer, given its folder.

    Raises:
        UserError: The encoder cannot do so; the message says why.
    """
    name = repository.name
    masks: list[Mapping[str, Any]] = []
    layers: list[Mapping[str, Any]] = []
    normalized = False
    for kind, path in modules:
        if kind == "Dense" and not normalized:
            layers.append(read_layer(path))
        elif kind == "MultiVectorMask":
            masks.append(read_json(repository, f"{path}/config.json", needed=True))
        elif kind == "Normalize":
            normalized = True
        else:
            raise UserError(f"{name} has a module {kind}, which the encoder does not know of rows of tokens.")
    settings = _settings(repository, prefix)
    for mask in masks:
        if mask.get("keep_only_token_ids"):
            raise UserError(f"{name} has rows for some ids only (keep_only_token_ids), which the encoder cannot.")
        settings.skip = mask.get("skiplist_words") or ()
        settings.skip_tasks = mask.get("skiplist_tasks") or ("document",)
    if settings.skip and "document" not in settings.skip_tasks:
        raise UserError(f"{name} leaves words out of queries only, which the encoder cannot.")
    tokenizer = _tokenizer(repository, prefix)
    skip_tokens, notes = _skipped(tokenizer, settings.skip)
    table = {
        # Those of PyLate and Stanford list no such module, and normalise all the same.
        "normalized": normalized or not masks,
        "skip_tokens": skip_tokens,
        "skip_in_queries": "query" in settings.skip_tasks and bool(skip_tokens),
        "query_length": settings.query_length,
        **_expansion(repository, prefix, settings, tokenizer),
    }
    special = [marker for text in settings.markers if (marker := _marker(tokenizer, text))]
    text = {
        "prompts": {role: prompt for role, prompt in settings.prompts.items() if prompt},
        **({"extra_special_tokens": special} if special else {}),
    }
    defaults: dict[str, Any] = {"normalized": True, "skip_tokens": [], "skip_in_queries": False, "query_length": 0}
    said = {key: value for key, value in table.items() if key not in defaults or value != defaults[key]}
    return Rows(layers, said, text, settings.document_length, notes)


def _settings(repository: Repository, prefix: str) -> _Settings:
    if is_stanford(repository) and "modules.json" not in repository.files:
        return _of_stanford(read_json(repository, "artifact.metadata"))
    config = read_json(repository, _CONFIG)
    prompts = {role: text for role, text in (config.get("prompts") or {}).items() if text}
    if _PYLATE & config.keys():
        return _of_pylate(config, prompts)
    own = read_json(repository, f"{prefix}sentence_bert_config.json")
    return _Settings(
        own.get("query_length") or 0, own.get("document_length") or 0, own.get("query_expansion"), prompts=prompts
    )


def _of_stanford(metadata: Mapping[str, Any]) -> _Settings:
    markers = [metadata.get("query_token_id") or "[unused0]", metadata.get("doc_token_id") or "[unused1]"]
    length = metadata.get("query_maxlen") or _LENGTH
    return _Settings(
        length,
        metadata.get("doc_maxlen") or 0,
        {"strategy": "fixed", "attend": bool(metadata.get("attend_to_mask_tokens")), "length": length},
        list(string.punctuation) if metadata.get("mask_punctuation", True) else (),
        prompts=dict(zip(("query", "document"), (f"{marker} " for marker in markers), strict=True)),
        markers=markers,
    )


def _of_pylate(config: Mapping[str, Any], prompts: Mapping[str, str]) -> _Settings:
    markers = []
    prompts = dict(prompts)
    for role in ("query", "document"):
        if f"{role}_prefix" in config:
            marker = config[f"{role}_prefix"] or ""
            markers.append(marker)
            prompts[role] = marker + prompts.get(role, "").removeprefix(marker)
    length = config.get("query_length")
    expansion = config.get("query_expansion")
    if "query_expansion" not in config and config.get("do_query_expansion") is not False:
        attend = config.get("attend_to_expansion_tokens", config.get("attend_to_mask_tokens"))
        length = length or _LENGTH
        expansion = {"strategy": "fixed", "attend": bool(attend), "length": length}
    skip = config.get("skiplist_words")
    return _Settings(
        length or 0,
        config.get("document_length") or 0,
        expansion,
        list(string.punctuation) if skip is None else skip,
        prompts=prompts,
        markers=markers,
    )


def _tokenizer(repository: Repository, prefix: str) -> Tokenizer:
    """Read the tokenizer; that it is there and well is seen to elsewhere."""
    file = next(f"{at}tokenizer.json" for at in (prefix, "") if f"{at}tokenizer.json" in repository.files)
    return Tokenizer.from_file(str(repository.fetch([file]) / file))


def _skipped(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[list[int], list[str]]:
    """Give the ids of words without a row, and a note on those that are no token."""
    ids = {word: tokenizer.token_to_id(word) for word in words}
    missing = [word for word, number in ids.items() if number is None]
    listed = json.dumps(missing, ensure_ascii=False)
    notes = [f"words of its skip list that are no token of its vocabulary, and so are not skipped: {listed}"]
    return sorted({number for number in ids.values() if number is not None}), notes if missing else []


def _expansion(repository: Repository, prefix: str, settings: _Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Say how queries are filled up; of a fixed length, they are cut there, too."""
    expansion = settings.expansion
    if not expansion:
        return {}
    length = expansion.get("length")
    if expansion.get("strategy") not in ("fixed", "min") or not isinstance(length, int) or length < 1:
        raise UserError(f"{repository.name} fills queries up in a way that the encoder does not know ({expansion}).")
    token = (
        expansion.get("token")
        or named_token(repository, prefix, "mask_token")
        or named_token(repository, prefix, "eos_token")
    )
    number = tokenizer.token_to_id(token) if token else None
    if number is None:
        raise UserError(
            f"{repository.name} fills queries up, but its tokenizer_config.json names no mask_token or eos_token of "
            "the vocabulary."
        )
    fixed = {"query_length": length} if expansion["strategy"] == "fixed" else {}
    attend = {"attend_to_expansion": True} if expansion.get("attend") else {}
    return {**fixed, "expand_to": length, "expansion_token": number, **attend}


def named_token(repository: Repository, prefix: str, key: str) -> str:
    """Give a special token by the name that its tokenizer's configuration has for it; "" if there is none."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(repository, f"{prefix}{file}").get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return ""


def _marker(tokenizer: Tokenizer, prompt: str) -> str:
    """Give the token that a prompt is meant to be, if the tokenizer does not find it in texts by itself."""
    for token in (prompt, prompt.split(None, 1)[0]) if prompt.split() else ():
        if tokenizer.token_to_id(token) is not None:
            return token if tokenizer.encode(token, add_special_tokens=False).tokens != [token] else ""
    return ""
