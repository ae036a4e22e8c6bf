"""Training throughput beside a plain Trainer with the dense KD loss and TRL's GKD trainer; Muon's share of a step.

    python benchmarks/train.py
    python benchmarks/train.py --quick --json

The same student, teacher, rows, batch and AdamW everywhere, float32 on this machine's cores, ordinary causal
attention, vocabulary 32,768. TRL's GKDTrainer is fed the rows off-policy (lmbda 0, beta 0: forward KL). Tokens a
second are taken over optimizer steps after the first of each repeat; the cases take turns.
"""

import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from common import arguments, report
from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher, TeacherCache
from limbeck.config import Recipe
from limbeck.data.dataset import PackedDataset
from limbeck.models import SHIPPED, load_causal_lm
from limbeck.pipeline import run_pipeline

V, LENGTH, ROWS, TAU, ALPHA, K = 32768, 256, 4, 2.0, 0.5, 64
STUDENT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
TEACHER = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}


def model(sizes: dict, seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=V, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
        max_position_embeddings=LENGTH, pad_token_id=0, **sizes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


class Stopwatch(TrainerCallback):
    """Seconds from the end of the first step to the end of the last, and the steps between."""

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if state.global_step == 1:
            self.began = now
        self.seconds, self.steps = now - self.began, state.global_step - 1


class NaiveTrainer(Trainer):
    """What a recipe on a blog does: both models' logits whole, cross_entropy and kl_div over them."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["input_ids"][:, 1:].flatten()
        student = model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1).float()
        with torch.no_grad():
            teacher = self.teacher(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1).float()
        ce = torch.nn.functional.cross_entropy(student, labels)
        kl = torch.nn.functional.kl_div(
            (student / TAU).log_softmax(-1), (teacher / TAU).softmax(-1), reduction="batchmean"
        )
        return (1 - ALPHA) * ce + ALPHA * TAU**2 * kl


def common_arguments(folder: Path, steps: int) -> dict:
    return {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": ROWS, "learning_rate": 1e-4,
        "logging_steps": 1000, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "seed": 0, "lr_scheduler_type": "constant",
    }  # fmt: skip


def collate(items):
    ids = torch.stack([torch.as_tensor(item["input_ids"]).long() for item in items])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "prompts": ids[:, :1],
        "prompt_attention_mask": torch.ones_like(ids[:, :1]),
    }


def trl_trainer(folder: Path, steps: int, teacher, rows):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    settings = {**common_arguments(folder, steps), "lmbda": 0.0, "beta": 0.0, "temperature": TAU}
    plain = [{"input_ids": rows[i]["input_ids"].tolist()} for i in range(len(rows))]
    import datasets

    return GKDTrainer(
        model=model(STUDENT),
        teacher_model=teacher,
        args=GKDConfig(
            **settings, bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
            activation_checkpointing=False, optim="adamw_torch_fused",
        ),
        processing_class=AutoTokenizer.from_pretrained(SHIPPED["tiny-python"]),
        train_dataset=datasets.Dataset.from_list(plain),
        data_collator=collate,
    )  # fmt: skip


def prepare(folder: Path, steps: int) -> tuple[Path, PackedDataset, Path]:
    """A teacher on disk, packed rows and a cache, by the pipeline itself."""
    model(TEACHER, seed=1).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(SHIPPED["tiny-python"]).save_pretrained(folder / "teacher")
    recipe = Recipe.model_validate({
        "output_dir": str(folder / "run"),
        "dataset": {"name": "stdlib", "max_samples": 24, "max_length": LENGTH, "train_rows": ROWS * steps,
                    "attention": "packed"},
        "teacher": {"model": str(folder / "teacher"), "top_k": K, "splits": ["train"], "max_kl": 1.0},
        "student": {"config": {"model_type": "llama", **STUDENT}},
    })  # fmt: skip
    run_pipeline(recipe, "cache")
    return folder / "teacher", PackedDataset(recipe.packed_dir, "train", recipe.dataset.train_rows), recipe.cache_dir


def build_cases(folder: Path, steps: int) -> dict[str, Trainer]:
    path, rows, cache = prepare(folder, steps)
    teacher = load_causal_lm(str(path), dtype="float32").eval().requires_grad_(False)
    settings = common_arguments(folder / "out", steps)

    def ours(teacher, **changes):
        args = DistillationArguments(
            **{**settings, **changes}, alpha=ALPHA, temperature=TAU, attention="packed", loss_chunk_size=None
        )
        return DistillationTrainer(model(STUDENT), args, teacher=teacher, train_dataset=rows)

    local = LocalTeacher(teacher, top_k=K, temperatures=(1.0, TAU), attention="packed")
    cases: dict[str, Trainer] = {
        "ours_local": ours(local),
        "ours_cached": ours(TeacherCache(cache, "train")),
        "ours_cached_muon_lion": ours(TeacherCache(cache, "train"), optimizer={"name": "muon_lion"}),
        "naive": NaiveTrainer(
            model(STUDENT), TrainingArguments(**settings, remove_unused_columns=False), teacher=teacher,
            train_dataset=[{"input_ids": rows[i]["input_ids"]} for i in range(len(rows))], data_collator=collate,
        ),
        "trl": trl_trainer(folder / "trl", steps, teacher, rows),
    }  # fmt: skip
    for trainer in cases.values():
        trainer.remove_callback(transformers.PrinterCallback)
    return cases


def optimizer_seconds(trainer: Trainer) -> float:
    """Median seconds of one optimizer step, on the gradients of a real batch."""
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, inputs).backward()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        trainer.optimizer.step()
        times.append(time.perf_counter() - started)
    trainer.model.zero_grad()
    return statistics.median(times)


def run(steps: int, repeats: int) -> dict:
    random.seed(0)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        cases = build_cases(Path(name), steps)
        watches = {case: Stopwatch() for case in cases}
        for case, trainer in cases.items():
            trainer.add_callback(watches[case])
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(repeats):
            for case, trainer in cases.items():
                trainer.train()
                seconds[case].append(watches[case].seconds / watches[case].steps)
        step = {case: statistics.median(found) for case, found in seconds.items()}
        muon = optimizer_seconds(cases["ours_cached_muon_lion"])
        adamw = optimizer_seconds(cases["ours_cached"])
    return {
        "shape": {"vocab": V, "length": LENGTH, "rows": ROWS, "student": STUDENT, "teacher": TEACHER, "top_k": K},
        "threads": torch.get_num_threads(),
        "steps": steps,
        "repeats": repeats,
        "tokens_per_second": {case: ROWS * LENGTH / value for case, value in step.items()},
        "throughput_ratio_vs_naive_trainer": step["naive"] / step["ours_local"],
        "throughput_ratio_vs_trl": step["trl"] / step["ours_local"],
        "throughput_ratio_cached_vs_trl": step["trl"] / step["ours_cached"],
        "adamw_step_seconds": adamw,
        "muon_lion_step_seconds": muon,
        "muon_step_share": muon / step["ours_cached_muon_lion"],
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result = run(*((3, 1) if options.quick else (6, 5)))
    if not options.json:
        result = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in result.items()}
    report(result, options.json)


if __name__ == "__main__":
    main()
