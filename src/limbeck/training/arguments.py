"""DistillationArguments: transformers.TrainingArguments and the recipe's sections that it has no place for.

Usable in anybody's script; `arguments_from_recipe` makes them from a recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import TrainingArguments

from limbeck.config import LossConfig, LRMultiplier, OptimizerConfig, Recipe, SaddleConfig
from limbeck.config.training import ScheduleConfig
from limbeck.models import bfloat16_is_fast, choose_device


@dataclass
class DistillationArguments(TrainingArguments):
    """Arguments of `DistillationTrainer`; a section may be given as a dict of its keys.

    Attributes:
        loss: what is trained on; without a teacher plain cross-entropy.
        attention: per_document (positions restart, attention stops at document borders) or packed.
        optimizer: which algorithm trains what; default AdamW for everything. `optim` is not read.
        parameter_lr_multipliers: factors on the learning rate by parameter name; first match wins, 0 freezes.
        schedule: shape of `warmup_stable_decay`, and where a decay ends.
        saddle: interventions where training stalls; default off.
        ternary_warmup_steps: steps in which ternary weights go from themselves to their codes.
        dashboard: auto, on or off.
        step_line: combined, throughput, parts or both; see `limbeck.training.callbacks`.
    """

    loss: LossConfig = field(default_factory=LossConfig)
    attention: str = field(default="per_document")
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parameter_lr_multipliers: Sequence[LRMultiplier] = field(default_factory=list)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    saddle: SaddleConfig = field(default_factory=SaddleConfig)
    ternary_warmup_steps: int = field(default=0)
    dashboard: str = field(default="off")
    step_line: str = field(default="combined")

    def __post_init__(self) -> None:
        for name, section in _SECTIONS.items():
            setattr(self, name, section.model_validate(getattr(self, name)))
        if self.optimizer.name == "auto":  # is for recipes, which say whether the student is new
            self.optimizer = self.optimizer.model_copy(update={"name": "adamw"})
        self.parameter_lr_multipliers = [LRMultiplier.model_validate(rule) for rule in self.parameter_lr_multipliers]
        # The collator hands over rows and targets; the Trainer must not drop what the model's forward does not name.
        self.remove_unused_columns = False
        # The default hides a NaN loss behind the running mean.
        self.logging_nan_inf_filter = False
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As JSON, sections as dicts of their keys: what trackers show."""
        found: dict[str, Any] = super().to_dict()
        found.update({name: getattr(self, name).model_dump(mode="json") for name in _SECTIONS})
        found["parameter_lr_multipliers"] = [rule.model_dump() for rule in self.parameter_lr_multipliers]
        return found


_SECTIONS: dict[str, type[BaseModel]] = {
    "loss": LossConfig, "optimizer": OptimizerConfig, "schedule": ScheduleConfig, "saddle": SaddleConfig,
}  # fmt: skip
_SAVE_STEPS = 500


def arguments_from_recipe(recipe: Recipe, output_dir: Path) -> DistillationArguments:
    """The arguments that a recipe means."""
    training = recipe.training
    every = training.save_steps or training.eval_steps or _SAVE_STEPS
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
        loss=recipe.loss,
        attention=recipe.dataset.attention,
        optimizer=recipe.optimizer,
        parameter_lr_multipliers=recipe.parameter_lr_multipliers,
        schedule=training.schedule,
        saddle=recipe.saddle,
        ternary_warmup_steps=recipe.student.ternary.warmup_steps if recipe.student.ternary else 0,
        dashboard=training.dashboard,
        step_line=training.step_line,
    )
