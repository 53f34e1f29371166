"""The `Preparer` of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import EmbedMeshError, InputTooLarge, InvalidRequest, UnsupportedOutput
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import text_pb2
from embedmesh.vectors import l2_norms, normalized
from embedmesh_encoder.head import Head
from embedmesh_encoder.model import ModelError, ModelSpec
from embedmesh_encoder.pooling import Sparse, lexical, nonzero, pool, splade
from embedmesh_encoder.preparation import Others, Prepared
from embedmesh_encoder.text.template import TemplatedTokenizer
from embedmesh_encoder.text.tokens import Content, Tokens, WindowedTokenizer

__all__ = [
    "MAX_PASSES",
    "MAX_SPANS",
    "MAX_TEXT_BYTES",
    "Chunking",
    "LateChunking",
    "TextItem",
    "TextPreparer",
    "fill_rows",
]

MAX_TEXT_BYTES: Final = 1 << 20
# Of the model, for one text: at 512 tokens a pass they fill the queue that an encoder has by default.
MAX_PASSES: Final = 128
MAX_SPANS: Final = 1024
_MAX_INSTRUCTIONS: Final = 16

# MiniLM's tokenizer takes 0.27 us a character, and as much for a text as for 30 of them.
_QUICK_CHARACTERS: Final = 1000
_TEXT_CHARACTERS: Final = 30
_KEPT_PROMPTS: Final = 256


@dataclass(frozen=True, slots=True)
class Chunking:
    """How TRUNCATION_CHUNK cuts.

    Attributes:
        units: Most tokens of a chunk, special tokens and prompt included; 0 for as many as the model reads.
        overlap: Tokens of text that a chunk has in common with the one before.
    """

    units: int = 0
    overlap: int = 0


@dataclass(frozen=True, slots=True)
class LateChunking:
    """Which parts of a text get a vector.

    Attributes:
        offsets: Their starts and ends in characters, in turns.
        units: Tokens of each, instead.
    """

    offsets: tuple[int, ...] = ()
    units: int = 0


@dataclass(frozen=True, slots=True)
class TextItem:
    """One text to embed.

    Attributes:
        text: Any Unicode text, the empty one included.
        role: Chooses the model's own prompt.
        instruction: Put before the text in place of the role's prompt, unless empty.
        instructions: Several in place of role and instruction: the text is embedded with each.
        chunking: How the text is cut under CHUNK.
        late_chunking: Which parts of it get a vector of their own.
    """

    text: str
    role: text_pb2.TextRole.ValueType = text_pb2.TEXT_ROLE_UNSPECIFIED
    instruction: str = ""
    instructions: tuple[str, ...] = ()
    chunking: Chunking = Chunking()
    late_chunking: LateChunking | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """All strings that a caller gave."""
        return (self.text, self.instruction, *self.instructions)


class TextPreparer:
    """Tokenises texts and lays them out, packed or padded as the model's graph wants it.

    Packed: texts lie end to end. With `row_width` 0 all of a batch share one row, which is best on
    a CPU; otherwise they are packed into as few rows of at most `row_width` tokens as first-fit
    gives. Prepared data are token ids, int64 [units].
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_text_bytes: int = MAX_TEXT_BYTES,
        *,
        row_width: int = 0,
        row_multiple: int = 1,
    ) -> None:
        """Load the tokenizer.

        Args:
            spec: A text model, or one of pictures that reads texts with them.
            max_text_bytes: Most bytes of UTF-8 of a text and its instruction together.
            row_width: Most tokens of a packed row (a longer text still gets a row); 0 packs one row.
            row_multiple: Rows are filled up to a multiple of this, for backends that want few
                shapes; padded ones to no more than the model reads.

        Raises:
            ModelError: The model is not for text, or its tokenizer or the weights of its head cannot be used, or it
                knows more tokens than a sparse vector has room for.
        """
        if spec.text is None:
            raise ModelError(f'model "{spec.name}" is for {spec.modality}, not for text')
        self.limits: Mapping[str, int] = {"text_bytes": max_text_bytes, "text_passes": MAX_PASSES}
        self.padded = spec.graph.layout == "padded"
        # What late chunking needs: a vector for each token, and that their mean is a vector of the model.
        self._has_spans = self.padded and spec.graph.pooling == "mean" and pb.EMBEDDING_KIND_DENSE in spec.kinds
        if self._has_spans:
            self.limits = {**self.limits, "text_spans": MAX_SPANS}
        self._max_units = spec.max_input_units
        path = spec.path(spec.text.tokenizer)
        self._tokenizer = (
            TemplatedTokenizer(path, spec.max_input_units, spec.text)
            if spec.text.template
            else WindowedTokenizer(
                path,
                spec.max_input_units,
                extra_special_tokens=spec.text.extra_special_tokens,
                add_special_tokens=spec.text.add_special_tokens,
            )
        )
        self._prompts = {
            text_pb2.TEXT_ROLE_QUERY: spec.text.query_prompt,
            text_pb2.TEXT_ROLE_DOCUMENT: spec.text.document_prompt,
        }
        self._default_prompt = spec.text.prompts.default
        self._include_prompt = spec.text.include_prompt
        # A service has few prompts, and callers few instructions.
        self._prompt_units = lru_cache(_KEPT_PROMPTS)(self._tokenizer.prompt_units)
        self._pad_to_max = spec.text.pad == "max_input_units"
        self._pad_id = spec.text.pad_id
        self._graph = spec.graph
        self._head = Head(spec)
        self._row_width = row_width
        self._row_multiple = row_multiple
        self._sparse = spec.sparse
        self._multi = spec.multi_vector
        size = spec.sparse.dimensions if spec.sparse and spec.sparse.pooling == "tokens" else 0
        if size and (vocabulary := self._tokenizer.vocabulary) > size:
            raise ModelError(f'model "{spec.name}" has {vocabulary} tokens, too many for sparse.dimensions = {size}')
        least = len(self._tokenizer.encode("a").ids)
        if self._multi and 0 < self._multi.query_length < least:
            raise ModelError(
                f'model "{spec.name}" has multi_vector.query_length = {self._multi.query_length}, which leaves no room '
                f"for a text ({least} tokens at least)"
            )

    def is_quick(self, items: Sequence[TextItem | EmbedMeshError]) -> bool:
        """Whether the texts are few and short."""
        size = 0
        for item in items:
            if isinstance(item, TextItem):
                size += _TEXT_CHARACTERS + len(item.instruction) + len(item.text)
                if item.instructions:
                    size += len(item.instructions) * (_TEXT_CHARACTERS + len(item.text))
        return size <= _QUICK_CHARACTERS

    def prepare(self, item: TextItem, truncation: pb.Truncation.ValueType) -> Prepared:
        """Tokenise one text; equal to the reference library's ids, but see `tokens.py` for the cost.

        Args:
            item: The text.
            truncation: START keeps the last tokens, REFUSE cuts nothing, CHUNK makes a pass of each chunk, all else
                keeps the first. A prompt is part of the text: START drops it first; each chunk has it.

        Raises:
            InvalidRequest: The text holds lone surrogates, or nothing that the model can read; or its instructions
                cannot be used, or its chunks have no room for the prompt.
            InputTooLarge: It has too many bytes, too many tokens under REFUSE, takes too many passes, or has a prompt
                that leaves nothing to pool.
        """
        if item.instructions:
            _check_instructions(item)
        try:
            size = sum(len(given.encode()) for given in item.given)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text holds a lone surrogate (character {error.start}), which is not Unicode text"
            ) from None
        if size > self.limits["text_bytes"]:
            raise InputTooLarge.over("the text", size, self.limits["text_bytes"], "bytes")
        if not item.instructions:
            prompt = item.instruction or self._prompts.get(item.role, self._default_prompt)
            if item.late_chunking is not None:
                return self._with_spans(item, prompt, item.late_chunking)
            first, *rest = self._passes(item, prompt, truncation, MAX_PASSES)
        else:
            many = len(item.instructions)
            first, *rest = (
                replace(one, weight=one.weight / many)
                for prompt in item.instructions
                for one in self._passes(item, prompt, truncation, MAX_PASSES // many)
            )
        return replace(first, more=tuple(rest)) if rest else first

    def _with_spans(self, item: TextItem, prompt: str, wanted: LateChunking) -> Prepared:
        """Prepare a text whose spans get vectors."""
        if not self._has_spans:
            raise UnsupportedOutput(
                "this model gives no vectors of tokens that are pooled by their mean, which late chunking needs; "
                "`embedmesh models export --layout padded` makes such a graph of a model with mean pooling",
                field="late_chunking",
                metadata={"option": "late_chunking"},
            )
        total = self._tokenizer.encode(prompt + item.text).total
        if total > self._max_units:
            error = InputTooLarge.over("the text", total, self._max_units, "tokens")
            error.message += ", all of which late chunking reads at once: cut the text"
            raise error
        content = self._tokenizer.whole(prompt, item.text)
        offsets = _offsets(wanted, item.text, content.ends)
        # Those tokens that end within a span: their ends never descend.
        spans = np.searchsorted(np.array(content.ends, np.int64), offsets, side="right")
        empty = np.flatnonzero(spans[:, 0] == spans[:, 1])
        if len(empty):
            raise InvalidRequest(
                f"span {empty[0]} of the text, characters {offsets[empty[0], 0]} to {offsets[empty[0], 1]}, holds "
                "the end of no token",
                field="late_chunking.offsets",
            )
        if not len(offsets):  # a text without tokens has none
            return self._pass(item, prompt, pb.TRUNCATION_END)
        ids = self._tokenizer.within_specials([*content.prompt, *content.ids])
        prepared = self._prepared(item, ids, len(ids), skipped=self._before_text(content))
        return replace(prepared, spans=spans + self._tokenizer.before + len(content.prompt), offsets=offsets)

    def _passes(self, item: TextItem, prompt: str, truncation: pb.Truncation.ValueType, most: int) -> list[Prepared]:
        """Prepare a text behind one prompt: one pass, or under CHUNK one for each of at most so many chunks."""
        if truncation != pb.TRUNCATION_CHUNK:
            return [self._pass(item, prompt, truncation)]
        units = min(item.chunking.units or self._max_units, self._limit(item))
        tokens = self._tokenizer.encode(prompt + item.text)
        if tokens.exact and tokens.total <= units:
            return [self._pass(item, prompt, truncation)]
        content = self._tokenizer.whole(prompt, item.text)
        room = units - self._tokenizer.overhead - len(content.prompt)
        if room <= item.chunking.overlap:
            raise InvalidRequest(
                f"a chunk of {units} tokens has room for {max(room, 0)} of the text beside special tokens and prompt, "
                f"and must have more than the overlap of {item.chunking.overlap}: choose longer chunks or a smaller "
                "overlap"
            )
        step = room - item.chunking.overlap
        count = 1 + -(-(len(content.ids) - room) // step)
        if count > most:
            error = InputTooLarge.over("the text", count, most, "chunks")
            error.message += (
                f": a text takes at most {MAX_PASSES} passes of the model; choose longer chunks or a smaller overlap, "
                "or cut the text"
            )
            raise error
        chunks = [content.ids[start : start + room] for start in range(0, count * step, step)]
        whole = sum(map(len, chunks))
        skipped = self._before_text(content)
        return [
            self._prepared(
                item,
                ids := self._tokenizer.within_specials([*content.prompt, *chunk]),
                len(ids),
                len(chunk) / whole,
                skipped=skipped,
            )
            for chunk in chunks
        ]

    def _before_text(self, content: Content) -> int:
        """Tell how many of the first tokens pooling leaves out, as `_skipped` does for texts that are not cut here."""
        return 0 if self._include_prompt or not content.prompt else self._tokenizer.before + len(content.prompt)

    def _pass(self, item: TextItem, prompt: str, truncation: pb.Truncation.ValueType) -> Prepared:
        limit = self._limit(item)
        keep_end = truncation == pb.TRUNCATION_START
        tokens = self._tokenizer.encode(prompt + item.text, keep_end=keep_end, max_units=limit)
        if not tokens.ids:
            raise InvalidRequest("the text holds nothing that this model can read")
        if tokens.total > limit and truncation == pb.TRUNCATION_REFUSE:
            count = f"{tokens.total}" if tokens.exact else f"at least {tokens.total}"
            raise InputTooLarge(
                f"the text has {count} tokens, the limit is {limit}",
                metadata={"limit": str(limit), "actual": str(tokens.total), "unit": "tokens"},
            )
        skipped = 0
        if not self._include_prompt:
            skipped = self._skipped(prompt, tokens, keep_end=keep_end and tokens.total > len(tokens.ids))
        return self._prepared(item, tokens.ids, tokens.total, skipped=skipped)

    def _limit(self, item: TextItem) -> int:
        """Tell how many tokens of a text are read."""
        query = item.role == text_pb2.TEXT_ROLE_QUERY
        return (self._multi.query_length if self._multi and query else 0) or self._max_units

    def _prepared(
        self, item: TextItem, tokens: list[int], total: int, weight: float = 1.0, *, skipped: int = 0
    ) -> Prepared:
        query = item.role == text_pb2.TEXT_ROLE_QUERY
        ids, expansion = self._expanded(tokens, query=query)
        rows = None
        if self._multi:
            rows = np.arange(len(ids)) >= self._multi.skip_first
            if not query or self._multi.skip_in_queries:
                rows &= ~np.isin(ids, self._multi.skip_tokens)
        return Prepared(
            ids,
            units=len(ids),
            original_units=max(total, len(ids)),
            truncated=total > len(tokens),
            prompt=skipped,
            expansion=expansion,
            rows=rows,
            weight=weight,
        )

    def _skipped(self, prompt: str, tokens: Tokens, *, keep_end: bool) -> int:
        """Tell how many of a text's first tokens pooling leaves out: the prompt's, and the special ones before it."""
        units = self._prompt_units(prompt)
        if keep_end:
            # What was cut from the beginning was cut from the prompt; of a text that was not read whole, all of it.
            units = max(0, units - (tokens.total - len(tokens.ids))) if tokens.exact else 0
        if units >= len(tokens.ids):
            raise InputTooLarge.over("the prompt", units, len(tokens.ids) - 1, "tokens")
        return units

    def _expanded(self, tokens: list[int], *, query: bool) -> tuple[NDArray[np.int64], int]:
        """Fill a query up, as ColBERT does; gives the ids, and how many of them attention leaves out."""
        ids = np.array(tokens, np.int64)
        multi = self._multi
        if multi is None or not query or (missing := multi.expand_to - len(ids)) <= 0:
            return ids, 0
        filled = np.concatenate([ids, np.full(missing, multi.expansion_token, np.int64)])
        return filled, 0 if multi.attend_to_expansion else missing

    def collate(self, batch: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        """Lay texts out as int64 feeds; `embedmesh_encoder.model` describes the two layouts."""
        return self._collate_padded(batch) if self.padded else self._collate_packed(batch)

    def split(self, outputs: Mapping[str, NDArray[Any]], batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Give one vector a text: float32 [n, d], as pooled, not normalised."""
        output = outputs[self._graph.output]
        if self._graph.pooling != "graph":
            lengths = np.array([prepared.units for prepared in batch], np.int64)
            starts = np.array([prepared.prompt for prepared in batch], np.int64)
            output = pool(self._graph.pooling, output, lengths, starts)
        return self._head(output)

    def split_spans(self, outputs: Mapping[str, NDArray[Any]], place: int, prepared: Prepared) -> NDArray[np.float32]:
        """Give the mean of the tokens of each span."""
        assert prepared.spans is not None  # noqa: S101  (the caller looked)
        hidden = outputs[self._graph.output][place]
        return self._head(np.stack([hidden[start:end].mean(axis=0, dtype=np.float32) for start, end in prepared.spans]))

    def split_others(self, outputs: Mapping[str, NDArray[Any]], batch: Sequence[Prepared]) -> list[Others]:
        """Give what each text wants besides its dense vector."""
        others = []
        for i, (place, prepared) in enumerate(zip(self._places(batch), batch, strict=True)):
            sparse = rows = None
            if pb.EMBEDDING_KIND_SPARSE in prepared.kinds and self._sparse:
                output = outputs[self._sparse.output]
                # A text's sparse vector, or what its tokens gave.
                sparse = self._pool_sparse(output[i if self._sparse.pooling == "graph" else place], prepared)
            if pb.EMBEDDING_KIND_MULTI_VECTOR in prepared.kinds and self._multi:
                rows = outputs[self._multi.output][place][prepared.rows].astype(np.float32, copy=False)
                if self._multi.normalized:
                    rows = normalized(rows, l2_norms(rows))
            others.append(Others(sparse, rows))
        return others

    def _pool_sparse(self, found: NDArray[np.float32], prepared: Prepared) -> Sparse:
        assert self._sparse  # noqa: S101  (the caller asked)
        if self._sparse.pooling == "tokens":
            counted = ~np.isin(prepared.data, self._sparse.skip_tokens)
            return lexical(found.reshape(-1)[counted], prepared.data[counted])
        weights = splade(found) if self._sparse.pooling == "max" else found.copy()
        weights[list(self._sparse.skip_tokens)] = 0
        return nonzero(np.arange(len(weights)), weights)

    def _places(self, batch: Sequence[Prepared]) -> list[tuple[int, slice]]:
        """Say where the tokens of each text of a batch lie: in which row, and where in it."""
        units = [prepared.units for prepared in batch]
        if self.padded:
            return [(i, slice(count)) for i, count in enumerate(units)]
        places: dict[int, tuple[int, slice]] = {}
        for r, row in enumerate(self._rows(units)):
            ends = np.cumsum([units[i] for i in row]).tolist()
            places |= {i: (r, slice(end - units[i], end)) for i, end in zip(row, ends, strict=True)}
        return [places[i] for i in range(len(batch))]

    def _rows(self, units: Sequence[int]) -> list[list[int]]:
        return fill_rows(units, self._row_width) if self._row_width else [list(range(len(units)))]

    def _collate_packed(self, batch: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        units = [prepared.units for prepared in batch]
        rows = self._rows(units)
        longest = max(sum(units[i] for i in row) for row in rows)
        width = -(-longest // self._row_multiple) * self._row_multiple
        ids = np.zeros((len(rows), width), np.int64)
        positions = np.zeros((len(rows), width), np.int64)
        segments = np.full((len(rows), width), -1, np.int64)
        for r, row in enumerate(rows):
            start = 0
            for i in row:
                end = start + units[i]
                ids[r, start:end] = batch[i].data
                positions[r, start:end] = np.arange(units[i])
                segments[r, start:end] = i
                start = end
        return {"input_ids": ids, "position_ids": positions, "segment_ids": segments}

    def _collate_padded(self, batch: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        attended = np.array([prepared.units - prepared.expansion for prepared in batch])
        longest = max(prepared.units for prepared in batch)
        width = -(-longest // self._row_multiple) * self._row_multiple
        # The table of positions may end with the longest input.
        shape = (len(batch), max(longest, self._max_units if self._pad_to_max else min(width, self._max_units)))
        ids = np.full(shape, self._pad_id, np.int64)
        for row, prepared in zip(ids, batch, strict=True):
            row[: prepared.units] = prepared.data
        feeds = {
            "input_ids": ids,
            "attention_mask": (np.arange(shape[1])[None, :] < attended[:, None]).astype(np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
            "position_ids": np.broadcast_to(np.arange(shape[1]), shape),
        }
        return {name: feeds[name] for name in self._graph.inputs if name in feeds}  # pictures are not made here


def _check_instructions(item: TextItem) -> None:
    if len(item.instructions) > _MAX_INSTRUCTIONS:
        raise InputTooLarge.over(
            "the list", len(item.instructions), _MAX_INSTRUCTIONS, "instructions", field="instructions"
        )
    if item.late_chunking is not None:
        raise InvalidRequest("give instructions or late_chunking, not both", field="late_chunking")
    if item.instruction or item.role:
        other = "instruction" if item.instruction else "role"
        raise InvalidRequest(f"give instructions or {other}, not both", field=other)
    if "" in item.instructions:
        raise InvalidRequest("an instruction is empty: leave it out", field="instructions")


def _offsets(wanted: LateChunking, text: str, ends: list[int]) -> NDArray[np.int64]:
    """Give start and end of every span, int64 [spans, 2]."""
    if bool(wanted.offsets) == bool(wanted.units):
        raise InvalidRequest("late chunking takes either offsets or units, above 0", field="late_chunking")
    if wanted.units:
        # Each once: several tokens may end within one character.
        last = list(dict.fromkeys(ends[wanted.units - 1 : -1 : wanted.units] + ends[-1:]))
        _require_few(len(last))
        return np.array(list(zip([0, *last], last, strict=False)), np.int64).reshape(-1, 2)
    if len(wanted.offsets) % 2:
        raise InvalidRequest(
            f"{len(wanted.offsets)} offsets make no pairs of start and end", field="late_chunking.offsets"
        )
    _require_few(len(wanted.offsets) // 2)
    offsets = np.array(wanted.offsets, np.int64).reshape(-1, 2)
    for i, (start, end) in enumerate(offsets.tolist()):
        if not start < end <= len(text) or (i and start < offsets[i - 1, 0]):
            raise InvalidRequest(
                f"span {i} is characters {start} to {end}: spans lie within the {len(text)} characters of the text, "
                "hold at least one, and come in the order of their starts",
                field="late_chunking.offsets",
            )
    return offsets


def _require_few(spans: int) -> None:
    if spans > MAX_SPANS:
        raise InputTooLarge.over("the text", spans, MAX_SPANS, "spans", field="late_chunking")


def fill_rows(units: Sequence[int], width: int) -> list[list[int]]:
    """Pack texts into rows of at most `width` units by first-fit decreasing; a longer text has its own row.

    First-fit decreasing needs at most 11/9 of the fewest possible rows, plus one (Johnson, 1973).

    Returns:
        For each row the indices of its texts, ascending.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(units)), key=lambda i: -units[i]):
        for r, free in enumerate(left):
            if units[i] <= free:
                rows[r].append(i)
                left[r] -= units[i]
                break
        else:
            rows.append([i])
            left.append(width - units[i])
    return [sorted(row) for row in rows]
