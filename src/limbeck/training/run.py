"""One training run of a recipe in one folder: begin, continue, finish.

The one idea: the folder records what it is trained from. The same inputs continue from the newest whole
checkpoint and end with the same bytes as an undisturbed run; other inputs are refused, unless
`training.resume_from` says that this change of mode is meant, which `provenance.jsonl` then records.

    student/
      inputs.json  recipe.yaml  provenance.jsonl  training.log  runs/   (written first, or as it goes)
      step_N/  latest  best/  final/  manifest.json                     (manifest last)
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list

from limbeck import ranks
from limbeck.config import Recipe, StudentConfig
from limbeck.console import say, warn
from limbeck.data.dataset import PackedDataset
from limbeck.data.tokenizer import LoadedTokenizer, read_as_other, recipe_tokenizer
from limbeck.errors import ConfigError, LimbeckError
from limbeck.folders import StageFolder
from limbeck.losses.objective import Context, Objectives
from limbeck.manifests import StudentManifest
from limbeck.models import embedded_vocab_size, model_identity, require_causal, require_packing
from limbeck.optim.groups import build_groups, describe_groups, objective_groups
from limbeck.plugins import plugin_identity
from limbeck.registry import DIVERGENCES
from limbeck.storage import commit_folder, plain_disk_errors, read_json_lines, sha256_file, temporary_for
from limbeck.students.build import build_student
from limbeck.teachers.base import Teacher
from limbeck.teachers.sources import training_source
from limbeck.training.advice import advise
from limbeck.training.check import check_lengths, check_teacher
from limbeck.training.checkpoints import BEST, checkpoint_step, newest, publish_model
from limbeck.training.display import LOG, LogFile
from limbeck.training.offload import ExpertOffload
from limbeck.training.resume import begin
from limbeck.training.settle import optimizer_choice, settled

#: Keys of `training` that change how a run is watched or stored, not what it computes.
_NOT_INPUTS = {
    "output_dir", "resume", "resume_from", "logging_steps", "save_total_limit", "report_to", "device",
    "dataloader_num_workers", "dashboard", "step_line", "per_device_eval_batch_size", "eval_steps", "eval_rows",
    "save_steps", "offload_experts", "offload_dir",
}  # fmt: skip


#: Keys of `loss` that mean something without a teacher: the routers' and halting losses, and whatever is added.
_WITHOUT_TEACHER = {"load_balance", "router_aux", "router_aux_kind", "halting", "objectives"}


def train_inputs(recipe: Recipe, rows: PackedDataset) -> dict[str, Any]:
    """Everything the trained weights depend on, when the student begins as the recipe says."""
    recipe = settled(recipe)
    training = recipe.training.model_dump(mode="json", exclude=_NOT_INPUTS)
    return {
        "optimizer": recipe.optimizer.model_dump(mode="json"),
        "saddle": recipe.saddle.model_dump(mode="json") if recipe.saddle.enabled else None,
        "packed": rows.fingerprint,
        "attention": recipe.dataset.attention,
        "student": recipe.student.config,
        "builder": recipe.student.builder,
        "ternary": recipe.student.ternary.model_dump(mode="json") if recipe.student.ternary else None,
        "mhc": recipe.student.mhc.model_dump(mode="json") if recipe.student.mhc else None,
        "start": model_identity(recipe.student.model, recipe.student.revision) if recipe.student.model else None,
        "training": training,
        "parameter_lr_multipliers": [rule.model_dump() for rule in recipe.parameter_lr_multipliers],
        "seed": recipe.seed,
        "loss": {
            **recipe.loss.model_dump(
                mode="json", exclude={"chunk_size"}, include=None if recipe.distils else _WITHOUT_TEACHER
            ),
            # With its parameters, whether they were written or not.
            **({"divergence": repr(DIVERGENCES.build(recipe.loss.divergence))} if recipe.distils else {}),
        },
        "teacher": training_source(recipe).inputs(recipe_tokenizer(recipe)) if recipe.distils else None,
        "plugins": plugin_identity(recipe.plugins),
    }


def training_rows(recipe: Recipe) -> PackedDataset:
    """The packed rows a recipe trains on."""
    return PackedDataset(recipe.packed_dir, "train", recipe.dataset.train_rows)


def train_one(recipe: Recipe, stage: StageFolder, start: Path | None, force: bool = False) -> StudentManifest | None:
    """Train one phase (or a run without phases) in its folder, from the weights in `start`; returns the manifest."""
    folder, choice = stage.path, optimizer_choice(recipe)
    recipe = settled(recipe)
    tokenizer = recipe_tokenizer(recipe)
    rows = training_rows(recipe)
    rows.check(tokenizer, recipe.dataset.max_length)
    held_out = PackedDataset(recipe.packed_dir, "validation", recipe.training.eval_rows)
    if ranks.rank() > 0:
        ranks.wait_until(lambda: stage.recorded() == stage.fingerprint, f"rank 0 to begin {folder}")
    elif not force:
        stage.found_done()
    if stage.is_done() and recipe.training.resume_from is None and not force:
        say(f"{folder} is complete")
        return StudentManifest.read(folder)
    with contextlib.ExitStack() as stack:
        teacher = training_source(recipe).open(tokenizer, rows) if recipe.distils else None
        if teacher is not None:
            stack.callback(teacher.close)
            check_teacher(teacher, recipe.loss, recipe.dataset.attention, rows)
        # Whatever is wrong with the student or its optimizer shows before anything is written.
        offload = _offload(recipe, folder)
        if offload is not None:
            stack.callback(offload.close)
        section = _begun_from(recipe.student, start)
        student = new_student(section, tokenizer, recipe.dataset.attention, recipe.seed, offload)
        groups = check_plan(recipe, student, rows, teacher)
        stack.enter_context(stage.lock() if ranks.rank() == 0 else contextlib.nullcontext())
        stack.enter_context(_plain_errors(folder))
        resume, changed = (
            begin(stage, recipe.training, _as_yaml(recipe), force, groups) if ranks.rank() == 0 else (None, None)
        )
        stack.enter_context(LogFile(folder / LOG, active=ranks.rank() == 0))
        if choice is not None:
            say(choice.why)
        if teacher is not None:
            _tell_vocabularies(teacher, student)
        trainer = _trainer(recipe, stage, student, teacher, rows, held_out, tokenizer, resume)
        trainer.offload = offload
        if trainer.ternary is not None:
            trainer.ternary.measures = offload is None  # the codes would be a quarter of the experts
        (resume,) = broadcast_object_list([resume])  # rank 0 chooses for all
        if ranks.rank() == 0:
            _record_provenance(stage, recipe.training.mode, resume, changed)
        trainer.settings_id = stage.fingerprint
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return _finish(trainer, stage, recipe, tokenizer)


def check_plan(recipe: Recipe, student: Any, rows: PackedDataset, teacher: Teacher | None = None) -> list[str]:
    """Find out, before anything is trained, whether objectives, optimizer and schedule of a recipe can be.

    Returns:
        the optimizer's groups.

    Raises:
        ConfigError: an objective cannot be made, a pattern matches nothing, an algorithm does not fit, or warm-up and
            decay exceed the run.
    """
    training = recipe.training
    learns = [parameter.requires_grad for parameter in student.parameters()]
    rules = recipe.parameter_lr_multipliers
    groups = build_groups(student, recipe.optimizer, recipe.learning_rate, training.weight_decay, rules)
    for parameter, before in zip(student.parameters(), learns, strict=True):
        parameter.requires_grad_(before)
    if teacher is not None or not recipe.distils:  # else it is not at hand yet
        objectives = Objectives.of(Context(recipe.loss, student, teacher))
        groups += objective_groups(objectives, recipe.optimizer, recipe.learning_rate)
    if training.per_device_train_batch_size > len(rows):
        warn(
            f"training.per_device_train_batch_size is {training.per_device_train_batch_size} and there are {len(rows)} "
            "training rows: every batch is all of them"
        )
    batches = math.ceil(len(rows) / (training.per_device_train_batch_size * ranks.world_size()))
    updates = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * updates)
    check_lengths(recipe, total)
    return [str(group["name"]) for group in groups]


@contextlib.contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Say in one line what a full disk or a lost connection between ranks means."""
    try:
        with plain_disk_errors(folder):
            yield
    except RuntimeError as error:
        lost = ("closed by peer", "Connection reset", "Broken pipe", "Connection refused", "NCCL", "timed out", "gloo")
        if ranks.world_size() == 1 or not any(word in str(error) for word in lost):
            raise
        kept = newest(folder)
        raise LimbeckError(
            f"rank {ranks.rank()} of {ranks.world_size()} lost another rank, which ended or cannot be reached "
            f"({str(error).splitlines()[0][:160]}). Look for the first error of the other ranks; run the same command "
            f"again to continue from {kept if kept else 'the beginning: no checkpoint had been written'}."
        ) from None


