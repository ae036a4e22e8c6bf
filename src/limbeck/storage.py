"""Files that are whole or absent: atomic writes, content hashes, manifests and the folder lock.

The one idea: a folder limbeck writes is complete exactly when it holds `manifest.json`, and that file is
written last and atomically. `inputs.json` is written first and says what the folder is being made from;
so a folder with inputs but no manifest is unfinished work that the same inputs may continue.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import CorruptError, IncompleteError, LimbeckError, MismatchError

MANIFEST = "manifest.json"
INPUTS = "inputs.json"
SCHEMA_VERSION = 1


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same value always gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value, independent of the order of its keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_file_cached(path: Path) -> str:
    """`sha256_file`, remembered by path, size and modification time.

    A 60 GB teacher is hashed once and not at each start. The memory is a small file per path under
    `$XDG_CACHE_HOME/limbeck`; deleting it costs one more pass over the weights.
    """
    stat = path.stat()
    key = fingerprint([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    if stat.st_size < 1 << 24:
        return sha256_file(path)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck" / "hashes"
    memo = root / key
    if memo.exists():
        return memo.read_text()
    digest = sha256_file(path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        atomic_write_text(memo, digest)
    except OSError:  # a read-only home only costs the memory of the hash
        pass
    return digest


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Flush a file's bytes to disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def fsync_tree(folder: Path) -> list[Path]:
    """Flush every file of a folder to disk; returns the files, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        fsync_file(path)
    fsync_folder(folder)
    return files


def commit_file(temporary: Path, final: Path) -> None:
    """Move a finished temporary file into place: fsync, rename, fsync of the folder."""
    fsync_file(temporary)
    temporary.replace(final)
    fsync_folder(final.parent)


def commit_folder(temporary: Path, final: Path) -> None:
    """Move a finished temporary folder into place of what is there, all of it flushed first.

    The two exchange names in one step, so that `final` is a whole folder at every moment. Where the system cannot do
    that, the old one waits as `.NAME.old` until the new one is in place, and is put back if that never happened.
    """
    fsync_tree(temporary)
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        old.rename(final)
    if not final.exists():
        temporary.rename(final)
    elif _exchange(temporary, final):
        shutil.rmtree(temporary)
    else:
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    fsync_folder(final.parent)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths exchange what they name in one step (Linux); False where that cannot be done."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


#: What an error says when it is the disk's: by number, or in the words of libraries that have no type for it.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_DISK_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Read-only file system|Input/output error|"
    r"os error (28|122|27|30|5)\b|PytorchStreamWriter failed"
)


def disk_problem(error: BaseException) -> str | None:
    """What is wrong with the disk, if that is what the error is about (full, read-only, over quota, broken, forbidden).

    Returns:
        "could not be written (No space left on device: /a/b)"; None for other errors.
    """
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        if error.errno in _DISK:
            return f"could not be written ({os.strerror(error.errno)}{where})"
        if error.errno == errno.EIO or (error.errno in (errno.EACCES, errno.EPERM) and where):
            return f"could not be read or written ({os.strerror(error.errno)}{where})"
    said = next((line for line in str(error).splitlines() if _DISK_WORDS.search(line)), None)
    return None if said is None else f"could not be written ({said.strip()[:200]})"


