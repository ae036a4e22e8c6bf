"""An exported folder: written beside its place as a whole, marked with what it is, and put there by one rename.

The one idea: only a folder that bears the mark of the same export is ever replaced.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from limbeck.errors import ConfigError
from limbeck.storage import commit_folder, temporary_for

_MADE_BY = ".limbeck-export"


@contextlib.contextmanager
def written_folder(target: Path, kind: str) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` when all is well and is gone when not.

    Args:
        target: where it will lie.
        kind: of the export.
    """
    partial = temporary_for(target, own=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        (partial / _MADE_BY).write_text(f"{kind}\n")
        commit_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what a failed write left; nothing after a finished one


def refuse_foreign_folder(target: Path, kind: str) -> None:
    """Refuse a place that holds anything but an earlier export of the kind.

    Raises:
        ConfigError: names what is there.
    """
    if target.is_file():
        held = [target.name]
    else:
        held = [path.name for path in target.iterdir() if not path.name.startswith(".")] if target.is_dir() else []
    made = target / _MADE_BY
    if held and not (made.is_file() and made.read_text(encoding="utf-8").strip() == kind):
        raise ConfigError(f"{target} would be replaced and holds {held[0]}. Name a new folder with --output.")
