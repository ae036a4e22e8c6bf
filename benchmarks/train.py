"""Training throughput beside a plain Trainer with the dense KD loss and TRL's GKD trainer; Muon's share of a step.

    python benchmarks/train.py
    python benchmarks/train.py --quick --json

The same student, teacher, rows, batch and AdamW everywhere, float32 on this machine's cores, ordinary causal
attention. TRL's GKDTrainer is fed the rows off-policy (lmbda 0, beta 0: forward KL). Tokens a
second are taken over optimizer steps after the first of each repeat; the cases take turns. `--quick` has a
third of the layers and three eighths of the tokens, on one thread; its logits are still 50 MB, which the C library maps
and gives back each time as it does larger ones (below 32 MB it keeps them, and the naive formula costs much less).

The limit is a step of nothing but matrix products and attention; `step_shares` says what else a step holds (shares.py).
"""

import contextlib
import os
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from common import Comparison, Span, arguments, interleaved, medians, now, ratio, report, since
from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher, TeacherCache
from limbeck.config import Recipe
from limbeck.data.dataset import PackedDataset
from limbeck.models import SHIPPED, load_causal_lm
from limbeck.pipeline import run_pipeline
from shares import step_shares

TAU, ALPHA, K = 2.0, 0.5, 64
STUDENT = {"hidden_size": 256, "intermediate_size": 768}
TEACHER = {"hidden_size": 384, "intermediate_size": 1024}


@dataclass(frozen=True)
class Size:
    """Rows of `length` tokens a step; `steps` a repeat, the first not timed; the two models; threads of torch."""

    rows: int
    steps: int
    repeats: int
    vocab: int
    student_layers: int
    teacher_layers: int
    length: int = 256
    threads: int | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def student(self) -> dict:
        return self._model(STUDENT, self.student_layers)

    @property
    def teacher(self) -> dict:
        return self._model(TEACHER, self.teacher_layers)

    def _model(self, widths: dict, layers: int) -> dict:
        return {
            "model_type": "llama", "vocab_size": self.vocab, "num_attention_heads": 4, "num_key_value_heads": 4,
            "tie_word_embeddings": True, "max_position_embeddings": self.length, "pad_token_id": 0,
            "num_hidden_layers": layers, **widths,
        }  # fmt: skip


FULL = Size(rows=4, steps=6, repeats=5, vocab=32768, student_layers=6, teacher_layers=8)
QUICK = Size(rows=2, length=192, steps=2, repeats=5, vocab=32768, student_layers=2, teacher_layers=3, threads=1)


def model(settings: dict, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))


class Stopwatch(TrainerCallback):
    """Time of a step, from the end of the first to the end of the last."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self._began = now()
        else:
            self.step = since(self._began) / (state.global_step - 1)


def timed_training(trainer: Trainer):
    """A case that trains and answers with a step's time."""
    watch = Stopwatch()
    trainer.add_callback(watch)

    def case() -> Span:
        trainer.train()
        return watch.step

    return case


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