@contextmanager
def plain_disk_errors(folder: Path) -> Iterator[None]:
    """Say in one line that `folder` cannot be written, whichever library found out.

    Raises:
        LimbeckError: instead of an error of the disk.
    """
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        raise LimbeckError(
            f"{folder} {problem}. Make room, or choose a folder that can be written, and run "
            "the same command again: what is finished stays, and the rest is continued."
        ) from None


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader or a crash sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        commit_file(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a file that is not JSON is reported as damaged, by name."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # text, syntax, a number of thousands of digits; nesting
        raise CorruptError(f"{path} is not valid JSON ({error}). Delete it and run the stage again.") from error


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON-lines file that is appended to; a last line that a kill cut short is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


_KINDS = {"data pack": "packed", "teacher cache": "teacher_cache", "train": "student"}


def read_manifest(folder: Path, stage: str) -> dict[str, Any]:
    """The manifest of a complete folder that `limbeck STAGE` made.

    Raises:
        IncompleteError: the folder is absent or has no manifest; the message names the command to run.
        CorruptError: it was written by another schema version or is not JSON.
    """
    path = folder / MANIFEST
    if not path.exists():
        what = "is unfinished" if folder.exists() else "does not exist"
        raise IncompleteError(f"{folder} {what} (no {MANIFEST}). Run `limbeck {stage}` to make or continue it.")
    manifest: dict[str, Any] = read_json(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CorruptError(
            f"{path} has schema version {manifest.get('schema_version')}, this limbeck reads "
            f"{SCHEMA_VERSION}. Make the folder again with `limbeck {stage}`."
        )
    if stage in _KINDS and manifest.get("kind") != _KINDS[stage]:
        raise MismatchError(
            f"{folder} holds {manifest.get('kind')!r} and {_KINDS[stage]!r} is wanted. Name the folder that "
            f"`limbeck {stage}` wrote."
        )
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Mark `folder` complete and return what was written. Call it after every other file is in place."""
    whole = {"schema_version": SCHEMA_VERSION, **manifest}
    write_json(folder / MANIFEST, whole)
    return whole


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused when `name` (read from a manifest) would leave the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise CorruptError(f"a manifest in {folder} names {name!r}, which is outside that folder.")
    return path


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a killed writer."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def folder_lock(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold the one lock of an output folder, so that two runs never write it at once.

    The operating system drops the lock when its holder dies, however it dies.
    """
    from filelock import FileLock, Timeout

    created = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LimbeckError(
            f"another limbeck process is writing {folder}. Wait for it, stop it, or choose another output folder."
        ) from None
    try:
        yield
    finally:
        if created and [path.name for path in folder.iterdir()] == [name]:  # the work failed before it wrote
            (folder / name).unlink()
            with contextlib.suppress(OSError):  # somebody else has put something beside it
                for path in created:
                    path.rmdir()
        lock.release()


@dataclass(frozen=True)
class StageFolder:
    """A folder owned by one stage of the pipeline, and what it is made from."""

    path: Path
    stage: str
    inputs: dict[str, Any]
    aside: Path | None = None  # where `begin` moves a folder made from other inputs; None refuses it

    @property
    def fingerprint(self) -> str:
        """Hash of everything the folder's content depends on."""
        return fingerprint(self.inputs)

    def recorded(self) -> str | None:
        """Fingerprint of the inputs the folder was begun with, or None for a new folder."""
        path = self.path / INPUTS
        return str(read_json(path)["fingerprint"]) if path.exists() else None

    def is_done(self) -> bool:
        """True when the folder is complete and made from exactly these inputs."""
        return (self.path / MANIFEST).exists() and self.recorded() == self.fingerprint

    def manifest(self) -> dict[str, Any]:
        """The manifest of the complete folder."""
        return read_manifest(self.path, self.stage)

    def differences(self) -> str:
        """The first inputs that differ from the recorded ones, as `key: recorded -> wanted`."""
        path = self.path / INPUTS
        recorded = read_json(path)["inputs"] if path.exists() else {}
        found = []
        for key in sorted(recorded.keys() | self.inputs.keys()):
            old, new = recorded.get(key), json.loads(canonical_json(self.inputs.get(key)))
            if old != new:
                found.append(f"{key}: {_short(old)} -> {_short(new)}")
        return "; ".join(found[:4])

    def begin(self, *, clean: bool = True, replace: bool = False) -> None:
        """Create the folder and record its inputs; continuing the same inputs changes nothing.

        `replace` starts over even from the same inputs: what is there is set aside, or without a place for
        that deleted.

        `clean` deletes a killed writer's temporary files; not while other ranks may be writing theirs.

        Raises:
            LimbeckError: the folder was begun with other inputs (names what differs), or holds files
                that limbeck did not write.
        """
        recorded = self.recorded()
        if recorded is not None and self.aside is not None and (replace or recorded != self.fingerprint):
            self.set_aside()
            recorded = None
        elif recorded is not None and replace:
            self.clear()
            recorded = None
        if recorded is None:
            self.refuse_strangers()
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / INPUTS, {"fingerprint": self.fingerprint, "inputs": self.inputs})
        elif recorded != self.fingerprint:
            raise LimbeckError(
                f"{self.path} was made from other inputs ({self.differences()}). "
                "Use another output folder, or --force to replace it."
            )
        if clean:
            remove_leftovers(self.path)

    def refuse_strangers(self) -> None:
        """Refuse a folder that holds files and no record of ours: it is somebody else's."""
        if self.recorded() is not None or not self.path.exists():
            return
        strangers = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        if strangers:
            raise LimbeckError(
                f"{self.path} is not empty and was not written by `limbeck {self.stage}` "
                f"(it holds {strangers[0]}). Choose another folder."
            )

    @contextmanager
    def lock(self, name: str = ".lock") -> Iterator[None]:
        """`folder_lock` of this folder, unless it is somebody else's."""
        self.refuse_strangers()
        with folder_lock(self.path, name):
            yield

    def set_aside(self) -> None:
        """Move the folder to `aside`, named by what it was made from: a changed key never deletes a result."""
        assert self.aside is not None
        name = f"{self.path.name}-{str(self.recorded())[:12]}"
        self.aside.mkdir(parents=True, exist_ok=True)
        taken = sum(1 for path in self.aside.iterdir() if path.name == name or path.name.startswith(f"{name}."))
        self.path.rename(self.aside / (f"{name}.{taken}" if taken else name))

    def earlier(self) -> "StageFolder | None":
        """The folder of these very inputs, finished or not, that an earlier `begin` set aside."""
        if self.aside is None:
            return None
        found = StageFolder(self.aside / f"{self.path.name}-{self.fingerprint[:12]}", self.stage, self.inputs)
        return found if found.recorded() == self.fingerprint else None

    def bring_back(self) -> bool:
        """Put an earlier result of these very inputs back, setting aside what is in its place; True when it did."""
        earlier = self.earlier() if self.recorded() != self.fingerprint else None
        if earlier is None:
            return False
        if self.path.exists():
            self.set_aside()
        earlier.path.rename(self.path)
        return True

    def clear(self) -> None:
        """Empty a folder limbeck wrote, keeping its lock; a folder it did not write is left alone.

        The manifest goes first and the record of the inputs last, so that a kill in between leaves an
        unfinished folder that still says what it was.
        """
        if self.recorded() is None:
            return
        (self.path / MANIFEST).unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.name in (".lock", INPUTS):
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        (self.path / INPUTS).unlink()


def _short(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 80 else text[:60] + f"…({len(text)} characters)"
