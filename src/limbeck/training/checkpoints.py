"""Whole checkpoints: which ones may be resumed from, and marking one as finished.

The one idea: a checkpoint counts when its `manifest.json` does, which is written after everything else
in it; whatever a kill left half-written has none and is removed at the next start.
"""

import re
import shutil
from pathlib import Path

from limbeck.errors import CorruptError, LimbeckError
from limbeck.storage import MANIFEST, fsync_tree, read_json, sha256_file, write_manifest

_NAME = re.compile(r"^checkpoint-(\d+)$")


def seal(folder: Path, step: int) -> None:
    """Record every file of a finished checkpoint with its checksum; after this it is whole."""
    files = [path for path in fsync_tree(folder) if path.name != MANIFEST]
    records = {str(path.relative_to(folder)): sha256_file(path) for path in files}
    write_manifest(folder, {"kind": "checkpoint", "step": step, "files": records})


def rotate(folder: Path, keep: int | None, best: str | None) -> None:
    """Delete all but the newest `keep` whole checkpoints and the best one; None keeps all.

    The manifest goes first, so that a kill in between leaves rubbish and no half-truth.
    """
    if keep is None:
        return
    for step in steps(folder)[:-keep]:
        path = folder / f"checkpoint-{step}"
        if best is None or path.resolve() != Path(best).resolve():
            (path / MANIFEST).unlink()
            shutil.rmtree(path)


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's folder, ascending."""
    found = []
    for path in folder.glob("checkpoint-*"):
        match = _NAME.match(path.name)
        if match and (path / MANIFEST).exists():
            found.append(int(match[1]))
    return sorted(found)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder, its files verified; None when there is none."""
    for step in reversed(steps(folder)):
        path = folder / f"checkpoint-{step}"
        verify(path)
        return path
    return None


def verify(folder: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Raises:
        CorruptError: a file is missing or altered.
    """
    for name, checksum in read_json(folder / MANIFEST)["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != checksum:
            raise CorruptError(
                f"{path} is missing or damaged (its checksum is not the recorded one). Delete {folder} to continue "
                "from the checkpoint before it."
            )


def forget_after(folder: Path, step: int) -> None:
    """Drop checkpoints later than `step`: the run goes on from there, and they belong to what it leaves behind."""
    for later in (found for found in steps(folder) if found > step):
        path = folder / f"checkpoint-{later}"
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def remove_partial(folder: Path) -> None:
    """Delete what a kill in the middle of a save left behind."""
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and _NAME.match(path.name) and not (path / MANIFEST).exists():
            shutil.rmtree(path)


def resolve_resume(path: Path) -> Path:
    """The checkpoint that `training.resume_from` means: a checkpoint, or the newest of a run's folder.

    Raises:
        LimbeckError: there is no whole checkpoint there.
    """
    if (path / "trainer_state.json").is_file() and (path / MANIFEST).is_file():
        verify(path)
        return path
    found = newest(path) if path.is_dir() else None
    if found is None:
        raise LimbeckError(
            f"training.resume_from is {path}, which is no whole checkpoint and holds none. Name a checkpoint-N "
            "folder or a run's folder; to start from weights alone set student.model."
        )
    return found


def checkpoint_step(path: Path) -> int:
    """The optimizer step a checkpoint was saved at."""
    return int(read_json(path / MANIFEST)["step"])
