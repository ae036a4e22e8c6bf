"""The errors limbeck raises on purpose, and the exit code each one means.

The one idea: an error a user can act on is a `LimbeckError` with one clear message that names the two
values that clash and what to do. The command line prints that message alone, without a stack trace;
anything else is a bug and keeps its trace.
"""


class LimbeckError(Exception):
    """Something the user can mend: wrong data, a damaged file, an unreachable place. Exit code 1."""

    exit_code = 1


class ConfigError(LimbeckError):
    """A recipe, flag or combination of keys that cannot be run. Exit code 2."""

    exit_code = 2


class IncompleteError(LimbeckError):
    """A folder without its `manifest.json`: unfinished work, to be continued and never read."""


class MismatchError(LimbeckError):
    """Two things that must describe the same data do not (tokenizer, sequence length, dataset)."""


class CorruptError(LimbeckError):
    """A file whose checksum, size or shape is not what its manifest says."""


class StoppedError(BaseException):  # no handler of errors may take it for one
    """Work that ended because it was told to, after it had saved what it had; `exit_code` is that of the signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