def _begun_from(section: StudentConfig, start: Path | None) -> StudentConfig:
    """The student of the section, or the same one from the weights in `start`."""
    weights: dict[str, Any] = {"model": str(start), "revision": None, "config": {}, "builder": None}
    return section.model_copy(update=weights) if start else section


def _offload(recipe: Recipe, folder: Path) -> ExpertOffload | None:
    """Where the experts live, when the recipe has them elsewhere."""
    training = recipe.training
    if training.offload_experts is None:
        return None
    if ranks.world_size() > 1:
        raise ConfigError(
            f"training.offload_experts is {training.offload_experts} and there are {ranks.world_size()} ranks; it is "
            "for one process. Shard over ranks instead: fsdp_offload_params: true in recipes/accelerate/fsdp2-*.yaml."
        )
    place = training.offload_dir or folder.parent / ".offload"
    return ExpertOffload(training.offload_experts, place, training.device)


def new_student(
    section: StudentConfig,
    tokenizer: LoadedTokenizer,
    attention: str,
    seed: int,
    offload: ExpertOffload | None = None,
) -> Any:
    """The student as it begins."""
    build = build_student if offload is None else offload.build
    student = build(section, tokenizer.model_keys, seed)
    require_causal(student, "student")
    if attention == "per_document":
        require_packing(student, "student")
    return student


