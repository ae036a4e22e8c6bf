"""What each command does once its words are parsed; imported when a command runs, not for `--help`."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from limbeck.config import ModelSource, Recipe
from limbeck.config.unused import without_effect
from limbeck.console import warn
from limbeck.errors import ConfigError, LimbeckError

if TYPE_CHECKING:  # imports torch, which a GGUF file does not need
    from limbeck.pipeline import RunReport


@dataclass(frozen=True)
class Options:
    """The switches of a command that are no recipe keys."""

    dry_run: bool = False
    force: bool = False
    skip_existing: bool = False
    verify: bool = False
    prune: bool = False


@dataclass(frozen=True)
class Result:
    """A command's answer: a JSON-serialisable value, and how a person reads it."""

    data: Any
    text: str


def run(recipe: Recipe, options: Options) -> Result:
    """Run every stage of a recipe."""
    found = _pipeline(recipe, None, options)
    if options.dry_run:
        return found
    commands = _next_commands(recipe)
    return Result({**found.data, "next": commands}, f"{found.text}\n\n{_next_text(commands)}")


def _next_text(commands: Sequence[str]) -> str:
    """Commands to type, as a person reads them."""
    return "\n".join(["next:", *(f"  {command}" for command in commands)])


def _next_commands(recipe: Recipe) -> list[str]:
    """What one may want to type now."""
    from limbeck.export.source import has_gguf

    called = Path(sys.argv[0])
    beside = str(called) if called.name == "limbeck" else f"{sys.executable} -m limbeck"
    program = "limbeck" if shutil.which("limbeck") else beside
    prompt = shlex.quote((recipe.generation.prompt.splitlines() or [""])[0])
    root = shlex.quote(str(recipe.root))
    other = shlex.quote(str(recipe.root.parent / f"{recipe.root.name}-mine"))
    can_be_served = has_gguf(recipe.student_dir / "final")
    if "gguf" in recipe.pipeline.export and can_be_served:
        then = f"{program} serve {root}"
    else:
        then = f"{program} export {root} --format {'gguf' if can_be_served else 'hf'}"
    return [
        f"{program} generate {root} --prompt {prompt}",
        then,
        f"{program} run {root} --dataset YOUR.txt --output-dir {other}",
    ]


def data_pack(recipe: Recipe, options: Options) -> Result:
    """Tokenise and pack the dataset."""
    return _pipeline(recipe, "pack", options)


def teacher_cache(recipe: Recipe, options: Options) -> Result:
    """Cache the teacher's targets (packing the data first if needed)."""
    return _pipeline(_for_caching(recipe), "cache", options)


def compress(recipe: Recipe, options: Options) -> Result:
    """Compress a model (packing the text it is measured on first)."""
    section = recipe.compress
    if section is None:
        raise ConfigError(
            "limbeck compress needs to know how: `limbeck compress MODEL --method latent --keep 0.5 --calibration "
            "TEXT`, or --keep-layers and --keep-ffn for a dense model."
        )
    if section.calibration_rows and "name" not in recipe.dataset.model_fields_set:
        warn("no --calibration: the weights alone decide; a text like the student's makes a better student")
        section = section.model_copy(
            update={"calibration_rows": 0}
        )  # `prune` is told what it lacks by the stage's check
        recipe = recipe.model_copy(update={"compress": section})
    return _pipeline(recipe, "compress", options)


def teacher_probe(recipe: Recipe, options: Options) -> Result:
    """Find out what an endpoint speaks and gives."""
    from limbeck.teachers.probe import probe, report_text

    found = probe(recipe)
    return Result(found, report_text(found))


def teacher_serve(recipe: Recipe, options: Options) -> Result:
    """Serve the teacher until stopped."""
    from limbeck.teachers.server.run import serve

    found = serve(recipe.teacher, recipe.teacher_server, recipe.training.device)
    return Result(found, f"{found['model']} was served at {found['url']}")


def train(recipe: Recipe, options: Options) -> Result:
    """Train the student (making what it needs first)."""
    return _pipeline(recipe, "train", options)


def _for_caching(recipe: Recipe) -> Recipe:
    """`teacher cache` makes a cache whatever the recipe trains with."""
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"use_cached_logits": True}),
            "training": recipe.training.model_copy(update={"mode": "distill"}),
        }
    )


def _pipeline(recipe: Recipe, last: str | None, options: Options) -> Result:
    from limbeck.pipeline import plan, run_pipeline

    if options.force and recipe.training.resume_from is not None:
        raise ConfigError(
            f"--force starts over and training.resume_from goes on from {recipe.training.resume_from}; leave one out."
        )
    for problem in without_effect(recipe):
        warn(problem)
    if options.dry_run:
        stages = plan(recipe, last)
        text = "\n".join(f"{stage.name:<10} {stage.state:<7} {stage.needs}".rstrip() for stage in stages)
        return Result({"stages": [{"name": s.name, "state": s.state, "needs": s.needs} for s in stages]}, text)
    report = run_pipeline(recipe, last, force=options.force, keep_existing=options.skip_existing)
    data: dict[str, Any] = {"stages": [asdict(stage) for stage in report.stages], **report.results}
    folders = {
        "pack": recipe.packed_dir,
        "compress": recipe.compress_dir,
        "cache": recipe.cache_dir,
        "train": recipe.student_dir,
    }
    folder = folders.get(last or "")
    if folder is not None:
        data["output"] = str(folder)
    return Result(data, _report_text(report, folder or recipe.root))


def _report_text(report: "RunReport", folder: Path) -> str:
    steps = "  ".join(f"{stage.name} {stage.state} {stage.seconds:.1f}s" for stage in report.stages)
    return "\n\n".join([steps, *report.texts, f"results in {folder}"])


