"""Long documents in pieces that give the ids of the whole: packing then needs no more memory for a larger file.

The one idea: a document may be cut where the tokenizer itself would cut. Whether it would is asked of it: a few
thousand characters on both sides of a place are tokenised together and apart, and the place will do when the ids agree.
Between two letters and a space this is so for every tokenizer that splits text into words; the other places are for
text without spaces.

Tokenizers that put something before a text (Llama 2's dummy space) must not put it before a piece; those but the first
are encoded by a twin of the tokenizer that adds nothing, up to the first special token in their text: what follows one
has it again.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from limbeck.console import warn

PIECE = 1 << 17  # characters; documents of up to two pieces stay whole
_WINDOW = 2048  # characters on either side of a place that are tried
_TRIES = 64  # places of one kind that are tried
_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


class PieceEncoder:
    """Texts to ids, long ones a piece at a time.

    Args:
        tokenizer_json: of the `tokenizers` package.
        eos_id: ends every document.
    """

    def __init__(self, tokenizer_json: str, eos_id: int) -> None:
        from tokenizers import Tokenizer

        self._eos = eos_id
        self._whole = Tokenizer.from_str(tokenizer_json)
        inner = without_prefix(tokenizer_json)
        self._inner = Tokenizer.from_str(inner)
        has_prefix = json.loads(inner) != json.loads(tokenizer_json)
        added = self._whole.get_added_tokens_decoder() if has_prefix else {}
        self._special = {number: token.content.strip() for number, token in added.items()}
        self._before, self._after = self._added()

    def _added(self) -> tuple[list[int], list[int]]:
        """Special ids that the tokenizer puts before and after a text."""
        ids = self._whole.encode("a").ids
        plain = self._whole.encode("a", add_special_tokens=False).ids
        for start in range(len(ids) - len(plain) + 1):
            if ids[start : start + len(plain)] == plain:
                return ids[:start], ids[start + len(plain) :]
        return [], []

    def encode(self, pieces: list[tuple[str, bool, bool]]) -> list[np.ndarray]:
        """int32 ids of (text, is first, is last) pieces; the last of a document ends with the end-of-text id.

        Special tokens that the tokenizer adds by itself (a leading BOS) stay; text that looks like a special token is
        encoded as the tokenizer encodes it.
        """
        found: list[np.ndarray] = []
        for first in (True, False):
            texts = [text for text, is_first, _ in pieces if is_first == first]
            found += self._encode(texts, self._whole) if first else self._encode_inner(texts)
        # The first pieces came before the others; back in the order given.
        order = np.argsort([not is_first for _, is_first, _ in pieces], kind="stable")
        arrays = [found[place] for place in np.argsort(order)]
        return [self._finished(ids, *ends) for ids, (_, *ends) in zip(arrays, pieces, strict=True)]

    def _encode(self, texts: list[str], tokenizer: Any) -> list[np.ndarray]:
        """Plain ids, a bounded number of characters at a time: an encoding takes some 200 bytes a character."""
        found: list[np.ndarray] = []
        start = 0
        while start < len(texts):
            stop, size = start, 0
            while stop < len(texts) and (stop == start or size + len(texts[stop]) <= 2 * PIECE):
                size += len(texts[stop])
                stop += 1
            encodings = tokenizer.encode_batch_fast(texts[start:stop], add_special_tokens=False)
            found += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            start = stop
        return found

    def _encode_inner(self, texts: list[str]) -> list[np.ndarray]:
        """Plain ids of texts that go on where others end."""
        found = self._encode(texts, self._inner)
        for number, ids in enumerate(found):
            if not self._special.keys().isdisjoint(ids.tolist()):
                found[number] = self._after_special(texts[number], ids)
        return found

    def _after_special(self, text: str, ids: np.ndarray) -> np.ndarray:
        """`ids` of a text, with those behind its first special token as the whole tokenizer has them."""
        encoding = self._inner.encode(text, add_special_tokens=False)
        for place, (number, (start, stop)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True), 1):
            if self._special.get(number) == text[start:stop].strip():  # an unknown character has such an id, too
                return np.concatenate([ids[:place], *self._encode([text[stop:]], self._whole)])
        return ids

    def _finished(self, ids: np.ndarray, first: bool, last: bool) -> np.ndarray:
        before, after = self._before if first else [], self._after if last else []
        end = [*ids[-1:].tolist(), *after][-1:] if last else [self._eos]
        after = [*after, *([] if end == [self._eos] else [self._eos])]
        return np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)]) if before or after else ids

    # -- cutting ---------------------------------------------------------------------------------------

    def pieces(self, chunks: Iterable[str], name: str) -> Iterator[tuple[str, bool, bool]]:
        """(text, is first, is last) of a document that comes in chunks; nothing for one without text.

        Args:
            chunks: the document's text, in order.
            name: of the document, for a warning.
        """
        held, first = "", True
        for chunk in chunks:
            held += chunk
            while len(held) > 2 * PIECE:
                place = self._place(held, name)
                yield held[:place], first, False
                held, first = held[place:], False
        if held or not first:
            yield held, first, True

    def _place(self, text: str, name: str) -> int:
        """Where the text can be cut, somewhere in the second half of its first piece."""
        half = PIECE // 2
        for places in (_words(text, half), _changes(text, half), _characters(text, half)):
            for place in islice(places, _TRIES):
                # From several beginnings: in a long run of one character they are cut at different places of it.
                lefts = (text[max(0, place - _WINDOW + less) : place] for less in (0, 1, 7))
                if all(self.agrees(left, text[place : place + _WINDOW]) for left in lefts):
                    return place
        warn(f"{name} has no place in {half:,} characters where its tokenizer would cut; the ids there may differ")
        return PIECE

    def agrees(self, left: str, right: str) -> bool:
        """True when the two texts give, one after the other, the ids of both together."""

        def ids(text: str) -> list[int]:
            return self._encode_inner([text])[0].tolist() if text else []

        return ids(left + right) == ids(left) + ids(right)


def _words(text: str, half: int) -> Iterator[int]:
    """Spaces between two letters, the last first."""
    return iter([match.start() for match in _WORDS.finditer(text, half, 2 * half)][::-1])


def _changes(text: str, half: int) -> Iterator[int]:
    """Places where letters, digits, spaces and other characters meet, the last first."""

    def kind(character: str) -> int:
        return character.isalpha() + 2 * character.isdigit() + 4 * character.isspace()

    return (i for i in range(2 * half, half, -1) if kind(text[i - 1]) != kind(text[i]))


def _characters(text: str, half: int) -> Iterator[int]:
    """Places between any two characters that do not combine, the last first."""
    return (i for i in range(2 * half, half, -1) if not unicodedata.combining(text[i]))


def without_prefix(tokenizer_json: str) -> str:
    """The JSON of the same tokenizer, which puts nothing before a text."""

    def strip(part: Any) -> Any:
        if isinstance(part, list):
            return [kept for one in part if (kept := strip(one)) is not None]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Prepend":
            return None
        changed = {key: strip(value) if isinstance(value, (dict, list)) else value for key, value in part.items()}
        if part.get("type") == "Metaspace":
            changed["prepend_scheme"] = "never"
            changed.pop("add_prefix_space", None)
        elif part.get("type") == "ByteLevel":
            changed["add_prefix_space"] = False
        return changed

    data = json.loads(tokenizer_json)
    for key in ("normalizer", "pre_tokenizer"):
        data[key] = strip(data.get(key))
    return json.dumps(data)


def at_spaces(chunks: Iterable[str]) -> Iterator[str]:
    """The chunks of a text with their borders moved to spaces, for a tokenizer's training.

    Without a space in two pieces the border is wherever no character is combined with the one before.
    """
    held = ""
    for chunk in chunks:
        place = len(held) + chunk.rfind(" ") if " " in chunk else 0
        held += chunk
        if place == 0 and len(held) > 2 * PIECE:
            place = next((i for i in range(len(held) - 1, 0, -1) if not unicodedata.combining(held[i])), 0)
        if place > 0:
            yield held[:place]
            held = held[place:]
    if held:
        yield held
