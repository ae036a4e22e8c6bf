"""DistillationTrainer: transformers.Trainer whose loss is (1−α)·CE + α·τ²·D to a teacher.

The one idea: override what the loss is and what a checkpoint must hold, and nothing else; accelerate, DDP,
FSDP2, schedules, trackers and resuming are the Trainer's own.

Use it in your own script:

    trainer = DistillationTrainer(
        model=student, args=DistillationArguments(output_dir="out", alpha=0.5, temperature=2.0),
        teacher=LocalTeacher(teacher_model), train_dataset=rows,
    )
    trainer.train()
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer

from limbeck.data.dataset import PackedDataset, PackedRows
from limbeck.errors import ConfigError
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.store import TeacherCache
from limbeck.teachers.base import Teacher
from limbeck.teachers.local import LocalTeacher
from limbeck.training.arguments import DistillationArguments
from limbeck.training.callbacks import LogLines
from limbeck.training.checkpoints import rotate, seal
from limbeck.training.collate import RowCollator
from limbeck.training.head import LossRequest, attach_fused_loss
from limbeck.training.param_groups import build_param_groups

_PARTS = ("ce", "divergence", "teacher_mass", "student_mass", "top1", "tokens")


class DistillationTrainer(Trainer):
    """A Trainer for packed rows with a teacher.

    Args:
        model: any causal LM of transformers (the student).
        args: DistillationArguments.
        teacher: a `Teacher` (local, cached), or None for plain cross-entropy.
        train_dataset: items with `input_ids` and optionally `doc_ids`, `labels`, `row_id` (a cached teacher
            needs `row_id`); `PackedDataset` gives all of them.
        eval_dataset: the same, held out.
        data_collator: default `RowCollator(teacher)`.
        kwargs: further arguments of transformers.Trainer.

    Raises:
        ConfigError: the loss's temperature is not one the teacher declares, or its attention is another.
        MismatchError: a cached teacher was made for other rows than `train_dataset`.
    """

    control: Any
    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: DistillationArguments,
        *,
        teacher: Teacher | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        eval_teacher: Teacher | None = None,
        **kwargs: Any,
    ) -> None:
        if teacher is not None and args.temperature not in teacher.temperatures:
            raise ConfigError(
                f"loss.temperature is {args.temperature} and the teacher declares {list(teacher.temperatures)}. "
                "Use a declared temperature, or declare it in teacher.temperatures and make the targets again."
            )
        if args.attention not in ("per_document", "packed"):
            raise ConfigError(f"attention is {args.attention!r}; choose per_document or packed.")
        if isinstance(teacher, TeacherCache) and isinstance(train_dataset, PackedDataset):
            teacher.check(train_dataset, args.attention)
        if isinstance(teacher, LocalTeacher) and teacher.attention != args.attention:
            raise ConfigError(f"the teacher's attention is {teacher.attention} and the student's {args.attention}.")
        # Outside torchrun one process drives one GPU: nn.DataParallel would bypass the fused forward.
        args._n_gpu = min(args.n_gpu, 1)
        self._keep_checkpoints, args.save_total_limit = args.save_total_limit, None
        attach_fused_loss(model)
        self.teacher = teacher
        self.eval_teacher = eval_teacher or (teacher if teacher is not None and not teacher.in_workers else None)
        collator = data_collator or RowCollator(teacher)
        self._eval_collator = RowCollator(self.eval_teacher)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        # compute_loss divides by the number of positions in the whole accumulated, data-parallel batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to the command's result
        self.add_callback(LogLines(Path(args.output_dir) / "training.log"))
        self._sums = torch.zeros(len(_PARTS), dtype=torch.float64)
        self._clock = time.perf_counter()

    # -- loss ------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, divided by the positions of the whole batch."""
        outputs = self._forward(model, inputs, self.teacher, num_items_in_batch)
        self._count(outputs.parts)
        loss = outputs.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over ranks; the divisor already counts all
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self,
        model: Any,
        inputs: dict[str, Any],
        teacher: Teacher | None,
        num_items: torch.Tensor | int | None,
    ) -> Any:
        rows = PackedRows(inputs["row_ids"], inputs["input_ids"], inputs["doc_ids"])
        request = LossRequest(
            inputs["labels"], self._targets(rows, inputs, teacher), self.args.loss_settings, num_items
        )
        return model(**rows.model_inputs(self.args.attention), loss_request=request)

    @staticmethod
    def _targets(rows: PackedRows, inputs: dict[str, Any], teacher: Teacher | None) -> SparseTargets | None:
        if teacher is None:
            return None
        if "targets" in inputs:
            return teacher.template().with_tensors(inputs["targets"])
        return teacher.targets(rows).to(rows.input_ids.device)

    def _count(self, parts: Any) -> None:
        values = (
            parts.ce_sum,
            parts.divergence_sum,
            parts.teacher_mass,
            parts.student_mass,
            parts.top1_matches,
            parts.num_valid,
        )
        self._sums = self._sums.to(parts.ce_sum.device) + torch.stack([v.detach().double() for v in values])

    # -- logging ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's parts and the throughput since the last log to what the Trainer logs."""
        if "loss" in logs:
            now = time.perf_counter()
            sums = self._reduce(self._sums)
            tokens = max(sums["tokens"], 1.0)
            logs["ce_loss"] = sums["ce"] / tokens
            logs["tokens_per_second"] = sums["tokens"] / max(now - self._clock, 1e-9)
            if self.teacher is not None:
                logs["kl_loss"] = sums["divergence"] / tokens
                logs["teacher_mass"] = sums["teacher_mass"] / tokens
                logs["student_mass"] = sums["student_mass"] / tokens
                logs["top1_agreement"] = sums["top1"] / tokens
            self._sums = torch.zeros_like(self._sums)
            self._clock = now
        super().log(logs, start_time)

    def _reduce(self, sums: torch.Tensor) -> dict[str, float]:
        total = self.accelerator.reduce(sums.float() if sums.device.type == "mps" else sums, reduction="sum")
        return dict(zip(_PARTS, total.tolist(), strict=True))

    # -- evaluation during training --------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """CE in nats per token over held-out rows, weighted by tokens; with a local teacher its divergence too."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ConfigError("evaluation was asked for and there is no eval_dataset; give one, or unset eval_steps.")
        clock, kept = time.perf_counter(), self._sums
        self._sums = torch.zeros_like(self._sums)
        model = self.model_wrapped if self.model_wrapped is not None else self.model
        model.eval()
        size, world = self.args.per_device_eval_batch_size, self.args.world_size
        count = len(dataset)
        for first in range(0, count, size * world):
            # Every rank runs every round, so that sharded models stay in step; one without rows counts nothing.
            start = first + self.args.process_index * size
            indices = range(start, min(start + size, count)) or range(1)
            batch = self._eval_collator([dataset[i] for i in indices])
            with self.compute_loss_context_manager():
                outputs = self._forward(model, self._prepare_inputs(batch), self.eval_teacher, None)
            if start < count:
                self._count(outputs.parts)
        sums, self._sums = self._reduce(self._sums), kept
        model.train()
        tokens = max(sums["tokens"], 1.0)
        metrics = {"loss": sums["ce"] / tokens, "perplexity": math.exp(min(sums["ce"] / tokens, 700.0))}
        if self.eval_teacher is not None:
            metrics["kl_to_teacher"] = sums["divergence"] / tokens
            metrics["top1_agreement"] = sums["top1"] / tokens
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._clock += time.perf_counter() - clock  # throughput is of training alone
        return metrics

    # -- optimizer -------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the groups of `parameter_lr_multipliers`; every parameter in exactly one of them."""
        if self.optimizer is None:
            args = self.args
            groups = build_param_groups(
                model or self.model, args.learning_rate, args.weight_decay, args.parameter_lr_multipliers
            )
            self.optimizer = torch.optim.AdamW(
                groups,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                fused=True,
            )
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch; none at all when a run is resumed from its last checkpoint, where the Trainer adds a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # -- checkpoints -----------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, seal, and only then delete older checkpoints: at every instant a whole one exists."""
        super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            seal(folder / f"checkpoint-{self.state.global_step}", self.state.global_step)
            rotate(folder, self._keep_checkpoints, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The model without `training_args.bin`: that file is a pickle, which nobody should have to trust."""
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights through `from_pretrained`.

        The Trainer's own loading passes the checkpoint's keys to `load_state_dict(..., strict=False)`
        unconverted and so silently drops fused expert weights (transformers #48805).
        """
        self._load_weights(resume_from_checkpoint) or super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As `_load_from_checkpoint`, for the best checkpoint."""
        self._load_weights(self.state.best_model_checkpoint) or super()._load_best_model()

    def _load_weights(self, checkpoint: str | None) -> bool:
        """True when the weights were loaded here (plain models; sharded ones are the Trainer's business)."""
        base = self.accelerator.unwrap_model(self.model)
        if checkpoint is None or not isinstance(base, PreTrainedModel) or self.is_fsdp_enabled:
            return False
        dtype = next(base.parameters()).dtype
        saved = type(base).from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
        base.load_state_dict(saved.state_dict(), strict=True)
        return True
