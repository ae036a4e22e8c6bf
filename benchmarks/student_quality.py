"""What the kinds of students learn from one teacher: equal corpus, tokens, steps, optimizer and (within 2 %) weights.

    python benchmarks/student_quality.py --seeds 0,1,2 --output quality.jsonl
    python benchmarks/student_quality.py --students llama,retnet --kinds dense --steps 1500 --output quality.jsonl
    python benchmarks/student_quality.py --table quality.jsonl               (what docs/log.md holds)

Rows and cached targets are the quickstart's. Every student is 256 wide with two layers' weights; rates and everything
else are those of `optimizer.name: auto`, computed in bfloat16 where that is fast. A run is one line of JSON: held-out
CE and KL to the teacher over its whole vocabulary in nats, and tokens a second (which mean something with `--jobs 1`
alone). A run that the output holds already is not made again.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher, TeacherCache
from limbeck.config import OptimizerConfig, StudentConfig
from limbeck.data.dataset import PackedDataset
from limbeck.models import bfloat16_is_fast, load_causal_lm
from limbeck.optim.auto import choose
from limbeck.pipeline import run_pipeline
from limbeck.recipe import load_recipe
from limbeck.students.build import build_student

WIDTH, GROUP, ROWS = 256, 64, 1536
KEYS = ("student", "ternary", "seed", "steps")  # what a run is known by
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
LLAMA = {**_SIZES, "model_type": "llama", "intermediate_size": 832, "num_key_value_heads": 4,
         "max_position_embeddings": 2048}  # fmt: skip
RETNET = {**_SIZES, "model_type": "retnet_hrm", "intermediate_size": 512}
HRM = {**RETNET, "H_cycles": 2, "L_cycles": 3}

#: Students by name: keys of the recipe's `student`, and of the run where it differs.
STUDENTS: dict[str, dict] = {
    "llama": {"config": LLAMA},
    "retnet": {"config": RETNET},
    "retnet-hrm": {"config": HRM},
    "retnet-hrm-titans": {"config": {**HRM, "memory": True, "intermediate_size": 320}},
    "mhc-2": {"config": LLAMA, "mhc": {"streams": 2}},
    "mhc-4": {"config": {**LLAMA, "intermediate_size": 768}, "mhc": {"streams": 4}},
    # What was tried so that HRM pays for its compute.
    "hrm-1-1": {"config": {**RETNET, "H_cycles": 1, "L_cycles": 1}},
    "hrm-2-1": {"config": {**RETNET, "H_cycles": 2, "L_cycles": 1}},
    "hrm-2-2": {"config": {**RETNET, "H_cycles": 2, "L_cycles": 2}},
    "hrm-all-grad": {"config": {**HRM, "L_bp_cycles": [3, 3]}},
    "hrm-2-1-segments-2": {"config": {**RETNET, "H_cycles": 2, "L_cycles": 1, "segments": 2}},
    "hrm-half-rate": {"config": HRM, "rate": 0.5},
    "retnet-deep": {"config": {**RETNET, "num_hidden_layers": 4}},
    "llama-deep": {"config": {**LLAMA, "num_hidden_layers": 4}},
    "mhc-2-static": {"config": LLAMA, "mhc": {"streams": 2, "form": "static"}},
    "mhc-2-fast": {"config": LLAMA, "mhc": {"streams": 2}, "mhc_rate": 0.05},
}  # fmt: skip
MAIN = ("llama", "retnet", "retnet-hrm", "retnet-hrm-titans", "mhc-2", "mhc-4")


def prepare(folder: Path) -> tuple[Path, Path]:
    """Packed rows of the quickstart's corpus and its teacher's targets, made once."""
    recipe = load_recipe(None, {
        "output_dir": str(folder), "loss": {"temperature": 1.0},
        "dataset": {"name": "stdlib", "max_length": 256, "validation_fraction": 0.05, "train_rows": ROWS},
        "teacher": {"model": "tiny-python", "top_k": 64, "splits": ["train"]}, "student": {"config": LLAMA},
    })  # fmt: skip
    run_pipeline(recipe, "cache")
    return recipe.packed_dir, recipe.cache_dir


def train(job: dict) -> dict:
    """One student, one seed: what it has learnt."""
    torch.set_num_threads(job["threads"])
    plan = STUDENTS[job["student"]]
    section = {"config": plan["config"], "mhc": plan.get("mhc")}
    section["ternary"] = {"group_size": GROUP} if job["ternary"] else None
    student = build_student(StudentConfig.model_validate(section), {"vocab_size": 4096, "eos_token_id": 0}, job["seed"])
    teacher = LocalTeacher(load_causal_lm("tiny-python", dtype="float32"), top_k=64)
    chosen = choose(OptimizerConfig(), None, new=True, width=WIDTH)
    optimizer = {**chosen.optimizer.model_dump(), "mhc": {"learning_rate": plan.get("mhc_rate")}}
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=student,
            args=DistillationArguments(
                output_dir=folder, max_steps=job["steps"], per_device_train_batch_size=8, warmup_steps=20,
                per_device_eval_batch_size=32, learning_rate=chosen.learning_rate * plan.get("rate", 1.0),
                weight_decay=0.1, lr_scheduler_type="cosine", logging_steps=max(job["steps"] // 4, 1),
                save_strategy="no", report_to="none", disable_tqdm=True, seed=job["seed"], data_seed=job["seed"],
                loss={"alpha": 0.9, "temperature": 1.0}, optimizer=optimizer, bf16=bfloat16_is_fast("cpu"),
                use_cpu=True, dataloader_pin_memory=False,
            ),
            teacher=TeacherCache(job["cache"], "train"),
            eval_teacher=teacher,
            train_dataset=PackedDataset(job["packed"], "train", ROWS),
            eval_dataset=PackedDataset(job["packed"], "validation", 128),
        )  # fmt: skip
        trainer.train()
        scores = trainer.evaluate()
    rates = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    return {
        **{key: job[key] for key in KEYS},
        "parameters": sum(p.numel() for p in student.parameters()),
        "loss": scores["eval_loss"],
        "kl_to_teacher": scores["eval_kl_to_teacher"],
        "tokens_per_second": statistics.median(rates),
        **{key: scores[key] for key in ("eval_composite_gain", "eval_mixing_error") if key in scores},
    }


def table(path: Path) -> None:
    """Mean and range over seeds, as Markdown."""
    found: dict[tuple, list[dict]] = {}
    for run in read(path):
        found.setdefault((run["steps"], run["ternary"], run["student"]), []).append(run)
    print("| steps | student | weights | | seeds | held-out CE | KL to the teacher | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (steps, ternary, name), runs in sorted(found.items(), key=lambda item: item[0][:2]):
        values = []
        for key in ("loss", "kl_to_teacher"):
            numbers = [run[key] for run in runs]
            values.append(f"{statistics.mean(numbers):.4f} ({min(numbers):.4f}–{max(numbers):.4f})")
        kind = "ternary" if ternary else "dense"
        speed = statistics.median(run["tokens_per_second"] for run in runs)
        size = runs[0]["parameters"]
        print(f"| {steps} | {name} | {size:,} | {kind} | {len(runs)} | {' | '.join(values)} | {speed:,.0f} |")


def read(path: Path) -> list[dict]:
    """The runs that a file holds."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path)
    parser.add_argument("--students", default=",".join(MAIN))
    parser.add_argument("--kinds", default="dense,ternary")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--work", type=Path, default=Path("outputs/student-quality"), help="folder of rows and targets")
    parser.add_argument("--output", type=Path, default=Path("quality.jsonl"))
    given = parser.parse_args()
    if given.table:
        table(given.table)
        return 0
    packed, cache = prepare(given.work)
    done = [tuple(run[key] for key in KEYS) for run in read(given.output)]
    common = {"packed": packed, "cache": cache, "threads": max(1, (os.cpu_count() or 1) // given.jobs)}
    jobs = [
        {"student": name, "ternary": kind == "ternary", "seed": int(seed), "steps": given.steps, **common}
        for seed in given.seeds.split(",") for kind in given.kinds.split(",") for name in given.students.split(",")
    ]  # fmt: skip
    jobs = [job for job in jobs if tuple(job[key] for key in KEYS) not in done]
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(train, jobs):
            with given.output.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
