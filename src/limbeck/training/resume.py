"""Where a run's training begins: anew, at its own newest checkpoint, or at another run's or mode's on purpose.

The one idea: everything that could be wrong with a start is found out before anything is touched; the start is
then recorded with the inputs, in one atomic write, so that a kill at any moment leaves the same start to the
next run.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.config.training import TrainingConfig
from limbeck.console import say
from limbeck.folders import INPUTS, MANIFEST, STARTED, StageFolder
from limbeck.storage import atomic_write_text, read_json
from limbeck.training.checkpoints import (
    PROGRESS,
    checkpoint_step,
    forget_after,
    newest,
    other_groups,
    remove_partial,
    resolve_resume,
    steps,
)


def begin(
    stage: StageFolder, training: TrainingConfig, recipe: str, force: bool, groups: list[str]
) -> tuple[Path | None, str | None]:
    """Start or continue a training folder; rank 0 alone.

    Args:
        stage: the folder and its inputs.
        training: whose `resume_from` and `resume` are followed.
        recipe: the resolved recipe as YAML, kept in the folder.
        force: start over.
        groups: names of this run's optimizer groups.

    Returns:
        the checkpoint to resume from, if any, and what changed against the folder's earlier inputs.

    Raises:
        ConfigError: the checkpoint's optimizer has other groups.
        LimbeckError: there is no such checkpoint, or the folder was made from other inputs.
    """
    wanted, changed = training.resume_from, None
    if wanted is not None and not force and _starts_elsewhere(stage, wanted):
        found = resolve_resume(wanted)
        require_groups(found, groups)
        _set_aside(stage, found)
        if stage.recorded() not in (None, stage.fingerprint):
            changed = stage.differences(most=100)
            say(f"continuing {stage.path} with a change ({stage.differences()})")
        inside = found.parent.resolve() == stage.path.resolve()
        started = {"path": str(found.resolve()), "step": checkpoint_step(found), "inside": inside}
        (stage.path / MANIFEST).unlink(missing_ok=True)
        stage.record(**{STARTED: started})
    else:
        stage.begin(replace=force)
    remove_partial(stage.path)
    atomic_write_text(stage.path / "recipe.yaml", recipe)
    return _checkpoint(stage, training.resume), changed


def _record(stage: StageFolder) -> dict[str, Any] | None:
    path = stage.path / INPUTS
    found: dict[str, Any] | None = read_json(path).get(STARTED) if path.exists() else None
    return found


def _starts_elsewhere(stage: StageFolder, wanted: Path) -> bool:
    """True until the start that `resume_from` names has been recorded."""
    if stage.recorded() != stage.fingerprint:
        return True
    started, named = _record(stage), wanted.resolve()
    if named in (stage.path.resolve(), *(path.resolve() for path in stage.path.glob("step_*"))):
        return started is None and not steps(stage.path)
    return started is None or named not in (Path(started["path"]), Path(started["path"]).parent)


def _set_aside(stage: StageFolder, start: Path) -> None:
    """Keep elsewhere what the folder has of a run with these settings that began in another way."""
    own = stage.recorded() == stage.fingerprint and steps(stage.path)
    if own and start.parent.resolve() != stage.path.resolve():
        earlier = replace(stage, backup=stage.path.parent / "previous")
        say(f"{stage.path} had begun in another way; that is kept in {earlier.place_in_backup()}")
        earlier.set_aside()
        stage.path.mkdir(parents=True)


def _checkpoint(stage: StageFolder, resumes: bool) -> Path | None:
    folder, started = stage.path, _record(stage)
    if started is not None and started["inside"]:
        forget_after(folder, started["step"], stage.fingerprint)
    if not resumes and started is None:
        forget_after(folder, -1)
        return None
    found = newest(folder)
    if found is None and started is not None:
        found = resolve_resume(Path(started["path"]))
    return found


def require_groups(checkpoint: Path, groups: list[str]) -> None:
    """Refuse a checkpoint whose optimizer can not go on with these groups.

    Raises:
        ConfigError: names both.
    """
    path = checkpoint / PROGRESS
    saved = read_json(path).get("groups") if path.is_file() else None
    if saved is not None and saved != groups:
        raise other_groups(checkpoint, saved, groups)
