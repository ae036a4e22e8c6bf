"""Files that are whole or absent: atomic writes, content hashes, plain words for a disk's errors, the folder lock.

The one idea: whatever is written appears under its name by one rename, after it has been flushed.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.errors import ConfigError, CorruptError, LimbeckError

#: What lies beside the weights of a model: tokenizer, chat template, generation settings.
_BESIDE = (".json", ".jinja", ".txt", ".model")


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


def temporary_for(final: Path, *, own: bool = False) -> Path:
    """Where a file or folder is written before it is whole: hidden, beside its place, and known as a leftover.

    Args:
        final: its place.
        own: a name that no other process uses, where several may write the same place.
    """
    return final.with_name(f".{final.name}.{os.getpid()}.tmp" if own else f".{final.name}.tmp")


def leftovers_of(final: Path) -> list[Path]:
    """What killed processes left of writing one place."""
    return list(final.parent.glob(f".{glob.escape(final.name)}.*.tmp"))


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
    temporary = temporary_for(path, own=True)
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


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused when `name` (read from a manifest) would leave the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise CorruptError(f"a manifest in {folder} names {name!r}, which is outside that folder.")
    return path


def copy_beside(source: Path, partial: Path) -> None:
    """Copy what lies beside a model's weights, but for what has been written anew."""
    for path in source.iterdir():
        kept = path.suffix in _BESIDE and not path.name.endswith((".index.json", "manifest.json"))
        if kept and not (partial / path.name).exists():
            temporary = temporary_for(partial / path.name)
            shutil.copy2(path, temporary)
            commit_file(temporary, partial / path.name)


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (folder, *folder.parents) if path.exists())
        raise ConfigError(f"{folder} cannot be made: {file} is a file. Choose another output folder.") from None
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
