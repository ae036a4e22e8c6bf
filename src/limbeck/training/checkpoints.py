"""Whole checkpoints: `step_N/` folders that appear by one rename, the `latest` pointer, `best/`, and room on disk.

The one idea: a checkpoint is written beside its place, sealed with a manifest of checksums, and renamed; so
whatever is called `step_N` is whole, and whatever a kill or a full disk left behind is a `.tmp` folder that
nobody reads.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from limbeck.errors import ConfigError, CorruptError, LimbeckError
from limbeck.folders import MANIFEST
from limbeck.manifests import CheckpointManifest
from limbeck.storage import (
    atomic_write_text,
    commit_folder,
    fsync_folder,
    fsync_tree,
    inside,
    read_json,
    sha256_file,
    temporary_for,
)

LATEST = "latest"
PROGRESS = "progress.json"
BEST = "best"
_NAME = re.compile(r"^step_(\d+)$")
_MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".md")
_NOT_MODEL = {"trainer_state.json", PROGRESS, MANIFEST}
_FULL = 0.90


def partial_folder(folder: Path, step: int) -> Path:
    """Where checkpoint `step` is written before it is whole."""
    return temporary_for(folder / f"step_{step}")


def commit(folder: Path, step: int) -> None:
    """Flush and seal the written checkpoint, put it into place and point `latest` at it."""
    partial, final = partial_folder(folder, step), folder / f"step_{step}"
    files = [path for path in fsync_tree(partial) if path.name != MANIFEST]
    size = sum(path.stat().st_size for path in files)
    records = {str(path.relative_to(partial)): sha256_file(path) for path in files}
    CheckpointManifest(step=step, bytes=size, files=records).write(partial)
    if final.exists():  # a damaged or abandoned one of the same step
        remove(final)
    partial.rename(final)
    fsync_folder(folder)
    atomic_write_text(folder / LATEST, f"step_{step}\n")


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; its manifest goes first, so that a kill in between leaves rubbish and no half-truth."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def rotate(folder: Path, keep: int | None, best_step: int | None) -> None:
    """Delete all but the newest `keep` whole checkpoints and the best one; None keeps all."""
    if keep is None:
        return
    for step in steps(folder)[:-keep]:
        if step != best_step:
            remove(folder / f"step_{step}")


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's folder, ascending."""
    found = []
    for path in folder.glob("step_*"):
        match = _NAME.match(path.name)
        if match and (path / MANIFEST).exists():
            found.append(int(match[1]))
    return sorted(found)


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or else the newest whole one, verified; None when there is none."""
    path = _newest_whole(folder)
    if path is not None:
        verify(path)
    return path


def _newest_whole(folder: Path) -> Path | None:
    """The same, as far as names tell."""
    found = steps(folder)
    if not found:
        return None
    pointer = folder / LATEST
    if pointer.exists():
        named = inside(folder, pointer.read_text(encoding="utf-8").strip() or ".")
        if (named / MANIFEST).exists() and _NAME.match(named.name):
            return named
    return folder / f"step_{found[-1]}"


def what_remains(folder: Path | str) -> str:
    """What the same command does next, in a few words: where it goes on, or that it starts over."""
    found = _newest_whole(Path(folder))
    if found is None:
        return "the same command starts over, as no checkpoint had been saved"
    return f"the same command goes on from {found}"


def verify(folder: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Raises:
        CorruptError: a file is missing or altered.
    """
    for name, checksum in CheckpointManifest.read(folder).files.items():
        path = inside(folder, name)
        if not path.is_file() or sha256_file(path) != checksum:
            raise CorruptError(
                f"{path} is missing or damaged (its checksum is not the recorded one). Delete {folder} to continue "
                "from the checkpoint before it."
            )


def forget_after(folder: Path, step: int, own: str | None = None) -> None:
    """Drop checkpoints later than `step`, which belong to what the run leaves behind.

    Those made under the settings `own` stay: they are the run's, later than its start.
    """
    dropped = [
        found for found in steps(folder) if found > step and (own is None or _group_settings(folder, found) != own)
    ]
    if dropped:
        (folder / LATEST).unlink(missing_ok=True)
        if (folder / BEST).exists():
            shutil.rmtree(folder / BEST)
    for later in dropped:
        remove(folder / f"step_{later}")


def _group_settings(folder: Path, step: int) -> str | None:
    path = folder / f"step_{step}" / PROGRESS
    return read_json(path)["settings"] if path.is_file() else None


def remove_partial(folder: Path) -> None:
    """Delete what a kill in the middle of a save or a removal left behind."""
    for path in [*folder.glob(".step_*.tmp"), *folder.glob("step_*")]:
        if path.is_dir() and not (path.name.startswith("step_") and (path / MANIFEST).exists()):
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
            f"training.resume_from is {path}, which is no whole checkpoint and holds none. Name a step_N "
            "folder or a run's folder; to start from weights alone set student.model."
        )
    return found


def other_groups(checkpoint: Path | str | None, saved: object, wanted: list[str]) -> ConfigError:
    """The refusal of a checkpoint whose optimizer can not go on with these groups."""
    return ConfigError(
        f"{checkpoint} was saved with the optimizer groups {saved} and this run has {wanted}. Resume with the same "
        f"optimizer and parameter_lr_multipliers, or start from its weights alone with student.model: {checkpoint}."
    )


def checkpoint_step(path: Path) -> int:
    """The optimizer step a checkpoint was saved at."""
    return CheckpointManifest.read(path).step


def publish_model(source: Path, target: Path) -> None:
    """Put a model folder's weights, config and tokenizer, without optimizer state, at `target` in one rename.

    Weights are linked where the file system can, so that `best/` costs no room.
    """
    partial = temporary_for(target)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix not in _MODEL_FILES or path.name in _NOT_MODEL:
            continue
        try:
            os.link(path, partial / path.name)
        except OSError:
            shutil.copy2(path, partial / path.name)
    commit_folder(partial, target)


def room_for(folder: Path, needed: int) -> tuple[str | None, str | None]:
    """A warning when the disk is 90 % full, and a refusal when `needed` bytes do not fit; None where all is well."""
    usage = shutil.disk_usage(folder)
    # What root alone may use is not room for a run.
    share = 1.0 - usage.free / (usage.used + usage.free)
    state = f"{usage.free / 1e9:.2f} GB free at {folder}, a checkpoint takes {needed / 1e9:.2f} GB"
    warning = f"Disk {share:.0%} full ({state})" if share > _FULL else None
    refusal = f"no room for a checkpoint ({state})" if needed > usage.free else None
    return warning, refusal


def last_size(folder: Path) -> int | None:
    """Bytes of the newest whole checkpoint: the estimate for the next one."""
    found = steps(folder)
    return CheckpointManifest.read(folder / f"step_{found[-1]}").bytes if found else None


def first_failure(pieces: Sequence[Callable[[], object]]) -> str | None:
    """Call every piece of a save, whatever happens to the others; what went wrong first, when files failed.

    Every piece runs because ranks talk to each other in some of them. An error that is not a file's goes on.
    """
    from safetensors import SafetensorError

    problem = None
    for piece in pieces:
        try:
            piece()
        except (OSError, SafetensorError) as error:
            problem = problem or str(error)
        except Exception as error:
            # torch.save and tokenizers report a failed write without a type of its own
            if not any(word in str(error) for word in ("PytorchStreamWriter", "unexpected pos", "os error")):
                raise
            problem = problem or str(error).splitlines()[0]
    return problem
