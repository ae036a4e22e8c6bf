"""What compressing a mixture of experts loses at once, and after equal steps of distillation from the whole model.

    python benchmarks/compress_quality.py --model tiny-moe --output compress.jsonl
    python benchmarks/compress_quality.py --model RUN/student/final --packed RUN/data --output compress.jsonl
    python benchmarks/compress_quality.py --model tiny-moe --ternary --steps 240 --output ternary.jsonl
    python benchmarks/compress_quality.py --table compress.jsonl

Rows are the standard library's (of another model's run with `--packed`), losses held-out cross-entropies in nats above
the whole model's. Calibration is 256 training rows; distillation is `--steps` of 8 rows, α 0.9, τ 1, top-64 targets of
the whole model, AdamW as `optimizer.name: auto` gives a pretrained student. `--ternary` compares the whole model's
experts dense, ternary at once and ternary little by little. A run that the output holds already is not made again.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from compress import compressed, held_out_loss, packed_rows
from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher
from limbeck.config import OptimizerConfig, StudentConfig
from limbeck.data.dataset import PackedDataset
from limbeck.errors import ConfigError
from limbeck.models import bfloat16_is_fast, load_causal_lm, resolve_model
from limbeck.optim.auto import choose
from limbeck.students.build import build_student

METHODS = ("latent", "core_delta", "shared_core", "mean", "prune", "auto")
KEYS = ("model", "case", "keep", "steps", "seed")


def distilled(student, teacher, packed: Path, attention: str, steps: int, seed: int, warmup: int = 0):
    """The student after so many steps."""
    width = student.config.hidden_size
    chosen = choose(OptimizerConfig(), None, new=False, width=width)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=student,
            args=DistillationArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=8, warmup_steps=10,
                learning_rate=chosen.learning_rate, lr_scheduler_type="cosine", logging_steps=40, save_strategy="no",
                report_to="none", disable_tqdm=True, seed=seed, data_seed=seed, loss={"alpha": 0.9, "temperature": 1.0},
                optimizer=chosen.optimizer.model_dump(), bf16=bfloat16_is_fast("cpu"), use_cpu=True,
                dataloader_pin_memory=False, attention=attention, ternary_warmup_steps=warmup,
            ),
            teacher=LocalTeacher(teacher, top_k=64, attention=attention),
            train_dataset=PackedDataset(packed, "train", 2048),
        )  # fmt: skip
        trainer.train()
    return student.eval()


def cases(given) -> list[tuple[str, float]]:
    if given.ternary:
        return [("dense", 1.0), ("ternary at once", 1.0), ("ternary little by little", 1.0)]
    methods = given.methods.split(",")
    return [(name, keep) for keep in (0.5, 0.25) for name in methods if name != "mean" or keep == 0.5]


def student_of(case: str, keep: float, source: str, rows, attention: str, folder: Path, seed: int, steps: int):
    """The student as it begins, and the steps in which it becomes ternary."""
    ternary = None
    if case.startswith("ternary"):
        ternary = {"preset": "experts", "group_size": 64}
    elif case != "dense":
        section = {"method": "shared_core", "rank": 0} if case == "mean" else {"method": case, "keep": keep}
        source = str(compressed(source, section, rows, folder / "small", attention))
    config = StudentConfig.model_validate({"model": source, "ternary": ternary})
    student = build_student(config, {"vocab_size": 1}, seed)
    return student, steps // 2 if case.endswith("little by little") else 0


def table(path: Path) -> None:
    """One line a case, as Markdown; `steps` 0 is the model as it was compressed."""
    found: dict[tuple, dict[int, float]] = {}
    sizes = {}
    for run in map(json.loads, path.read_text().splitlines()):
        key = (run["model"], run["keep"], run["case"])
        found.setdefault(key, {})[run["steps"]] = run["increase"]
        sizes[key] = run["expert_share"]
    steps = sorted({step for values in found.values() for step in values})
    print("| model | kept | method | experts' weights | " + " | ".join(f"after {s} steps" for s in steps) + " |")
    print("| " + "--- | " * (4 + len(steps)))
    for key, values in found.items():
        shown = " | ".join(f"{values[s]:+.4f}" if s in values else "" for s in steps)
        print(f"| {key[0]} | {key[1]:g} | {key[2]} | {sizes[key]:.0%} | {shown} |")


def experts_in(model) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path)
    parser.add_argument("--model", default="tiny-moe")
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--attention", default="per_document")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ternary", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("outputs/compress-quality"))
    parser.add_argument("--output", type=Path, default=Path("compress.jsonl"))
    given = parser.parse_args()
    if given.table:
        table(given.table)
        return 0
    packed = given.packed or packed_rows(given.work)
    rows, held_out = PackedDataset(packed, "train", 256), PackedDataset(packed, "validation", 128)
    source = given.model if given.model == "tiny-moe" else resolve_model(given.model)
    whole = load_causal_lm(source, dtype="float32").eval()
    own, experts = held_out_loss(whole, held_out, given.attention), experts_in(whole)
    name = f"{whole.config.model_type} {given.model}"
    done = [json.loads(line) for line in given.output.read_text().splitlines()] if given.output.is_file() else []
    known = {tuple(run[key] for key in KEYS) for run in done}
    for case, keep in cases(given):
        if (name, case, keep, given.steps, given.seed) in known:
            continue
        with tempfile.TemporaryDirectory() as folder, given.output.open("a") as lines:
            made = (case, keep, source, rows, given.attention, Path(folder), given.seed, given.steps)
            try:
                student, warmup = student_of(*made)
            except ConfigError as error:  # a method that cannot keep so little of so small experts
                print(f"{case}, {keep:g}: {error}", file=sys.stderr)
                continue
            for steps in (0, given.steps):
                if steps:
                    distilled(student, whole, packed, given.attention, steps, given.seed, warmup)
                increase = held_out_loss(student.eval(), held_out, given.attention) - own
                run = {"model": name, "case": case, "keep": keep, "steps": steps, "seed": given.seed, "whole": own,
                       "increase": increase, "expert_share": experts_in(student) / experts}  # fmt: skip
                lines.write(json.dumps(run) + "\n")
                print(json.dumps(run), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
