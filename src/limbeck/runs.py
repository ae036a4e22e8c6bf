"""`limbeck runs`: what an output folder holds, earlier results too, with what differs; and making room.

The one idea: every folder says itself what it was made from and whether it is finished, so nothing is kept about them.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.folders import INPUTS, MANIFEST, RECIPE, STARTED, StageFolder, differences
from limbeck.storage import folder_lock, read_json

_PREVIOUS = "previous"


@dataclass(frozen=True)
class HeldFolder:
    """A stage's folder.

    Attributes:
        path: where.
        state: complete or unfinished.
        size: bytes.
        about: what it holds, in a few words.
        differs: of an earlier result, the keys in which it differs from the present one.
    """

    path: Path
    state: str
    size: int
    about: str
    differs: str | None = None


@dataclass(frozen=True)
class HeldRun:
    """A run's folder: its stages, and the earlier results that changed keys have moved away."""

    path: Path
    stages: list[HeldFolder] = field(default_factory=list)
    previous: list[HeldFolder] = field(default_factory=list)


def find_runs(folder: Path) -> list[HeldRun]:
    """The runs in an output folder, or the one that it is.

    Raises:
        LimbeckError: there is none.
    """
    if not folder.is_dir():
        raise LimbeckError(f"{folder} is no folder. Name one that holds runs: `limbeck runs outputs`.")
    places = [folder] if _is_run(folder) else [path for path in sorted(folder.iterdir()) if _is_run(path)]
    if not places:
        raise LimbeckError(f"{folder} holds no runs. Name a folder that does: `limbeck runs outputs`.")
    return [_read_run(path) for path in places]


def _is_run(path: Path) -> bool:
    if not path.is_dir() or (path / INPUTS).exists():
        return False
    return (path / RECIPE).is_file() or any((inner / INPUTS).is_file() for inner in path.iterdir() if inner.is_dir())


def _read_run(path: Path) -> HeldRun:
    stages = [_held(inner) for inner in _stage_folders(path)]
    previous = [_held(inner, path / inner.name.rpartition("-")[0]) for inner in _stage_folders(path / _PREVIOUS)]
    return HeldRun(path, stages, previous)


def _stage_folders(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (inner for inner in sorted(path.iterdir()) if (inner / INPUTS).is_file())


def _held(path: Path, present: Path | None = None) -> HeldFolder:
    done = (path / MANIFEST).is_file()
    size = sum(_bytes_of(file) for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    differs = None
    if present is not None and (present / INPUTS).is_file():
        one, other = (StageFolder(place, "run", {}).recorded_inputs() for place in (path, present))
        differs = differences(one, other) or "nothing"
    return HeldFolder(path, "complete" if done else "unfinished", size, _about(path) if done else "", differs)


def _bytes_of(file: Path) -> int:
    """Its size; a training may just have renamed it."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _about(path: Path) -> str:
    found: dict[str, Any] = read_json(path / MANIFEST)
    kind = found.get("kind")
    if kind == "student":
        loss = found.get("best_eval_loss")
        scored = "" if loss is None else f", best held-out loss {loss:.4f}"
        return f"{found['steps']} steps, {found['parameters']:,} parameters{scored}"
    if kind == "packed":
        return ", ".join(f"{split['rows']:,} {name} rows" for name, split in found["splits"].items())
    if kind == "teacher_cache":
        return f"{found['positions']:,} positions, {found['codec']['top_k']} ids each"
    return str(kind)


def prune(runs: Sequence[HeldRun], *, dry: bool = False) -> list[HeldFolder]:
    """Delete the earlier results of runs but for those that a present one started from; returns them.

    With `dry` they are only named.
    """
    gone = []
    for run in runs:
        with contextlib.nullcontext() if dry or not run.previous else folder_lock(run.path):
            present = {
                str(path.resolve()) for path in _stage_folders(run.path / _PREVIOUS)
            }  # one may have been put back
            needed = {str(Path(path).parent) for other in runs for path in _started_from(other.path)}
            for held in run.previous:
                place = str(held.path.resolve())
                if place not in present or place in needed:
                    continue
                gone.append(held)
                if not dry:
                    StageFolder(held.path, "run", {}).clear()
                    shutil.rmtree(held.path)
    return gone


def _started_from(run: Path) -> Iterator[str]:
    """Checkpoints that trainings of the run started from."""
    for stage in _stage_folders(run):
        for folder in (stage, *_stage_folders(stage)):  # a training in stages has a folder for each
            started = read_json(folder / INPUTS).get(STARTED)
            if started is not None:
                yield str(started["path"])


def as_records(runs: Sequence[HeldRun]) -> list[dict[str, Any]]:
    """The runs as JSON."""
    return [
        {
            "path": str(run.path),
            **{
                name: [{**asdict(held), "path": str(held.path)} for held in getattr(run, name)]
                for name in ("stages", "previous")
            },
        }
        for run in runs
    ]


def runs_text(runs: Sequence[HeldRun]) -> str:
    """A line a folder, what differs below an earlier one."""
    lines = []
    for run in runs:
        lines.append(f"{run.path}")
        held = [*run.stages, *run.previous]
        width = max((len(str(entry.path.relative_to(run.path))) for entry in held), default=0)
        for entry in held:
            name = str(entry.path.relative_to(run.path))
            lines.append(f"  {name:<{width}}  {entry.state:<10} {entry.size / 1e6:>9,.1f} MB  {entry.about}".rstrip())
            if entry.differs is not None:
                lines.append(f"  {'':<{width}}  differs from the present one: {entry.differs}")
    spare = sum(entry.size for run in runs for entry in run.previous)
    if spare:
        lines.append(
            f"earlier results take {spare / 1e6:,.1f} MB; --prune deletes them, but for those a training started from"
        )
    return "\n".join(lines)