def eval_student(recipe: Recipe, options: Options) -> Result:
    """Score a model on the held-out rows."""
    from limbeck.evaluation.run import evaluate_recipe
    from limbeck.evaluation.suites import suites_of, table_text
    from limbeck.training.run import student_folder

    folder = recipe.evaluation.model or student_folder(recipe.student_dir)
    results = evaluate_recipe(recipe, {"student": str(folder)})
    return Result(results, table_text(results, suites_of(recipe.evaluation.suites)))


def generate(recipe: Recipe, options: Options) -> Result:
    """Write a sample with a model."""
    from limbeck.serving.model import is_gguf

    if is_gguf(recipe.generation.model):
        return _generate_gguf(recipe)
    if recipe.engine.draft is not None:
        raise ConfigError(f"engine.draft is {recipe.engine.draft} and {recipe.generation.model} is no GGUF file.")
    from limbeck.evaluation.generate import write_sample
    from limbeck.training.run import student_folder

    folder = recipe.generation.model or student_folder(recipe.student_dir)
    text = write_sample(recipe.generation, ModelSource(str(folder)), recipe.training.device)
    return Result({"model": str(folder), "prompt": recipe.generation.prompt, "text": text}, text)


def _generate_gguf(recipe: Recipe) -> Result:
    from limbeck.serving.generate import write_text

    found = write_text(recipe.generation, recipe.engine)
    rates = ", ".join(f"{key.replace('_', ' ')} {value:,.3g}" for key, value in found["statistics"].items() if value)
    return Result(found, f"{found['text']}\n\n{rates}")


def bench(recipe: Recipe, options: Options) -> Result:
    """Time a GGUF file."""
    from limbeck.serving.bench import text, time_file

    if recipe.bench.model is None:
        raise ConfigError("limbeck bench needs a file: `limbeck bench model.gguf`.")
    found = time_file(_gguf_file(recipe.bench.model), recipe.bench, recipe.engine)
    return Result(found, text(found))


def serve_file(recipe: Recipe, options: Options) -> Result:
    """Serve a GGUF file until stopped."""
    from limbeck.serving.server.run import serve_model

    if recipe.server.model is None:
        raise ConfigError("limbeck serve needs a file: `limbeck serve model.gguf`.")
    found = serve_model(_gguf_file(recipe.server.model), recipe.server, recipe.engine)
    return Result(found, f"{found['model']} was served at {found['url']}")


def export(recipe: Recipe, options: Options) -> Result:
    """Write a finished student for other programs."""
    from limbeck.export.run import export_student, next_steps

    run = recipe.export.input or recipe.root
    name = _export_name(recipe)
    data = export_student(recipe.export, run, name, verify=options.verify)
    commands = next_steps(recipe.export.format, data["output"], name)
    found = "\n".join(f"{key:<24} {value}" for key, value in data.items())
    return Result({**data, "next": commands}, f"{found}\n\n{_next_text(commands)}")


def _export_name(recipe: Recipe) -> str:
    """The run's name; of a model that lies in no run its folder's."""
    given = recipe.export.input
    if given is None or recipe.root.resolve() in (given.resolve(), *given.resolve().parents):
        return recipe.name
    return given.resolve().name


def inspect(recipe: Recipe, options: Options) -> Result:
    """List what a GGUF file holds."""
    from limbeck.export.inspect import describe, inspect_gguf

    if recipe.export.input is None:
        raise ConfigError("limbeck inspect needs a file: `limbeck inspect model.gguf`.")
    found = inspect_gguf(_gguf_file(recipe.export.input))
    return Result(found, describe(found))


def _gguf_file(path: Path) -> Path:
    """The file itself, or the one GGUF file of a run's or an export's folder."""
    if not path.is_dir():
        if not path.is_file():
            raise LimbeckError(f"{path} does not exist. Name a .gguf file.")
        return path
    found = sorted({*path.glob("*.gguf"), *path.glob("export/*.gguf")})
    if len(found) != 1:
        named = ", ".join(map(str, found)) or "none"
        raise ConfigError(f"{path} holds {len(found)} GGUF files ({named}); name one of them.")
    return found[0]


def runs(recipe: Recipe, options: Options) -> Result:
    """List the runs of a folder, and make room."""
    from limbeck.runs import as_records, find_runs, prune, runs_text

    found = find_runs(recipe.output_dir or Path("outputs"))
    if not options.prune:
        return Result({"runs": as_records(found)}, runs_text(found))
    gone = prune(found, dry=options.dry_run)
    size = sum(held.size for held in gone)
    what = "would be deleted" if options.dry_run else "deleted"
    lines = [f"{held.path}  {held.size / 1e6:,.1f} MB" for held in gone]
    data = {"pruned": [str(held.path) for held in gone], "bytes": size, "dry_run": options.dry_run}
    return Result(data, "\n".join([*lines, f"{len(gone)} earlier results {what}, {size / 1e6:,.1f} MB"]))


def config_schema(recipe: Recipe, options: Options) -> Result:
    """The JSON schema of recipes."""
    schema = Recipe.model_json_schema()
    return Result(schema, json.dumps(schema, indent=2))


def config_show(recipe: Recipe, options: Options) -> Result:
    """The resolved recipe."""
    data = json.loads(recipe.model_dump_json())
    return Result(data, yaml.safe_dump(data, sort_keys=False).rstrip())


Command = Callable[[Recipe, Options], Result]


def print_result(result: Result, as_json: bool) -> None:
    """Write a result to stdout: one JSON document, or text."""
    text = json.dumps(result.data, indent=2) if as_json else result.text
    sys.stdout.write(text + "\n")
