"""Where the messages of a run go: `training.log` takes all of them with the time, the console or the panel shows them.

The one idea: everything is said through one logger, whose handlers change while a run trains; so nothing that is worth
saying is lost behind the panel, and the file holds what anybody saw.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from limbeck.console import STEP_LINE, logger, warn
from limbeck.training.callbacks import LogLines
from limbeck.training.dashboard import Dashboard, wants_dashboard

LOG = "training.log"


class _LogFile(logging.Handler):
    """Appends to a file; one that cannot be written does not end the training."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self._failed = path, False

    def emit(self, record: logging.LogRecord) -> None:
        if self._failed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
            with self.path.open("a", encoding="utf-8") as log:
                log.writelines(f"{clock}  {line}\n" for line in record.getMessage().splitlines())
        except OSError as error:
            self._failed = True
            warn(f"{self.path} cannot be written ({error}); training goes on without it")


class _PanelMessages(logging.Handler):
    """Hands messages to the panel, which shows what is in step lines in its own way."""

    def __init__(self, panel: Dashboard) -> None:
        super().__init__()
        self._panel = panel

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, STEP_LINE, False):
            self._panel.tell(record.getMessage())


class LogFile:
    """All messages go to a file too, while it is entered; entered again for the same file it changes nothing."""

    def __init__(self, path: Path, *, active: bool = True) -> None:
        self._path, self._active = path, active
        self._handler: _LogFile | None = None
        self._level = logging.NOTSET

    def __enter__(self) -> "LogFile":
        held = any(isinstance(handler, _LogFile) and handler.path == self._path for handler in logger.handlers)
        if self._active and not held:
            self._handler, self._level = _LogFile(self._path), logger.level
            logger.addHandler(self._handler)
            if logger.level == logging.NOTSET:  # in a script of the user's own nobody has asked for messages yet
                logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handler is not None:
            logger.removeHandler(self._handler)
            logger.setLevel(self._level)
            self._handler = None


class Display:
    """What a trainer shows: entered while it trains.

    Args:
        args: DistillationArguments.
        main: the process is the one that speaks.
    """

    def __init__(self, args: Any, *, main: bool) -> None:
        self._file = LogFile(Path(args.output_dir) / LOG, active=main)
        self._panel = Dashboard() if main and wants_dashboard(args.dashboard) else None
        lines = LogLines(args.step_line)
        self.callbacks: list[TrainerCallback] = [lines] if self._panel is None else [lines, self._panel]
        self._console: list[logging.Handler] = []
        self._messages: _PanelMessages | None = None

    def __enter__(self) -> "Display":
        self._file.__enter__()
        if self._panel is not None:
            self._messages = _PanelMessages(self._panel)
            streams = (h for h in logger.handlers if isinstance(h, logging.StreamHandler) and h.stream is sys.stderr)
            self._console = list(streams)
            for handler in self._console:
                logger.removeHandler(handler)
            logger.addHandler(self._messages)
        return self

    def __exit__(self, *error: object) -> None:
        if self._panel is not None:
            self._panel.close()
        if self._messages is not None:
            logger.removeHandler(self._messages)
            self._messages = None
        for handler in self._console:
            logger.addHandler(handler)
        self._console = []
        self._file.__exit__(*error)
