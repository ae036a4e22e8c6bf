"""`limbeck run`: the stages of a recipe as nodes, each with a fingerprint of what it is made from.

The one idea: a node is a folder and a hash of its inputs, which hold the hashes of the nodes before it. A
folder that is complete with the same hash is found done; one with another hash is moved to `previous/`
(and moved back when the recipe goes back); everything else is made, or continued where it was killed.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limbeck import ranks
from limbeck.config import Recipe
from limbeck.console import say, warn
from limbeck.data.pack import pack, pack_inputs
from limbeck.data.sources import open_source
from limbeck.data.tokenizer import recipe_tokenizer, train_tokenizer
from limbeck.errors import ConfigError, LimbeckError
from limbeck.models import model_identity
from limbeck.storage import (
    INPUTS,
    MANIFEST,
    StageFolder,
    atomic_write_text,
    folder_lock,
    plain_disk_errors,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)


@dataclass(frozen=True)
class Node:
    """One stage of the run.

    Attributes:
        name: as printed and in `--json`.
        folder: what it writes.
        inputs: computes what it is made from; called once the nodes before it are done.
        make: makes or continues it; with True, starts over.
        after: names of the nodes it reads.
        aside: where its folder goes when it was made from other inputs; None for a folder the user named,
            which is refused instead.
        shared: all ranks of a torchrun make it together; other nodes are rank 0's.
    """

    name: str
    folder: Path
    inputs: Callable[[], dict[str, Any]]
    make: Callable[[StageFolder, bool], object]
    after: tuple[str, ...] = ()
    aside: Path | None = None
    shared: bool = False

    def stage(self) -> StageFolder:
        """The node's folder with its inputs."""
        command = _COMMANDS.get(self.name.partition(":")[0], "run")
        return StageFolder(self.folder, command, self.inputs(), self.aside)


_COMMANDS = {"pack": "data pack", "cache": "teacher cache", "train": "train"}


@dataclass
class StageReport:
    """What became of one node."""

    name: str
    state: str
    seconds: float


@dataclass
class RunReport:
    """What `limbeck run` did."""

    stages: list[StageReport] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    sample: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)


def build_nodes(recipe: Recipe) -> list[Node]:
    """The nodes that the recipe asks for, in order."""
    nodes = _data_nodes(recipe)
    stages = [own for _, own in recipe.stage_recipes()] if recipe.stages.enabled else [recipe]
    for own in stages:  # stages may have rows of their own; those with the same rows share them
        known = {node.name for node in nodes}
        if f"pack{own.data_name}" not in known:
            nodes.append(_pack_node(own, nodes))
        if own.distils and own.teacher.reads_cache and f"cache{own.data_name}" not in known:
            nodes.append(_cache_node(own))
    packed = tuple(node.name for node in nodes if node.name.startswith("pack"))
    made = tuple(node.name for node in nodes if node.name.startswith(("pack", "cache")))
    nodes.append(_train_node(recipe, "train", recipe.student_dir, made))
    students = {"student_kd" if recipe.distils else "student_ce": recipe.student_dir}
    if recipe.pipeline.ce_baseline and recipe.distils:
        baseline = recipe.without_teacher()
        students["student_ce"] = recipe.root / "student-ce"
        nodes.append(_train_node(baseline, "train_ce", students["student_ce"], packed))
    trained = tuple(node.name for node in nodes if node.name.startswith("train"))
    nodes.append(_evaluate_node(recipe, students, ("pack", *trained)))
    if recipe.pipeline.generate:
        nodes.append(_generate_node(recipe))
    if recipe.pipeline.export:
        nodes.append(_export_node(recipe))
    return nodes


def _aside(recipe: Recipe, named: Path | None = None) -> Path | None:
    """Where superseded results of this run go; nowhere for a folder the user named."""
    return recipe.root / "previous" if named is None else None


