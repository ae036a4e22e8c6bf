"""One training run of a recipe in one folder: begin, continue, finish.

The one idea: the folder records what it is trained from. The same inputs continue from the newest whole
checkpoint and end with the same bytes as an undisturbed run; other inputs are refused, unless
`training.resume_from` says that this change of mode is meant, which `provenance.jsonl` then records.

    student/
      inputs.json  recipe.yaml  provenance.jsonl  training.log  runs/   (written first, or as it goes)
      checkpoint-N/  best/  final/  manifest.json                       (manifest last)
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list

from limbeck import ranks
from limbeck.config import Recipe
from limbeck.console import say, warn
from limbeck.data.dataset import PackedDataset
from limbeck.data.tokenizer import LoadedTokenizer, recipe_tokenizer
from limbeck.models import build_student, embedded_vocab_size, model_identity, require_packing
from limbeck.storage import (
    INPUTS,
    MANIFEST,
    StageFolder,
    atomic_write_text,
    commit_folder,
    read_manifest,
    sha256_file,
    write_json,
    write_manifest,
)
from limbeck.teachers.base import Teacher
from limbeck.teachers.choose import open_teacher, teacher_inputs
from limbeck.training.checkpoints import checkpoint_step, forget_after, newest, remove_partial, resolve_resume, steps
from limbeck.training.param_groups import build_param_groups, describe_groups

_USERS_LOGGING_DIR = os.environ.get("TENSORBOARD_LOGGING_DIR")

#: Keys of `training` that change how a run is watched or stored, not what it computes.
_NOT_INPUTS = {
    "output_dir", "resume", "resume_from", "logging_steps", "save_total_limit", "report_to", "device",
    "dataloader_num_workers", "per_device_eval_batch_size", "eval_steps", "eval_rows", "save_steps",
}  # fmt: skip


def train_inputs(recipe: Recipe, rows: PackedDataset, start: str | None = None) -> dict[str, Any]:
    """Everything the trained weights depend on."""
    training = recipe.training.model_dump(mode="json", exclude=_NOT_INPUTS)
    return {
        "packed": rows.fingerprint,
        "attention": recipe.dataset.attention,
        "student": recipe.student.config,
        "start": start
        or (model_identity(recipe.student.model, recipe.student.revision) if recipe.student.model else None),
        "training": training,
        "parameter_lr_multipliers": [rule.model_dump() for rule in recipe.parameter_lr_multipliers],
        "seed": recipe.seed,
        "loss": recipe.loss.model_dump(mode="json", exclude={"chunk_size"}) if recipe.distils else None,
        "teacher": teacher_inputs(recipe),
        "stages": recipe.stages.model_dump() if recipe.stages.enabled else None,
    }


def training_rows(recipe: Recipe) -> PackedDataset:
    """The packed rows a recipe trains on."""
    return PackedDataset(recipe.packed_dir, "train", recipe.dataset.train_rows)


def train(recipe: Recipe, folder: Path, *, aside: Path | None = None, force: bool = False) -> dict[str, Any]:
    """Train the recipe's student in `folder` (through its stages, if it has any); returns the manifest.

    A folder trained from other inputs is moved into `aside` when that is given, and refused otherwise; `force`
    starts over.
    """
    if not recipe.stages.enabled:
        return _train_one(recipe, folder, None, aside, force)
    outer = StageFolder(folder, "train", train_inputs(recipe, training_rows(recipe)), aside)
    main = ranks.rank() == 0
    if main:
        outer.begin(clean=False, replace=force)
    ranks.wait_until(lambda: outer.recorded() == outer.fingerprint, f"rank 0 to begin {folder}")
    start: Path | None = None
    manifest: dict[str, Any] = {}
    for stage in recipe.stages.configs:
        say(f"stage {stage.stage_name}")
        manifest = _train_one(_stage_recipe(recipe, stage), folder / stage.stage_name, start, None, False)
        start = folder / stage.stage_name / "final"
    assert start is not None
    if main:
        _copy_model(start, folder / "final")
        names = [stage.stage_name for stage in recipe.stages.configs]
        manifest = write_manifest(folder, {**manifest, "fingerprint": outer.fingerprint, "stages": names})
    return manifest


def _stage_recipe(recipe: Recipe, stage: Any) -> Recipe:
    length = (
        {"max_steps": stage.max_steps} if stage.max_steps else {"max_steps": -1, "num_train_epochs": stage.num_epochs}
    )
    changes: dict[str, Any] = {
        "training": recipe.training.model_copy(update=length),
        "stages": recipe.stages.model_copy(update={"enabled": False}),
    }
    if stage.parameter_lr_multipliers is not None:
        changes["parameter_lr_multipliers"] = stage.parameter_lr_multipliers
    return recipe.model_copy(update=changes)


def _train_one(recipe: Recipe, folder: Path, start: Path | None, aside: Path | None, force: bool) -> dict[str, Any]:
    tokenizer = recipe_tokenizer(recipe)
    rows = training_rows(recipe)
    rows.check(tokenizer, recipe.dataset.max_length)
    held_out = PackedDataset(recipe.packed_dir, "validation", recipe.training.eval_rows)
    teacher = open_teacher(recipe, tokenizer, rows) if recipe.distils else None
    begun_from = model_identity(str(start))["weights"] if start else None
    stage = StageFolder(folder, "train", train_inputs(recipe, rows, begun_from), aside)
    if stage.is_done() and recipe.training.resume_from is None and not force:
        say(f"{folder} is complete")
        return stage.manifest()
    student = _student(recipe, tokenizer, start, teacher)  # whatever is wrong with it shows before anything is written
    main = ranks.rank() == 0
    with stage.lock() if main else contextlib.nullcontext():
        changed = _begin(stage, recipe, force) if main else None
        ranks.wait_until(lambda: stage.recorded() == stage.fingerprint, f"rank 0 to begin {folder}")
        trainer = _trainer(recipe, folder, student, teacher, rows, held_out)
        # Rank 0 chooses for all: it may drop checkpoints while the others look.
        (resume,) = broadcast_object_list([_resume_point(recipe, folder, changed) if main else None])
        if main:
            _record_provenance(stage, recipe, resume, changed)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return _finish(trainer, stage, tokenizer)


def _begin(stage: StageFolder, recipe: Recipe, force: bool) -> str | None:
    """Start or continue the folder; returns what changed when `resume_from` allows other inputs."""
    recorded, changed = stage.recorded(), None
    if recorded is not None and recorded != stage.fingerprint and recipe.training.resume_from is not None:
        changed = stage.differences()
        say(f"continuing {stage.path} with a change ({changed})")
        (stage.path / MANIFEST).unlink(missing_ok=True)
        write_json(stage.path / INPUTS, {"fingerprint": stage.fingerprint, "inputs": stage.inputs})
    stage.begin(replace=force)
    remove_partial(stage.path)
    text = yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False)
    atomic_write_text(stage.path / "recipe.yaml", text)
    return changed


def _student(recipe: Recipe, tokenizer: LoadedTokenizer, start: Path | None, teacher: Teacher | None) -> Any:
    special = {"bos_token_id": tokenizer.hf.bos_token_id, "eos_token_id": tokenizer.eos_id}
    if tokenizer.hf.pad_token_id not in special.values():  # an embedding row named padding never learns
        special["pad_token_id"] = tokenizer.hf.pad_token_id
    section = recipe.student.model_copy(update={"model": str(start), "config": {}}) if start else recipe.student
    student = build_student(section, tokenizer.vocab_size, recipe.seed, special)
    count = sum(parameter.numel() for parameter in student.parameters())
    say(f"student: {type(student).__name__}, {count:,} parameters, float32 weights")
    if recipe.dataset.attention == "per_document":
        require_packing(student, "student")
    if teacher is not None and teacher.vocab_size != embedded_vocab_size(student):
        warn(
            f"the teacher's vocabulary has {teacher.vocab_size} ids and the student's "
            f"{embedded_vocab_size(student)}; ids only one of them has get probability 0 on the other side"
        )
    build_param_groups(student, 1.0, 0.0, [(m.pattern, m.lr_multiplier) for m in recipe.parameter_lr_multipliers])
    return student


def _trainer(
    recipe: Recipe,
    folder: Path,
    student: Any,
    teacher: Teacher | None,
    rows: PackedDataset,
    held_out: PackedDataset,
) -> Any:
    from limbeck.training.arguments import arguments_from_recipe
    from limbeck.training.trainer import DistillationTrainer

    os.environ["TENSORBOARD_LOGGING_DIR"] = _USERS_LOGGING_DIR or str(folder / "runs")
    trainer = DistillationTrainer(
        model=student,
        args=arguments_from_recipe(recipe, folder),
        teacher=teacher,
        train_dataset=rows,
        eval_dataset=held_out if len(held_out) else None,
    )
    groups = trainer.create_optimizer().param_groups
    say("optimizer groups:\n" + describe_groups(groups, student))
    return trainer


def _resume_point(recipe: Recipe, folder: Path, changed: str | None) -> Path | None:
    """The checkpoint to start from: the newest own one, unless `resume_from` says that something changes there."""
    wanted = recipe.training.resume_from
    if wanted is not None and (changed is not None or not steps(folder)):
        found = resolve_resume(wanted)
        if found.parent.resolve() == folder.resolve():
            forget_after(folder, checkpoint_step(found))
        return found
    if recipe.training.resume:
        return newest(folder)
    forget_after(folder, -1)
    return None


def _record_provenance(stage: StageFolder, recipe: Recipe, resume: Path | None, changed: str | None) -> None:
    """Append one line: where this run starts, in which mode, from which teacher and data."""
    path = stage.path / "provenance.jsonl"
    last = json.loads(path.read_text().splitlines()[-1]) if path.exists() else None
    mode = recipe.training.mode
    entry = {
        "step": checkpoint_step(resume) if resume else 0,
        "mode": mode,
        "resumed_from": str(resume) if resume else None,
        "fingerprint": stage.fingerprint,
        "teacher": stage.inputs["teacher"],
        "packed": stage.inputs["packed"],
        "changed": changed,
    }
    if resume:
        say(f"continuing from {resume} (step {entry['step']}), mode {mode}")
    if last and last["mode"] != mode:
        say(f"mode changes from {last['mode']} to {mode} at step {entry['step']}")
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry, sort_keys=True) + "\n")


def _finish(trainer: Any, stage: StageFolder, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """Write `final/` and `best/`, then the manifest."""
    final = stage.path / "final"
    partial = stage.path / ".final.tmp"
    manifest: dict[str, Any] = {}
    if trainer.args.should_save and partial.exists():
        shutil.rmtree(partial)
    trainer.model.config.use_cache = True  # off in training only; whoever loads this wants to generate with it
    trainer.save_model(str(partial))  # all ranks: a sharded model is gathered here
    if trainer.args.should_save:
        tokenizer.hf.save_pretrained(partial)
        commit_folder(partial, final)
        if trainer.state.best_model_checkpoint is not None:
            _copy_model(Path(trainer.state.best_model_checkpoint), stage.path / "best", tokenizer)
        weights = {p.name: sha256_file(p) for p in sorted(final.glob("*.safetensors"))}
        manifest = {
            "kind": "student",
            "fingerprint": stage.fingerprint,
            "steps": trainer.state.global_step,
            "best_step": trainer.state.best_global_step,
            "best_eval_loss": trainer.state.best_metric,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "weights": weights,
        }
        write_manifest(stage.path, manifest)
        say(f"trained {trainer.state.global_step} steps; weights in {final}")
    trainer.accelerator.wait_for_everyone()
    return manifest


def _copy_model(source: Path, target: Path, tokenizer: LoadedTokenizer | None = None) -> None:
    """Copy a model folder's weights, config and tokenizer, without optimizer state, in one rename."""
    partial = target.with_name(f".{target.name}.tmp")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".safetensors", ".jinja") and path.name not in (
            "trainer_state.json",
            "manifest.json",
        ):
            shutil.copy2(path, partial / path.name)
    if tokenizer is not None:
        tokenizer.hf.save_pretrained(partial)
    commit_folder(partial, target)


def student_folder(folder: Path) -> Path:
    """The finished model inside a training folder.

    Raises:
        IncompleteError: the run is unfinished.
        MismatchError: the folder was not written by training.
    """
    read_manifest(folder, "train")
    return folder / "final"
