"""Token ids of a text's beginning or end, without reading much more text than is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final

from tokenizers import AddedToken, Tokenizer

from embedmesh_encoder.model import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Content", "Tokens", "WindowedTokenizer"]

# Characters that are always read, so that token counts are exact for texts up to this length.
WINDOW: Final = 8192
# Tokens this near to a cut are never trusted, whatever word they belong to: more than any grapheme
# cluster or special token, so that nothing that normalisation merges or matches lies across.
MARGIN: Final = 64
# Pre-tokenizers that decide whether a word ends by looking at the two characters there. Others (a
# regex that groups digits by three from the left) may shift when the text's beginning is cut off.
_LOCAL: Final = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Metaspace", "Punctuation"})


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text, special tokens included.

    Attributes:
        ids: At most as many as the model reads.
        total: How many the whole text has; a lower bound, above the model's limit, unless `exact`.
        exact: Whether the whole text was read.
    """

    ids: list[int]
    total: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Content:
    """All tokens of a text behind a prompt, without special tokens.

    Attributes:
        prompt: Ids of the tokens that hold nothing of the text.
        ids: Ids of the others.
        ends: Where each of the others ends, in characters of the text.
    """

    prompt: list[int]
    ids: list[int]
    ends: list[int]


class WindowedTokenizer:
    """A `tokenizer.json` with the truncation of `transformers`: special tokens stay, content is cut.

    Equal to tokenising everything and cutting afterwards. It gets there by tokenising a window at
    the kept end of the text, grown until it holds enough tokens that cannot be influenced by what
    lies beyond: whole words (in the pre-tokenizer's sense: models see one word at a time) that
    are followed by another word and end `MARGIN` characters before the cut.

    Thread-safe; tokenising releases the GIL.
    """

    def __init__(
        self,
        path: Path,
        max_units: int,
        window: int = WINDOW,
        *,
        extra_special_tokens: Sequence[str] = (),
        add_special_tokens: bool = True,
    ) -> None:
        """Load the tokenizer.

        Args:
            path: The `tokenizer.json`. Its own truncation and padding settings are switched off.
            max_units: Most tokens to keep, special tokens included.
            window: Characters that are always read.
            extra_special_tokens: Of its vocabulary, to be found in texts as they stand.
            add_special_tokens: Whether the post-processor's tokens surround a text.

        Raises:
            ModelError: The file is not a tokenizer, lacks a token, or leaves no room for content.
        """
        try:
            text = path.read_text(encoding="utf-8")
            self._tokenizer = Tokenizer.from_str(text)
            pre = json.loads(text).get("pre_tokenizer")
        except Exception as error:  # noqa: BLE001  (it is what the library raises)
            raise ModelError(f"cannot read the tokenizer {path}: {error}; fetch the model again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for token in extra_special_tokens:
            if self._tokenizer.token_to_id(token) is None:
                raise ModelError(f"{path} has no token {token!r}, which the manifest has among extra_special_tokens")
        self._tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in extra_special_tokens]
        )
        self._window = window
        self._local = _is_local(pre)
        added = self._tokenizer.get_added_tokens_decoder()
        self._margin = max([MARGIN, *(2 * len(token.content) for token in added.values())])
        self._before, self._after = self._special_ids(path) if add_special_tokens else ([], [])
        self._special = frozenset((*self._after, *(number for number, token in added.items() if token.special)))
        self._max_units = max_units
        if max_units <= self.overhead:
            raise ModelError(f"{path}: max_input_units {max_units} leaves no room beside the special tokens")

    @property
    def vocabulary(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, text: str, *, keep_end: bool = False, max_units: int = 0) -> Tokens:
        """Give the first tokens of a text (the last ones with `keep_end`), within special tokens.

        Args:
            text: Any text without lone surrogates.
            keep_end: Whether to cut the beginning.
            max_units: Most tokens to keep, where that is less than usual.
        """
        room = (max_units or self._max_units) - self.overhead
        content, exact = self._content(text, room, keep_end=keep_end)
        total = len(content) + self.overhead
        kept = content[-room:] if keep_end else content[:room]
        return Tokens(self.within_specials(kept), total, exact)

    @property
    def overhead(self) -> int:
        """How many special tokens a text has."""
        return len(self._before) + len(self._after)

    def whole(self, prompt: str, text: str) -> Content:
        """Tokenise a text of any length behind its prompt, as `encode` does before it cuts."""
        encoding = self._tokenizer.encode_batch([prompt + text], add_special_tokens=False)[0]
        ids, first = encoding.ids, 0
        if prompt:
            first = sum(1 for _ in takewhile(lambda offsets: offsets[1] <= len(prompt), encoding.offsets))
        return Content(ids[:first], ids[first:], [end - len(prompt) for _, end in encoding.offsets[first:]])

    @property
    def before(self) -> int:
        """How many special tokens stand before a text."""
        return len(self._before)

    def within_specials(self, ids: list[int]) -> list[int]:
        """Put the special tokens around ids."""
        return [*self._before, *ids, *self._after]

    def prompt_units(self, prompt: str) -> int:
        """Tell how many tokens at a text's beginning are a prompt's, as sentence-transformers counts them."""
        ids = self.encode(prompt).ids
        return len(ids) - (ids[-1] in self._special) if prompt else 0

    def _content(self, text: str, room: int, *, keep_end: bool) -> tuple[list[int], bool]:
        """Give all content ids of the text and True, or more than fit and False."""
        size = self._window if self._local or not keep_end else len(text)
        while size < len(text):
            trusted = self._trusted(text[-size:] if keep_end else text[:size], keep_end=keep_end)
            if len(trusted) > room:  # one more than fits proves that something is cut
                return trusted, False
            size *= 4  # a text without word ends is read 7/3 times in all
        return self._whole(text), True

    def _whole(self, text: str) -> list[int]:
        # The batch functions, unlike `encode`, release the GIL; the fast one does not track offsets.
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return list(encoding.ids)

    def _trusted(self, window: str, *, keep_end: bool) -> list[int]:
        """Give the ids of a window's tokens that are the same in the whole text."""
        encoding = self._tokenizer.encode_batch([window], add_special_tokens=False)[0]
        ids, words, offsets = encoding.ids, encoding.word_ids, encoding.offsets
        if keep_end:
            first = 0
            while first < len(ids) and (words[first] == words[0] or offsets[first][0] < self._margin):
                first += 1
            return list(ids[first:])
        last = len(ids)
        while last and (words[last - 1] == words[-1] or offsets[last - 1][1] > len(window) - self._margin):
            last -= 1
        return list(ids[:last])

    def _special_ids(self, path: Path) -> tuple[list[int], list[int]]:
        """Find the ids that the post-processor puts before and after the content."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a").ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise ModelError(f"{path}: special tokens are not simply put before and after the text")


def _is_local(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True  # the whole text is one word: nothing is trusted until all is read
    if pre_tokenizer["type"] == "Sequence":
        return all(_is_local(one) for one in pre_tokenizer["pretokenizers"])
    return pre_tokenizer["type"] in _LOCAL