def _data_nodes(recipe: Recipe) -> list[Node]:
    nodes = []
    if recipe.tokenizer.train_vocab_size is not None:

        def tokenizer_inputs() -> dict[str, Any]:
            dataset = recipe.dataset
            return {
                "source": open_source(dataset).identity(),
                "vocab_size": recipe.tokenizer.train_vocab_size,
                "text_column": dataset.text_column,
                "max_samples": dataset.max_samples,
                "validation_fraction": dataset.validation_fraction,
            }

        def make_tokenizer(stage: StageFolder, force: bool) -> None:
            stage.begin(replace=force)
            trained = train_tokenizer(recipe, stage.path)
            write_manifest(stage.path, {"kind": "tokenizer", "fingerprint": stage.fingerprint, "hash": trained.hash})

        folder = recipe.root / "tokenizer"
        nodes.append(Node("tokenizer", folder, tokenizer_inputs, make_tokenizer, aside=_aside(recipe)))
    nodes.append(_pack_node(recipe, nodes))
    return nodes


def _pack_node(recipe: Recipe, before: Sequence[Node]) -> Node:
    return Node(
        f"pack{recipe.data_name}",
        recipe.packed_dir,
        lambda: pack_inputs(recipe.dataset, open_source(recipe.dataset), recipe_tokenizer(recipe)),
        lambda stage, force: pack(recipe.dataset, recipe_tokenizer(recipe), stage.path, aside=stage.aside, force=force),
        after=tuple(node.name for node in before if node.name == "tokenizer"),
        aside=_aside(recipe, recipe.dataset.packed_dir),
    )


def _cache_node(recipe: Recipe) -> Node:
    def inputs() -> dict[str, Any]:
        from limbeck.teachers.build_cache import cache_inputs

        path = recipe.cache_dir / INPUTS
        gone = recipe.teacher.model is None and not recipe.teacher.is_remote
        if gone and path.exists():  # a cache brought from elsewhere, without its teacher
            return dict(read_json(path)["inputs"])
        return cache_inputs(recipe)

    def make(stage: StageFolder, force: bool) -> None:
        from limbeck.teachers.build_cache import build_cache

        build_cache(recipe, stage.path, aside=stage.aside, force=force)

    aside = _aside(recipe, recipe.teacher.cache_dir)
    after = (f"pack{recipe.data_name}",)
    return Node(f"cache{recipe.data_name}", recipe.cache_dir, inputs, make, after, aside, shared=True)


def _train_node(recipe: Recipe, name: str, folder: Path, after: tuple[str, ...]) -> Node:
    def inputs() -> dict[str, Any]:
        from limbeck.training.stages import run_inputs

        return run_inputs(recipe)

    def make(stage: StageFolder, force: bool) -> None:
        from limbeck.training.stages import train

        train(recipe, stage.path, aside=stage.aside, force=force)

    # A changed mode with resume_from goes on in the same folder, by the user's own word.
    aside = _aside(recipe, recipe.training.output_dir or recipe.training.resume_from)
    return Node(name, folder, inputs, make, after, aside, shared=True)


def _evaluate_node(recipe: Recipe, students: dict[str, Path], after: tuple[str, ...]) -> Node:
    def inputs() -> dict[str, Any]:
        teacher = None if recipe.teacher.is_remote else recipe.teacher.model
        return {
            "packed": read_manifest(recipe.packed_dir, "data pack")["fingerprint"],
            "students": {name: read_manifest(folder, "train")["weights"] for name, folder in students.items()},
            "teacher": model_identity(teacher, recipe.teacher.revision) if teacher else None,
            "attention": recipe.dataset.attention,
            "max_rows": recipe.evaluation.max_rows,
            "top_k": recipe.teacher.top_k,
            "dtype": recipe.teacher.dtype,
        }

    def make(stage: StageFolder, force: bool) -> None:
        from limbeck.evaluation.run import evaluate_recipe, write_results

        stage.begin(replace=force)
        results = evaluate_recipe(recipe, {name: str(folder / "final") for name, folder in students.items()})
        write_results(stage.path, results)
        write_manifest(stage.path, {"kind": "evaluation", "fingerprint": stage.fingerprint})

    return Node("evaluate", recipe.root / "evaluation", inputs, make, after, _aside(recipe))