def common_arguments(folder: Path, size: Size) -> dict:
    return {
        "output_dir": str(folder), "max_steps": size.steps, "per_device_train_batch_size": size.rows,
        "learning_rate": 1e-4, "logging_steps": 1000, "report_to": "none", "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "seed": 0, "lr_scheduler_type": "constant",
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


def trl_trainer(folder: Path, size: Size, teacher, rows):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    settings = {**common_arguments(folder, size), "lmbda": 0.0, "beta": 0.0, "temperature": TAU}
    plain = [{"input_ids": rows[i]["input_ids"].tolist()} for i in range(len(rows))]
    import datasets

    return GKDTrainer(
        model=model(size.student),
        teacher_model=teacher,
        args=GKDConfig(
            **settings, bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
            activation_checkpointing=False, optim="adamw_torch_fused",
        ),
        processing_class=AutoTokenizer.from_pretrained(SHIPPED["tiny-python"]),
        train_dataset=datasets.Dataset.from_list(plain),
        data_collator=collate,
    )  # fmt: skip


def prepare(folder: Path, size: Size) -> tuple[Path, PackedDataset, Path]:
    """A teacher on disk, packed rows and a cache, by the pipeline itself."""
    model(size.teacher, seed=1).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(SHIPPED["tiny-python"]).save_pretrained(folder / "teacher")
    recipe = Recipe.model_validate({
        "output_dir": str(folder / "run"),
        "dataset": {"name": "stdlib", "max_samples": 24, "max_length": size.length,
                    "train_rows": size.rows * size.steps, "attention": "packed"},
        "teacher": {"model": str(folder / "teacher"), "top_k": K, "splits": ["train"], "max_kl": 1.0},
        "student": {"config": {"model_type": "llama", **STUDENT, "num_hidden_layers": size.student_layers}},
    })  # fmt: skip
    run_pipeline(recipe, "cache")
    return folder / "teacher", PackedDataset(recipe.packed_dir, "train", recipe.dataset.train_rows), recipe.cache_dir


def build_trainers(folder: Path, size: Size) -> dict[str, Trainer]:
    path, rows, cache = prepare(folder, size)
    teacher = load_causal_lm(str(path), dtype="float32").eval().requires_grad_(False)
    settings = common_arguments(folder / "out", size)

    def ours(teacher, **changes):
        args = DistillationArguments(
            **{**settings, **changes}, loss={"alpha": ALPHA, "temperature": TAU}, attention="packed"
        )
        return DistillationTrainer(model(size.student), args, teacher=teacher, train_dataset=rows)

    local = LocalTeacher(teacher, top_k=K, temperatures=(1.0, TAU), attention="packed")
    trainers: dict[str, Trainer] = {
        "ours_local": ours(local),
        "ours_cached": ours(TeacherCache(cache, "train")),
        "ours_cached_muon_lion": ours(TeacherCache(cache, "train"), optimizer={"name": "muon_lion"}),
        "naive": NaiveTrainer(
            model(size.student), TrainingArguments(**settings, remove_unused_columns=False), teacher=teacher,
            train_dataset=[{"input_ids": rows[i]["input_ids"]} for i in range(len(rows))], data_collator=collate,
        ),
        "trl": trl_trainer(folder / "trl", size, teacher, rows),
    }  # fmt: skip
    for trainer in trainers.values():
        trainer.remove_callback(transformers.PrinterCallback)
    return trainers


class OptimizerStep:
    """A case: one step of a trainer's optimizer, on the gradients of a real batch."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._gradients = trainer, []

    def __call__(self, count: int = 3) -> Span:
        trainer = self._trainer
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        if not self._gradients:
            inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            trainer.compute_loss(trainer.model.train(), inputs).backward()
            self._gradients = [p.grad.clone() for p in parameters]
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient
        start = now()
        for _ in range(count):
            trainer.optimizer.step()
        span = since(start) / count
        for parameter in parameters:
            parameter.grad = None
        return span


def run(size: Size) -> tuple[dict, dict[str, Comparison]]:
    random.seed(0)
    if size.threads:
        torch.set_num_threads(size.threads)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        trainers = build_trainers(Path(name), size)
        # The optimizers' cases come last: a trainer has its optimizer only once it has trained.
        cases = {case: timed_training(trainer) for case, trainer in trainers.items()}
        cases["adamw_step"] = OptimizerStep(trainers["ours_cached"])
        cases["muon_lion_step"] = OptimizerStep(trainers["ours_cached_muon_lion"])
        found = interleaved(cases, size.repeats)
        shares = {case: step_shares(trainers[case], size.steps) for case in trainers if case.startswith("ours")}
    speed = {case: size.tokens / found[case].seconds for case in trainers}
    products = {case: part["matrix_products"] + part["of_which_matrix_products"] for case, part in shares.items()}
    return {
        "shape": {**asdict(size), "student": STUDENT, "teacher": TEACHER, "top_k": K},
        "threads": torch.get_num_threads(),
        "steps": size.steps,
        "repeats": size.repeats,
        **medians(found),
        "tokens_per_second": speed,
        "limit_tokens_per_second": {case: speed[case] / part for case, part in products.items()},
        "adamw_step_seconds": found["adamw_step"].seconds,
        "muon_lion_step_seconds": found["muon_lion_step"].seconds,
        "step_shares": shares,
    }, {
        "throughput_ratio_vs_naive_trainer": ratio(found["naive"], found["ours_local"]),
        "throughput_ratio_vs_trl": ratio(found["trl"], found["ours_local"]),
        "throughput_ratio_cached_vs_trl": ratio(found["trl"], found["ours_cached"]),
        "muon_step_share": ratio(found["muon_lion_step"], found["ours_cached_muon_lion"]),
    }


def main() -> int:
    options = arguments(__doc__).parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result, comparisons = run(QUICK if options.quick else FULL)
    return report(result, options.json, comparisons, [name for name in comparisons if name.startswith("throughput")])


if __name__ == "__main__":
    sys.exit(main())
