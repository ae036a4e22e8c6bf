"""Tokens of one text as they come, to pieces that may be sent: whole characters, and nothing of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.serving.scheduler import Written
from limbeck.serving.tokenizer import Detokenizer


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
        decoded: turns its tokens into text.
        stops: strings that end the text and are not sent.
        unchecked: tokens at its beginning in which no stop string is looked for: an echoed prompt's.
    """

    decoded: Detokenizer
    stops: Sequence[str] = ()
    unchecked: int = 0
    _held: str = ""

    def add(self, written: Written) -> Piece:
        """Take a token on; a piece with a reason is the last."""
        if written.token is not None:
            self._held += self.decoded.add(written.token)
        if self.unchecked > 0 and written.reason is None:
            self.unchecked -= 1
            text, self._held = self._held, ""
            return Piece(text, written)
        found = self._stop()
        if found is not None:
            text, self._held = self._held[:found], ""
            return Piece(text, written if written.token is not None else None, "stop")
        if written.reason is not None:
            self._held += self.decoded.rest()
            text, self._held = self._held, ""
            return Piece(text, written if written.token is not None else None, written.reason)
        keep = self._possible_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Piece(text, written)

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