def _generate_node(recipe: Recipe) -> Node:
    def inputs() -> dict[str, Any]:
        return {
            "student": read_manifest(recipe.student_dir, "train")["weights"],
            "generation": recipe.generation.model_dump(mode="json"),
        }

    def make(stage: StageFolder, force: bool) -> None:
        from limbeck.evaluation.generate import generate

        stage.begin(replace=force)
        atomic_write_text(stage.path / "sample.txt", generate(recipe, str(recipe.student_dir / "final")))
        write_manifest(stage.path, {"kind": "sample", "fingerprint": stage.fingerprint})

    return Node("generate", recipe.root / "sample", inputs, make, ("train",), _aside(recipe))


def _export_node(recipe: Recipe) -> Node:
    section = recipe.export

    def inputs() -> dict[str, Any]:
        return {
            "student": read_manifest(recipe.student_dir, "train")["weights"],
            "formats": recipe.pipeline.export,
            "settings": section.model_dump(mode="json", exclude={"input", "output", "verify_tokens"}),
        }

    def make(stage: StageFolder, force: bool) -> None:
        from limbeck.export.run import export_student

        stage.begin(replace=force)
        sizes: dict[str, Any] = {}
        for kind in recipe.pipeline.export:
            output = stage.path / ("packed" if kind == "packed" else f"{recipe.name}.gguf")
            changes = {"input": recipe.student_dir, "output": output, "format": kind}
            own = recipe.model_copy(update={"export": section.model_copy(update=changes)})
            sizes.update(export_student(own, verify=True))
        write_json(stage.path / "sizes.json", {key: sizes[key] for key in _SIZES if key in sizes})
        write_manifest(stage.path, {"kind": "export", "fingerprint": stage.fingerprint})

    return Node("export", recipe.root / "export", inputs, make, ("train",), _aside(recipe))


_SIZES = ("checkpoint_mb", "packed_mb", "gguf_mb", "type", "weights_equal")


def select(nodes: Sequence[Node], last: str | None) -> list[Node]:
    """The nodes that `last` needs, itself included; all of them when it is None.

    Raises:
        ConfigError: the recipe has no such stage.
    """
    if last is None:
        return list(nodes)
    by_name = {node.name: node for node in nodes}
    if last not in by_name:
        raise ConfigError(f"this recipe has no {last} stage (it has {', '.join(by_name)}).")
    wanted: set[str] = set()
    queue = [last]
    while queue:
        name = queue.pop()
        wanted.add(name)
        queue.extend(by_name[name].after)
    return [node for node in nodes if node.name in wanted]


def plan(recipe: Recipe, last: str | None = None) -> list[StageReport]:
    """What `run_pipeline` would do, without doing anything: `done` or `to run` a stage."""
    pending: set[str] = set()
    reports = []
    for node in select(build_nodes(recipe), last):
        to_run = bool(pending & set(node.after)) or not _is_made(node.stage())
        if to_run:
            pending.add(node.name)
        reports.append(StageReport(node.name, "to run" if to_run else "done", 0.0))
    return reports


def _is_made(stage: StageFolder) -> bool:
    earlier = stage.earlier()
    return stage.is_done() or (earlier is not None and earlier.is_done())


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
    nodes = select(build_nodes(recipe), last)
    _check_ahead(recipe, {node.name for node in nodes}, force)
    with folder_lock(recipe.root) if ranks.rank() == 0 else contextlib.nullcontext():
        for node in nodes:
            started = time.perf_counter()
            if keep_existing and node.name == last and (node.folder / MANIFEST).exists():
                say(f"{node.name}: {node.folder} exists and is kept as it is")
                state = "skipped"
            else:
                state = _run_node(recipe, node, force=force and node.name == last)
            report.stages.append(StageReport(node.name, state, round(time.perf_counter() - started, 2)))
            if node.name == "pack" and nodes[-1].name != "pack":
                _check_held_out(recipe, needed=any(later.name == "evaluate" for later in nodes))
    for node in nodes:
        if node.name == "evaluate":
            report.evaluation = read_json(node.folder / "results.json")
        if node.name == "generate":
            report.sample = (node.folder / "sample.txt").read_text(encoding="utf-8")
        if node.name == "export":
            report.sizes = read_json(node.folder / "sizes.json")
    return report


