"""Where text comes from: the standard library, files and folders, Hugging Face datasets.

The one idea: a source is an ordered, repeatable stream of `Document(key, text)`, and a content identity
that changes when the text does. The key (a relative path, a line, a row number) names the document for good:
the training/validation split hashes it, so the same document is held out in every run.

Add a source with one class here and one line in `open_source`.
"""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from limbeck.config import DatasetConfig
from limbeck.console import printable
from limbeck.errors import LimbeckError
from limbeck.hub import HubError, commit_of
from limbeck.storage import fingerprint, sha256_file_cached

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
#: Folders of the standard library that are not library code, or that not every Python ships.
_STDLIB_SKIP = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}


_MOST_BROKEN = 0.05  # share of characters that may be unreadable before a file is no UTF-8
_CHUNK = 1 << 18  # characters of a file that are read at once


@dataclass(frozen=True)
class Document:
    """One text and the name it keeps.

    Attributes:
        key: the name.
        content: the text, or the file that holds it.
    """

    key: str
    content: str | Path

    def chunks(self) -> Iterator[str]:
        """The text, a bounded part at a time when it is a file; a stray byte that is no UTF-8 becomes U+FFFD.

        Raises:
            LimbeckError: its beginning is another encoding, or no text.
        """
        if isinstance(self.content, str):
            yield self.content
            return
        with self.content.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            first = True
            while chunk := file.read(_CHUNK):
                if first:
                    _require_utf8(chunk, f"{self.content}")
                first = False
                yield chunk

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.chunks())


def _require_utf8(text: str, where: str) -> None:
    """Refuse text that was decoded from another encoding.

    Raises:
        LimbeckError: too much of it could not be read.
    """
    broken = text.count("\ufffd") / len(text)
    if broken > _MOST_BROKEN:
        raise LimbeckError(
            f"{where} is no UTF-8 text: {broken:.0%} of its beginning cannot be read. Convert it (`iconv -f LATIN1 -t "
            "UTF-8`), or leave it out."
        )


class Source(Protocol):
    """An ordered, repeatable stream of documents.

    Attributes:
        without_text: rows of the last pass whose text was null; they are left out, whatever the format.
    """

    without_text: int

    def identity(self) -> dict[str, Any]:
        """What the content is, JSON-serialisable; changes when the text does."""

    def documents(self) -> Iterator[Document]:
        """All documents, in the same order at each call."""


class FileSource:
    """Text files, JSON lines and Parquet, one document a file, line or row."""

    def __init__(self, files: list[tuple[str, Path]], text_column: str) -> None:
        self._files, self._column, self.without_text = files, text_column, 0
        for name, path in files:
            try:
                name.encode()
            except UnicodeEncodeError:
                folder, shown = printable(str(path.parent)), printable(name)
                raise LimbeckError(f"a file in {folder} has a name that is not UTF-8: {shown}. Rename it.") from None

    def identity(self) -> dict[str, Any]:
        """Relative names and content hashes of the files."""
        return {"files": fingerprint([[name, sha256_file_cached(path)] for name, path in self._files])}

    def documents(self) -> Iterator[Document]:
        """Documents in the order of the file names, then of the lines or rows."""
        self.without_text = 0
        for name, path in self._files:
            if path.suffix == ".jsonl":
                yield from self._json_lines(name, path)
            elif path.suffix == ".parquet":
                yield from self._parquet(name, path)
            else:
                yield Document(name, path)

    def _json_lines(self, name: str, path: Path) -> Iterator[Document]:
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            for number, line in enumerate(lines):
                if not line.strip():
                    continue
                where = f"{path} line {number + 1}"
                _require_utf8(line, where)
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
                    reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
                    raise LimbeckError(f"{where} is not JSON ({reason}). Mend or remove it.") from None
                if not isinstance(record, dict) or self._column not in record:
                    found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
                    raise LimbeckError(
                        f"{where} has no text under {self._column!r} (it has: {printable(found)}). "
                        "Set dataset.text_column to the key that holds the text."
                    )
                yield from _document(self, f"{name}:{number}", record[self._column], where, self._column)

    def _parquet(self, name: str, path: Path) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise LimbeckError(f"{path} cannot be read as Parquet ({error}). Mend or remove it.") from None
        columns = table.schema_arrow.names
        if self._column not in columns:
            raise LimbeckError(
                f"{path} has no column {self._column!r} (it has: {', '.join(columns)}). "
                "Set dataset.text_column to the column that holds the text."
            )
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[self._column]):
            for cell in batch.column(0):
                where = f"{path} row {number + 1}"
                try:
                    text = cell.as_py()
                except UnicodeDecodeError as error:
                    raise LimbeckError(f"{where} is not UTF-8 ({error.reason}). Mend or remove it.") from None
                yield from _document(self, f"{name}:{number}", text, where, self._column)
                number += 1


