"""DistillationArguments: transformers.TrainingArguments plus the loss's own settings.

Usable in anybody's script; `from_recipe` makes them from a recipe.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from limbeck.config import Recipe
from limbeck.models import bfloat16_is_fast
from limbeck.optim.schedules import Ramp
from limbeck.teachers.choose import choose_device


@dataclass
class DistillationArguments(TrainingArguments):
    """Arguments of `DistillationTrainer`.

    Attributes:
        alpha: weight of the divergence, 0 … 1; 0 or no teacher is plain cross-entropy.
        temperature: τ of the divergence; the teacher's targets must declare it.
        divergence: forward_kl, reverse_kl, jsd, skewed_kl or tvd.
        jsd_beta: teacher's share of the JSD mixture.
        skew: teacher's share in skewed KL.
        tail: bucket, renormalise or ignore.
        loss_chunk_size: positions projected to logits at once; default by memory.
        attention: per_document (positions restart, attention stops at document borders) or packed.
        alpha_initial, alpha_warmup_steps: α goes linearly from the first to `alpha` in so many steps.
        temperature_initial, temperature_warmup_steps: the same for τ, by the temperatures the teacher declares.
        load_balance, router_aux, router_aux_kind: weights of the router's losses, for students that have one.
        optimizer: keys of the recipe's `optimizer` section; default AdamW for everything. `optim` is not read.
        parameter_lr_multipliers: (regex, factor) pairs, first match wins, factor 0 freezes.
        decay_ratio, decay_type, min_lr_ratio: shape of `warmup_stable_decay`, and where a decay ends.
        saddle: keys of the recipe's `saddle` section; default off.
        ternary_warmup_steps: steps in which ternary weights go from themselves to their codes.
        dashboard: auto, on or off.
    """

    alpha: float = field(default=0.5)
    temperature: float = field(default=2.0)
    divergence: str = field(default="forward_kl")
    jsd_beta: float = field(default=0.5)
    skew: float = field(default=0.1)
    tail: str = field(default="bucket")
    loss_chunk_size: int | None = field(default=None)
    attention: str = field(default="per_document")
    alpha_initial: float | None = field(default=None)
    alpha_warmup_steps: int = field(default=0)
    temperature_initial: float | None = field(default=None)
    temperature_warmup_steps: int = field(default=0)
    load_balance: float = field(default=0.01)
    router_aux: float = field(default=0.001)
    router_aux_kind: str = field(default="z")
    optimizer: dict[str, Any] = field(default_factory=dict)
    parameter_lr_multipliers: list[tuple[str, float]] = field(default_factory=list)
    decay_ratio: float = field(default=0.1)
    decay_type: str = field(default="linear")
    min_lr_ratio: float = field(default=0.0)
    saddle: dict[str, Any] = field(default_factory=dict)
    ternary_warmup_steps: int = field(default=0)
    dashboard: str = field(default="off")

    def __post_init__(self) -> None:
        # The collator hands over rows and targets; the Trainer must not drop what the model's forward does not name.
        self.remove_unused_columns = False
        # The default hides a NaN loss behind the running mean.
        self.logging_nan_inf_filter = False
        super().__post_init__()

    @property
    def alpha_ramp(self) -> Ramp:
        """α by optimizer step."""
        start = self.alpha if self.alpha_initial is None else self.alpha_initial
        return Ramp(start, self.alpha, self.alpha_warmup_steps)

    def temperature_ramp(self, declared: tuple[float, ...]) -> Ramp:
        """τ by optimizer step, among the temperatures that a teacher declares."""
        start = self.temperature if self.temperature_initial is None else self.temperature_initial
        low, high = sorted((start, self.temperature))
        levels = tuple(value for value in declared if low <= value <= high)
        return Ramp(start, self.temperature, self.temperature_warmup_steps, levels)

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Keyword arguments of `fused_distillation_loss` that no ramp changes."""
        return {
            "divergence": self.divergence,
            "jsd_beta": self.jsd_beta,
            "skew": self.skew,
            "tail": self.tail,
            "chunk_size": self.loss_chunk_size,
        }


_NEVER = 10**9


def arguments_from_recipe(recipe: Recipe, output_dir: Path) -> DistillationArguments:
    """The arguments a recipe's `training` and `loss` sections mean."""
    training, loss = recipe.training, recipe.loss
    every = training.save_steps or training.eval_steps or _NEVER
    on_cpu = choose_device(training.device) == "cpu"
    return DistillationArguments(
        output_dir=str(output_dir),
        max_steps=training.max_steps if training.max_steps >= 0 else -1,
        num_train_epochs=training.num_train_epochs,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        bf16=bfloat16_is_fast("cpu" if on_cpu else "cuda") if training.bf16 == "auto" else training.bf16,
        fp16=training.fp16,
        activation_checkpointing=training.activation_checkpointing or None,
        logging_steps=training.logging_steps,
        eval_strategy="steps" if training.eval_steps else "no",
        eval_steps=training.eval_steps,
        metric_for_best_model="eval_loss" if training.eval_steps else None,
        greater_is_better=False if training.eval_steps else None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=training.save_total_limit,
        report_to=training.report_to or "none",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=training.dataloader_num_workers,
        seed=recipe.seed,
        data_seed=recipe.seed,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        alpha=loss.end("alpha") if recipe.distils else 0.0,
        alpha_initial=loss.alpha_initial if recipe.distils else None,
        alpha_warmup_steps=loss.alpha_warmup_steps if recipe.distils else 0,
        temperature=loss.end("temperature"),
        temperature_initial=loss.temperature_initial,
        temperature_warmup_steps=loss.temperature_warmup_steps,
        load_balance=loss.load_balance,
        router_aux=loss.router_aux,
        router_aux_kind=loss.router_aux_kind,
        divergence=loss.divergence,
        jsd_beta=loss.jsd_beta,
        skew=loss.skew,
        tail=loss.tail,
        loss_chunk_size=loss.chunk_size,
        attention=recipe.dataset.attention,
        optimizer=recipe.optimizer.model_dump(mode="json"),
        parameter_lr_multipliers=[(m.pattern, m.lr_multiplier) for m in recipe.parameter_lr_multipliers],
        decay_ratio=training.decay_ratio,
        decay_type=training.decay_type,
        min_lr_ratio=training.min_lr_ratio,
        saddle=recipe.saddle.model_dump(mode="json"),
        ternary_warmup_steps=recipe.student.ternary.warmup_steps if recipe.student.ternary else 0,
        dashboard=training.dashboard,
    )