def _follow(node: Node) -> str:
    """What ranks other than 0 do: share the nodes that all ranks make, and wait for the rest."""
    stage = node.stage()
    if node.shared:
        ranks.wait_until(lambda: stage.recorded() == stage.fingerprint, f"rank 0 to begin {node.folder}")
        node.make(stage, False)
    ranks.wait_until(stage.is_done, f"{node.folder} to be finished")
    return "done"


def _run_node(recipe: Recipe, node: Node, *, force: bool) -> str:
    if ranks.rank() > 0:
        return _follow(node)
    stage = node.stage()
    resumes = node.name == "train" and recipe.training.resume_from is not None
    if stage.is_done() and not (resumes or force):
        say(f"{node.name}: found done")
        return "skipped"
    if not force and stage.bring_back() and stage.is_done():
        say(f"{node.name}: found done (an earlier run with these settings)")
        return "skipped"
    say(f"{node.name}: running")
    with plain_disk_errors(node.folder):
        node.make(stage, force)
    if node.shared and ranks.world_size() > 1:
        ranks.wait_until(stage.is_done, f"the other ranks to finish {node.folder}")
    if not stage.is_done():
        raise LimbeckError(f"{node.name} ended without completing {node.folder}.")
    return "done"


def _check_ahead(recipe: Recipe, names: set[str], force: bool) -> None:
    """Refuse at once what a late stage would refuse after hours of the earlier ones."""
    if "train" in names and recipe.student.model is None and not recipe.student.config:
        raise ConfigError("no student: set student.model to pretrained weights or student.config to an architecture.")
    if "evaluate" in names and recipe.dataset.validation_fraction == 0.0:
        raise ConfigError("dataset.validation_fraction is 0 and the run ends with held-out scores; raise it.")
    if force and ranks.world_size() > 1:
        raise ConfigError("--force starts over in one process; run it once without torchrun first.")
    asked = any(name.startswith(("train", "cache")) for name in names)
    if asked and recipe.distils and recipe.teacher.is_remote and ranks.rank() == 0:
        _check_remote(recipe)
    if "train" in names:
        for tracker in recipe.training.report_to:
            if find_spec(tracker) is None:
                raise ConfigError(
                    f"training.report_to names {tracker}, which is not installed. Install it "
                    f"(`pip install {tracker}`), or set report_to to []."
                )


def _check_remote(recipe: Recipe) -> None:
    """Find out before hours of tokenising whether the endpoint is there and can give what the recipe wants.

    One that has answered in this run before may be gone: what is finished needs it no more.
    """
    from limbeck.teachers.choose import open_remote
    from limbeck.teachers.identity import was_asked

    if recipe.tokenizer.train_vocab_size is None and not was_asked(recipe):  # else its tokenizer is still to be made
        open_remote(recipe, recipe_tokenizer(recipe), quiet=True).close()


def _check_held_out(recipe: Recipe, *, needed: bool) -> None:
    """Tell before the training, not after it, that nothing is left to score on."""
    manifest = read_manifest(recipe.packed_dir, "data pack")
    if recipe.dataset.validation_fraction > 0.0 and not manifest["splits"]["validation"]["rows"]:
        message = (
            f"none of the {manifest['documents']} documents fell into the validation split "
            f"(dataset.validation_fraction {recipe.dataset.validation_fraction}, chosen by document). Raise it, or cut "
            "the text into more documents"
        )
        if needed:
            raise LimbeckError(f"{message}.")
        warn(message)