class HubSource:
    """A Hugging Face dataset, from the hub or from a local folder in one of its formats."""

    def __init__(self, config: DatasetConfig) -> None:
        self._config, self.without_text = config, 0

    def identity(self) -> dict[str, Any]:
        """Name, configuration, split and the commit (hub) or the files' hashes (local folder)."""
        config = self._config
        folder = Path(config.name)
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            content = fingerprint([[str(p.relative_to(folder)), sha256_file_cached(p)] for p in files])
        else:
            try:
                content = commit_of("dataset", config.name, config.revision)
            except HubError as error:
                raise LimbeckError(
                    f"dataset {config.name!r} is neither a file or folder here nor reachable on the hub: {error}. "
                    "Check dataset.name and the network."
                ) from None
        return {"name": config.name, "config": config.config_name, "split": config.split, "content": content}

    def documents(self) -> Iterator[Document]:
        """Rows of the split, keyed by their number."""
        import datasets

        config = self._config
        try:
            if _is_saved(Path(config.name)):
                saved = datasets.load_from_disk(config.name)
                rows = saved[config.split] if isinstance(saved, datasets.DatasetDict) else saved
            else:
                rows = datasets.load_dataset(
                    config.name,
                    config.config_name,
                    split=config.split,
                    streaming=config.streaming,
                    revision=config.revision,
                )
        except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
            raise LimbeckError(f"dataset {config.name!r} could not be opened: {error}") from error
        self.without_text = 0
        for number, row in enumerate(rows):
            if config.text_column not in row:
                raise LimbeckError(
                    f"dataset {config.name!r} has no column {config.text_column!r} (it has: {', '.join(row)}). "
                    "Set dataset.text_column to the column that holds the text."
                )
            where = f"dataset {config.name!r} row {number + 1}"
            yield from _document(self, str(number), row[config.text_column], where, config.text_column)


def stdlib_source() -> FileSource:
    """The Python standard library's own modules, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        (str(path.relative_to(root)), path)
        for path in sorted(root.rglob("*.py"))
        if not _STDLIB_SKIP & set(path.relative_to(root).parts[:-1])
    ]
    if not files:
        raise LimbeckError(
            f"no standard library sources under {root}: this Python ships without them. "
            "Set dataset.name to a folder of text."
        )
    return FileSource([(name, path) for name, path in files if not name.startswith("config-")], "text")


def open_source(config: DatasetConfig) -> Source:
    """The source that `dataset.name` means.

    Raises:
        LimbeckError: a folder without readable files, or a file of a kind that is not read.
    """
    if config.name == "stdlib":
        return stdlib_source()
    path = Path(config.name)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise LimbeckError(f"{path} is not one of {', '.join(SUFFIXES)}. Convert it or name another file.")
        return FileSource([(path.name, path)], config.text_column)
    if path.is_dir() and not _is_hub_folder(config, path):
        found = path.rglob("*") if config.recursive else path.glob("*")
        files = sorted(p for p in found if p.is_file() and p.suffix in SUFFIXES)
        if not files:
            hint = (
                "" if config.recursive else " Its subfolders were not searched: add --recursive if the text is there."
            )
            raise LimbeckError(f"no {', '.join(SUFFIXES)} files found in {path}.{hint}")
        return FileSource([(str(p.relative_to(path)), p) for p in files], config.text_column)
    if not path.exists() and (path.is_absolute() or config.name.startswith(("./", "../"))):
        raise LimbeckError(f"dataset.name is {config.name}, which does not exist.")
    return HubSource(config)


def _is_hub_folder(config: DatasetConfig, path: Path) -> bool:
    """A dataset repository or `save_to_disk` folder: a configuration is asked for, or its layout says so."""
    if config.config_name is not None or _is_saved(path):
        return True
    if any(p.suffix in SUFFIXES and p.name != "README.md" for p in path.iterdir()) or config.recursive:
        return False
    return (path / "data").is_dir() or (path / "dataset_infos.json").is_file()


def _is_saved(path: Path) -> bool:
    """Written by `Dataset.save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _document(source: Source, key: str, value: Any, where: str, column: str) -> Iterator[Document]:
    """The document of a row: none for null, which is counted.

    Raises:
        LimbeckError: the value is no text, or half a surrogate pair is in it.
    """
    if value is None:
        source.without_text += 1
        return
    if not isinstance(value, str):
        raise LimbeckError(
            f"{where} has {type(value).__name__} under {column!r} and no text. Set dataset.text_column to what holds "
            "the text."
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise LimbeckError(
                f"{where} holds \\u{ord(value[error.start]):04x}, half of a surrogate pair, which is no character. "
                "Mend or remove it."
            ) from None
    yield Document(key, value)
