"""Token ids of a text in a prompt that stands around it, with a place for a picture."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Final

from embedmesh.errors import InvalidRequest
from embedmesh_encoder.model import ModelError
from embedmesh_encoder.text.tokens import WINDOW, Content, Tokens, WindowedTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from embedmesh_encoder.model import TextSpec

__all__ = ["TemplatedTokenizer"]

_TEXT: Final = "{text}"


class TemplatedTokenizer(WindowedTokenizer):
    """A tokenizer whose texts stand in the manifest's template.

    Prompt and text are tokenised as one string, as the reference library does it. What is cut is the text alone: the
    template stays whole, and so does the picture. The token of a picture is given a name by chance, which no text can
    hold: where a text says "<image>", these are seven characters like any others.
    """

    def __init__(self, path: Path, max_units: int, spec: TextSpec, window: int = WINDOW) -> None:
        """Load the tokenizer.

        Args:
            path: As for `WindowedTokenizer`, like the others.
            max_units: Most tokens to keep, those of the template and the picture included.
            spec: Has a template.
            window: Characters that are always read.

        Raises:
            ModelError: The file is not a tokenizer, does not know the picture's token, or leaves no room for a text.
        """
        super().__init__(path, max_units, window)
        name = secrets.token_hex(16)
        self._image_id: int | None = None
        if spec.image_token:
            self._image_id = self._tokenizer.token_to_id(spec.image_token)
            self._tokenizer = self._tokenizer.from_str(_renamed(path, spec.image_token, name))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self._head, _, self._tail = (
            part.replace(spec.image_token, name) if spec.image_token else part
            for part in spec.template.partition(_TEXT)
        )
        self._image_tokens = spec.image_tokens
        if self._image_id is not None and self._tokenizer.token_to_id(name) != self._image_id:
            raise ModelError(f'{path}: the id of "{spec.image_token}" cannot be told')
        least = len(self.encode("").ids)
        if least >= max_units:
            raise ModelError(f"{path}: max_input_units {max_units} leaves no room beside a template of {least} tokens")

    def encode(self, text: str, *, keep_end: bool = False, max_units: int = 0) -> Tokens:
        """Give the template with the first tokens of a text (the last ones with `keep_end`)."""
        size = self._window if self._local or not keep_end else len(text)
        while True:
            part = text[len(text) - min(size, len(text)) :] if keep_end else text[:size]
            exact = len(part) == len(text)
            before, content, after = self._parts(part, exact=exact, keep_end=keep_end)
            room = max(0, (max_units or self._max_units) - self.overhead - len(before) - len(after))
            if exact or len(content) > room:  # one more than fits proves that something is cut
                break
            size *= 4
        kept = content[len(content) - min(room, len(content)) :] if keep_end else content[:room]
        ids = [*self._before, *before, *kept, *after, *self._after]
        return Tokens(ids, len(ids) + len(content) - len(kept), exact)

    def whole(self, prompt: str, text: str) -> Content:
        """Refuse what is done with pieces of a text."""
        del prompt, text
        raise InvalidRequest("texts of this model stand in a template, and cannot be read in chunks: truncate them")

    def _parts(self, part: str, *, exact: bool, keep_end: bool) -> tuple[list[int], list[int], list[int]]:
        """Give the ids before, of and after a text, of which those near a cut are left out that may be others."""
        # With offsets, and without holding the GIL.
        encoding = self._tokenizer.encode_batch([self._head + part + self._tail], add_special_tokens=False)[0]
        ids, words, offsets = encoding.ids, encoding.word_ids, encoding.offsets
        start, end = len(self._head), len(self._head) + len(part)
        first = sum(begin < start for begin, _ in offsets)
        last = max(first, sum(stop <= end for _, stop in offsets))
        cut, kept = first, last
        if not exact and keep_end:
            while cut < last and (words[cut] == words[first] or offsets[cut][0] < start + self._margin):
                cut += 1
        elif not exact:
            while kept > first and (words[kept - 1] == words[last - 1] or offsets[kept - 1][1] > end - self._margin):
                kept -= 1
        return self._with_picture(ids[:first]), list(ids[cut:kept]), self._with_picture(ids[last:])

    def _with_picture(self, ids: list[int]) -> list[int]:
        """Make as many tokens of a picture's one as the model reads of a picture."""
        return [id_ for each in ids for id_ in [each] * (self._image_tokens if each == self._image_id else 1)]


def _renamed(path: Path, token: str, name: str) -> str:
    """Give the content of a `tokenizer.json` in which an added token has another name."""
    table = json.loads(path.read_text(encoding="utf-8"))
    found = [added for added in table.get("added_tokens", ()) if added["content"] == token]
    if not found:
        raise ModelError(f'{path} knows no token "{token}" (image_token in the manifest)')
    found[0].update(content=name, normalized=False)
    vocabulary = table["model"].get("vocab")
    if isinstance(vocabulary, dict) and token in vocabulary:
        vocabulary[name] = vocabulary.pop(token)
    elif isinstance(vocabulary, list):  # of a Unigram model: pieces and scores
        table["model"]["vocab"] = [[name, *rest] if piece == token else [piece, *rest] for piece, *rest in vocabulary]
    return json.dumps(table)
