"""What the user sees while work runs: one progress bar on a terminal, plain lines elsewhere.

Everything here goes to stderr; stdout carries a command's result alone (`--json` prints one document).
"""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

logger = logging.getLogger("limbeck")


class Progress(Protocol):
    """A bar that moves: `advance(n)` units of the total given when it was made."""

    def advance(self, amount: float = 1) -> None:
        """Move the bar by `amount` units."""


class _Lines:
    """Where there is no terminal: a line a minute, so that a night's work does not look hung."""

    def __init__(self, label: str, total: float | None) -> None:
        self._label, self._total, self._done, self._said = label, total, 0.0, time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        if time.monotonic() - self._said > 60.0:
            self._said = time.monotonic()
            say(f"{self._label}: {self._done:,.0f}" + (f" of {self._total:,.0f}" if self._total else ""))


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: float = 1) -> None:
        self._bar.advance(self._task, amount)


@contextmanager
def progress(label: str, total: float | None) -> Iterator[Progress]:
    """A rich progress bar on stderr when it is a terminal, a line a minute otherwise."""
    if not sys.stderr.isatty():
        yield _Lines(label, total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with RichProgress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task(label, total=total))


#: Attribute of a record that is one of the many lines about steps.
STEP_LINE = "limbeck_step_line"


def say(message: str, *, step_line: bool = False) -> None:
    """Tell the user one thing about the work in hand (stderr)."""
    logger.info("%s", message, extra={STEP_LINE: step_line})


def warn(message: str) -> None:
    """Tell the user something that deserves attention but does not stop the work (stderr)."""
    logger.warning("WARNING: %s", message)


def columns(texts: Mapping[str, str], width: int = 118) -> str:
    """Texts beside one another, each under its title."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, width=width, pad_edge=False)
    for title in texts:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*(Text("".join(c if c.isprintable() or c == "\n" else " " for c in text)) for text in texts.values()))
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def printable(text: str, limit: int = 300) -> str:
    """Text of unknown origin as one line that a terminal and a log can show: no control characters, not long.

    What is no printable character (line ends, ANSI codes, halves of surrogate pairs) is written as its escape.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown + ("…" if len(text) > limit else "")


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever is stderr when something is said."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """The present stderr."""
        return sys.stderr


def set_up_logging() -> None:
    """Send limbeck's own messages to stderr, bare, and quieten the libraries below it."""
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
