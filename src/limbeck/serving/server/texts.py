"""Tokens of one text as they come, to pieces that may be sent: whole characters, and nothing of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from limbeck.serving.scheduler import Written
from limbeck.serving.tokenizer import GgufTokenizer


@dataclass
class Piece:
    """What one token adds.

    Attributes:
        text: what may be sent now; it may lag behind the tokens.
        written: the token; None for text that was held back only.
        reason: why the text ends here; None: it goes on.
    """

    text: str
    written: Written | None
    reason: str | None = None


@dataclass
class TextAssembler:
    """One text.

    Args:
        tokenizer: the model's.
        stops: strings that end the text and are not sent.
        before: ids that stand before it.
        unchecked: tokens at its beginning in which no stop string is looked for: an echoed prompt's.
    """

    tokenizer: GgufTokenizer
    stops: Sequence[str] = ()
    before: Sequence[int] = ()
    unchecked: int = 0
    _held: str = ""
    _new: list[int] = field(default_factory=list)
    _told: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._told = list(self.before)

    def add(self, written: Written) -> Piece:
        """Take a token on; a piece with a reason is the last."""
        if written.token is not None:
            self._held += self._decoded(written.token)
        if self.unchecked > 0 and written.reason is None:
            self.unchecked -= 1
            text, self._held = self._held, ""
            return Piece(text, written)
        found = self._stop()
        if found is not None:
            text, self._held = self._held[:found], ""
            return Piece(text, written if written.token is not None else None, "stop")
        if written.reason is not None:
            if self._new:  # a text that ends within a character
                self._held += self.tokenizer.decode([*self._told, *self._new])[len(self.tokenizer.decode(self._told)) :]
            text, self._held = self._held, ""
            return Piece(text, written if written.token is not None else None, written.reason)
        keep = self._possible_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Piece(text, written)

    def _decoded(self, token: int) -> str:
        """What a token adds to the text; nothing while a character is not whole."""
        self._new.append(token)
        shown = self.tokenizer.decode(self._told)
        text = self.tokenizer.decode([*self._told, *self._new])
        if text.endswith("�"):
            return ""
        self._told, self._new = self._new, []
        return text[len(shown) :]

    def _stop(self) -> int | None:
        """Where the first stop string begins; None where there is none."""
        places = [self._held.find(stop) for stop in self.stops if stop]
        return min((place for place in places if place >= 0), default=None)

    def _possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
