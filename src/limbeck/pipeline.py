"""`limbeck run`: the stages that a recipe asks for, in order, each found done, continued or made.

The one idea: a stage is a folder and a hash of its inputs, which hold the hashes of the stages before it. A
folder that is complete with the same hash is found done; one with another hash is moved to `previous/`
(and moved back when the recipe goes back); everything else is made, or continued where it was killed.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck import ranks
from limbeck.config import Recipe
from limbeck.console import say
from limbeck.errors import ConfigError, LimbeckError
from limbeck.folders import MANIFEST, RECIPE
from limbeck.recipe import as_written
from limbeck.registry import STAGES
from limbeck.stages.base import Stage
from limbeck.storage import atomic_write_text, folder_lock, plain_disk_errors


@dataclass
class StageReport:
    """What became of one stage."""

    name: str
    state: str
    seconds: float
    needs: str = ""


@dataclass
class RunReport:
    """What `limbeck run` did.

    Attributes:
        stages: what became of each.
        results: what the stages show, by key.
        texts: the same for a person, a paragraph each.
    """

    stages: list[StageReport] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


def build_stages(recipe: Recipe) -> list[Stage]:
    """The stages that the recipe asks for, in order.

    Raises:
        ConfigError: two have one name, or one reads a stage that is not before it.
    """
    found: list[Stage] = []
    for _, kind in STAGES.items():
        for stage in kind.of(recipe, list(found)):
            names = [other.name for other in found]
            if stage.name in names:
                raise ConfigError(f"two stages are named {stage.name!r}; rename one ({type(stage).__name__}).")
            missing = [name for name in stage.after if name not in names]
            if missing:
                raise ConfigError(
                    f"stage {stage.name} reads {missing[0]}, and this recipe has {', '.join(names)} before it."
                )
            found.append(stage)
    return found


def select(stages: Sequence[Stage], last: str | None) -> list[Stage]:
    """The stages that `last` needs, itself included; all of them when it is None.

    Raises:
        ConfigError: the recipe has no such stage.
    """
    if last is None:
        return list(stages)
    by_name = {stage.name: stage for stage in stages}
    if last not in by_name:
        raise ConfigError(f"this recipe has no {last} stage (it has {', '.join(by_name)}).")
    wanted: set[str] = set()
    queue = [last]
    while queue:
        name = queue.pop()
        wanted.add(name)
        queue.extend(by_name[name].after)
    return [stage for stage in stages if stage.name in wanted]


def plan(recipe: Recipe, last: str | None = None) -> list[StageReport]:
    """What `run_pipeline` would do, without doing anything: `done` or `to run` a stage, and what that needs.

    Raises:
        LimbeckError: as `run_pipeline`, before it does anything.
    """
    from limbeck.teachers.identity import nothing_written

    stages = select(build_stages(recipe), last)
    pending: set[str] = set()
    reports = []
    with nothing_written():
        _check_stages(recipe, stages)
        for stage in stages:
            to_run = bool(pending & set(stage.after)) or not stage.folder.is_kept()
            if to_run:
                pending.add(stage.name)
            reports.append(
                StageReport(stage.name, "to run" if to_run else "done", 0.0, stage.needs() if to_run else "")
            )
    return reports


def _check_stages(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Refuse now what a stage would refuse after the work of those before it."""
    in_the_way = next((path for path in (recipe.root, *recipe.root.parents) if path.exists()), recipe.root)
    if in_the_way.is_file():
        raise ConfigError(f"{recipe.root} cannot be made: {in_the_way} is a file. Choose another output_dir.")
    for stage in reversed(stages):  # the last ask the least: an endpoint is looked at when all else is well
        stage.check()


def run_pipeline(
    recipe: Recipe, last: str | None = None, *, force: bool = False, keep_existing: bool = False
) -> RunReport:
    """Run the recipe's stages up to `last`, skipping what is done.

    Args:
        recipe: the resolved recipe.
        last: the last stage wanted; None runs them all.
        force: make the stage `last` again even if its folder is done or was made from other inputs.
        keep_existing: leave the folder of `last` as it is when it is complete, whatever it was made from.
    """
    report = RunReport()
    stages = select(build_stages(recipe), last)
    if force and ranks.world_size() > 1:
        raise ConfigError("--force starts over in one process; run it once without torchrun first.")
    _check_stages(recipe, stages)
    with folder_lock(recipe.root) if ranks.rank() == 0 else contextlib.nullcontext():
        for number, stage in enumerate(stages):
            started = time.perf_counter()
            if keep_existing and stage.name == last and (stage.path / MANIFEST).exists():
                say(f"{stage.name}: {stage.path} exists and is kept as it is")
                state = "skipped"
            else:
                with _keeping_recipe(recipe, stage):
                    state = _run(stage, force=force and stage.name == last)
            report.stages.append(StageReport(stage.name, state, round(time.perf_counter() - started, 2)))
            stage.made(stages[number + 1 :])
    for stage in stages:
        found = stage.read()
        report.results.update(found)
        if (text := stage.text(found)) is not None:
            report.texts.append(text)
    return report


@contextlib.contextmanager
def _keeping_recipe(recipe: Recipe, stage: Stage) -> Iterator[None]:
    """Once the stage has begun, however it ends, the run's folder holds the recipe that it stands for."""
    try:
        yield
    finally:
        if stage.keeps_recipe and ranks.rank() == 0 and stage.folder.recorded() == stage.folder.fingerprint:
            atomic_write_text(recipe.root / RECIPE, as_written(recipe))


def _follow(stage: Stage) -> str:
    """What ranks other than 0 do: share the stages that all ranks make, and wait for the rest."""
    if stage.shared:
        folder = stage.folder
        ranks.wait_until(lambda: folder.recorded() == folder.fingerprint, f"rank 0 to begin {stage.path}")
        stage.make(folder, force=False)
    ranks.wait_until(stage.folder.is_done, f"{stage.path} to be finished")
    return "done"


def _run(stage: Stage, *, force: bool) -> str:
    if ranks.rank() > 0:
        return _follow(stage)
    folder = stage.anew() if force else stage.folder
    if not force:
        done = folder.is_done()
        if (done or folder.found_done()) and not (done and stage.again):
            say(f"{stage.name}: found done" + ("" if done else " (an earlier run with these settings)"))
            return "skipped"
    say(f"{stage.name}: running")
    if not force and folder.recorded() not in (None, folder.fingerprint) and not stage.again:
        say(f"{stage.name}: {stage.replaces(folder)}" + stage.kept_where(folder))
    elif folder.recorded() is None and (hint := stage.hint()) is not None:
        say(f"{stage.name}: {hint}")
    with plain_disk_errors(stage.path):
        stage.make(folder, force=force)
    if stage.shared and ranks.world_size() > 1:
        ranks.wait_until(folder.is_done, f"the other ranks to finish {stage.path}")
    if not folder.is_done():
        raise LimbeckError(f"{stage.name} ended without completing {stage.path}.")
    return "done"