def _tell_vocabularies(teacher: Teacher, student: Any) -> None:
    if teacher.vocab_size != embedded_vocab_size(student):
        warn(
            f"the teacher's vocabulary has {teacher.vocab_size} ids and the student's "
            f"{embedded_vocab_size(student)}; ids only one of them has get probability 0 on the other side"
        )


def _as_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False)


def _trainer(
    recipe: Recipe,
    stage: StageFolder,
    student: Any,
    teacher: Teacher | None,
    rows: PackedDataset,
    held_out: PackedDataset,
    tokenizer: LoadedTokenizer,
    resume: Path | None,
) -> Any:
    from limbeck.training.arguments import arguments_from_recipe
    from limbeck.training.tracking import Tracking
    from limbeck.training.trainer import DistillationTrainer

    folder = stage.path
    name = recipe.name if folder == recipe.student_dir else f"{recipe.name}-{folder.name}"
    tree = json.loads(recipe.model_dump_json())
    main, anew = ranks.rank() == 0, resume is None and not recipe.training.resume
    tracking = Tracking(recipe.tracking, folder, name, stage.fingerprint, tree, main=main, anew=anew)
    arguments = arguments_from_recipe(recipe, folder)
    arguments.project, arguments.run_name = recipe.tracking.project, f"{tracking.name}-{tracking.id}"
    trainer = DistillationTrainer(
        model=student,
        args=arguments,
        teacher=teacher,
        train_dataset=rows,
        eval_dataset=held_out if len(held_out) else None,
        tokenizer=tokenizer.hf,
    )
    tracking.attach(trainer)
    tracking.start(recipe.training.report_to)
    groups = trainer.create_optimizer().param_groups
    for name in ("muon", "lion", "adamw"):
        rate = getattr(recipe.optimizer, name).learning_rate
        if rate is not None and all(group["algorithm"] != name for group in groups):
            warn(f"optimizer.{name}.learning_rate is {rate:g} and nothing is trained with {name} (optimizer.name)")
    count = sum(parameter.numel() for parameter in student.parameters())
    say(f"student: {type(student).__name__}, {count:,} parameters, float32 weights")
    say("optimizer groups:\n" + describe_groups(groups, student))
    return trainer


def _record_provenance(stage: StageFolder, mode: str, resume: Path | None, changed: str | None) -> None:
    """Append one line: where this run starts, in which mode, from which teacher and data."""
    path = stage.path / "provenance.jsonl"
    last = next(iter(read_json_lines(path)[-1:]), None) if path.exists() else None
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


def _finish(trainer: Any, stage: StageFolder, recipe: Recipe, tokenizer: LoadedTokenizer) -> StudentManifest | None:
    """Write `final/` and `best/`, then the manifest with what the curves advise."""
    folder, state = stage.path, trainer.state
    final, partial = folder / "final", temporary_for(folder / "final")
    manifest = None
    trainer.model.config.use_cache = True  # off in training only; whoever loads this wants to generate with it
    trainer.save_final(partial)
    if trainer.args.should_save:
        commit_folder(partial, final)
        best = folder / f"step_{state.best_global_step}"
        if state.best_global_step is not None and best.is_dir():
            publish_model(best, folder / BEST)
        weights = {p.name: sha256_file(p) for p in sorted(final.glob("*.safetensors"))}
        curves = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
        advice = advise(curves, recipe)
        manifest = StudentManifest(
            fingerprint=stage.fingerprint,
            steps=state.global_step,
            best_step=state.best_global_step,
            best_eval_loss=state.best_metric,
            parameters=sum(p.numel() for p in trainer.model.parameters()),
            weights=weights,
            advice=advice,
        ).write(folder)
        say(f"trained {state.global_step} steps; weights in {final}")
        say(f"advice: {advice}")
        if (other := read_as_other(final, tokenizer)) is not None:
            warn(
                f"AutoTokenizer of transformers reads {final} as {other}, which cuts text otherwise. Outside limbeck "
                "load its tokenizer with PreTrainedTokenizerFast.from_pretrained"
            )
    trainer.accelerator.wait_for_everyone()
    return manifest


def student_folder(folder: Path) -> Path:
    """The finished model inside a training folder.

    Raises:
        IncompleteError: the run is unfinished.
        MismatchError: the folder was not written by training.
    """
    StudentManifest.read(folder)
    return folder / "final"
