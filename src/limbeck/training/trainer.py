"""DistillationTrainer: transformers.Trainer whose loss is a sum of objectives against a teacher.

The one idea: override what the loss is, which optimizer steps, and what a checkpoint must hold, and nothing
else; accelerate, DDP, FSDP2, trackers and resuming are the Trainer's own. The order of one step:

    get_batch_samples   the step's micro-batches; a teacher elsewhere is asked for those that follow
    compute_loss        for each: targets, the student's forward with the objectives in its head, what they measured
    (backward)          the Trainer's; gradients add up over the micro-batches
    _get_grad_norm      the guard: nothing that is not a number is stepped on
    (callbacks)         before the optimizer: a saddle's boost, the objectives' own gradients
    (optimizer)         HybridOptimizer, then the schedule
    (callbacks)         after it: λ of ternary weights, saddles, log line, evaluation, checkpoint

Use it in your own script:

    trainer = DistillationTrainer(
        model=student, args=DistillationArguments(output_dir="out", loss={"alpha": 0.5, "temperature": 2.0}),
        teacher=LocalTeacher(teacher_model), train_dataset=rows,
    )
    trainer.train()
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PrinterCallback

from limbeck.data.dataset import IGNORE, PackedRows
from limbeck.errors import ConfigError
from limbeck.losses.objective import AFTER_ALL_RAMPS, Batch, Context, Objectives
from limbeck.losses.objectives import Distillation, KLToTeacher
from limbeck.models import require_packing
from limbeck.optim.groups import build_groups, check_groups, objective_groups
from limbeck.optim.hybrid import HybridOptimizer
from limbeck.optim.schedules import SCHEDULES, build_schedule
from limbeck.targets.reference import Reference
from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.base import Teacher
from limbeck.training.arguments import DistillationArguments
from limbeck.training.callbacks import tag
from limbeck.training.check import check_teacher
from limbeck.training.checkpointing import CheckpointingTrainer
from limbeck.training.collate import RowCollator
from limbeck.training.display import Display
from limbeck.training.guard import StepGuard
from limbeck.training.head import LossRequest, attach_objectives
from limbeck.training.interruption import Interruption
from limbeck.training.metrics import StepMetrics, evaluation_metrics
from limbeck.training.own_parameters import OwnParameters
from limbeck.training.prefetch import PENDING, TargetsAhead
from limbeck.training.saddle import SaddleCallback
from limbeck.training.streams import StreamWatch
from limbeck.training.ternarisation import TernaryWatch


class DistillationTrainer(CheckpointingTrainer):
    """A Trainer for packed rows with a teacher.

    Args:
        model: any causal LM of transformers (the student).
        args: DistillationArguments.
        teacher: a `Teacher` (local, cached), or None for plain cross-entropy.
        train_dataset: items with `input_ids` and optionally `doc_ids`, `labels`, `row_id` (a cached teacher
            needs `row_id`); `PackedDataset` gives all of them.
        eval_dataset: the same, held out.
        data_collator: default `RowCollator(teacher)`.
        tokenizer: saved beside the weights of every checkpoint.
        kwargs: further arguments of transformers.Trainer.

    Raises:
        ConfigError: a temperature of the loss is not one the teacher declares, its attention is another, or the student
            does not keep the documents of a row apart and `attention` is per_document.
        MismatchError: a cached teacher was made for other rows than `train_dataset`.
    """

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
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.attention not in ("per_document", "packed"):
            raise ConfigError(f"attention is {args.attention!r}; choose per_document or packed.")
        if teacher is not None:
            check_teacher(teacher, args.loss, args.attention, train_dataset)
        if args.attention == "per_document":
            require_packing(model, "student")
        # Outside torchrun one process drives one GPU: nn.DataParallel would bypass the fused forward.
        args._n_gpu = min(args.n_gpu, 1)
        attach_objectives(model)
        self.teacher = teacher
        self.eval_teacher = eval_teacher or (teacher if teacher is not None and not teacher.in_workers else None)
        self.objectives = Objectives.of(Context(args.loss, model, teacher))
        distillation = next(term for _, term in self.objectives.terms if isinstance(term, Distillation))
        self._scores = Objectives([*self.objectives.terms, (1.0, KLToTeacher(distillation))])
        self.metrics, self._guard = StepMetrics(), StepGuard()
        self._ahead: TargetsAhead | None = None
        self._slow_lines = 0
        self._eval_collator = RowCollator(self.eval_teacher)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or RowCollator(teacher),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.tokenizer_to_save = tokenizer
        self.objectives.to(args.device)
        self.add_callback(OwnParameters(self))
        self.step_loss = 0.0
        # compute_loss divides by the number of positions in the whole accumulated, data-parallel batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to the command's result
        self._display = Display(args, main=self.is_world_process_zero())
        for callback in self._display.callbacks:
            self.add_callback(callback)
        self.ternary = TernaryWatch(model, args.ternary_warmup_steps) if hasattr(model, "ternary_state") else None
        if self.ternary is not None:
            self.add_callback(self.ternary)
        self._streams = StreamWatch(model)
        self._interruption = Interruption(self._on_any_rank)
        self.add_callback(self._interruption)
        self.saddle = SaddleCallback(self, args.saddle) if args.saddle.enabled else None
        if self.saddle is not None:
            self.add_callback(self.saddle)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `True` resumes from the newest whole checkpoint of `output_dir`.

        Raises:
            StoppedError: SIGINT or SIGTERM came; the step in hand was finished and a checkpoint saved.
        """
        try:
            with self._display, self._interruption:
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            self._interruption.raise_if_stopped()
            return result
        finally:
            if self._ahead is not None:
                self._ahead.close()

    # -- loss ------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, divided by the positions of the whole batch."""
        rows = PackedRows.from_batch(inputs)
        with self.metrics.waiting("teacher", self._teacher_device):
            targets = self._targets(rows, inputs, self.teacher)
        outputs = self._forward(model, rows, inputs["labels"], targets, num_items_in_batch)
        self.metrics.add((inputs["labels"] != IGNORE).sum(), outputs.metrics)
        loss = outputs.loss
        self._guard.saw(rows.row_ids, loss, targets)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over ranks; the divisor already counts all
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self,
        model: Any,
        rows: PackedRows,
        labels: torch.Tensor,
        targets: SparseTargets | None,
        num_items: torch.Tensor | int | None = None,
        reference: Reference | None = None,
    ) -> Any:
        step = self.ramped_step(self.state.global_step) if model.training else AFTER_ALL_RAMPS
        teacher = self.teacher if model.training else self.eval_teacher
        batch = Batch(labels, targets, num_items, step, reference, None if teacher is None else teacher.routings)
        request = LossRequest(batch, self.objectives if model.training else self._scores)
        return model(**rows.model_inputs(self.args.attention), loss_request=request)

    def ramped_step(self, step: int) -> int:
        """The step by which ramps go, of an optimizer step: they count from where the present settings began."""
        return max(step - self.settings_began, 0)

    @property
    def _teacher_device(self) -> torch.device | None:
        return self.args.device if self.teacher is not None and not self.teacher.in_workers else None

    @staticmethod
    def _targets(rows: PackedRows, inputs: dict[str, Any], teacher: Teacher | None) -> SparseTargets | None:
        if teacher is None:
            return None
        if PENDING in inputs:
            return inputs[PENDING].result().to(rows.input_ids.device)  # type: ignore[no-any-return]
        if "targets" in inputs:
            return teacher.template().with_tensors(inputs["targets"])
        return teacher.targets(rows).to(rows.input_ids.device)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step; the time they take is waiting for data.

        Of a teacher elsewhere their targets are asked for, and those of the batches that follow.
        """
        if self.teacher is not None and self.teacher.ahead > 0:
            if self._ahead is None or self._ahead.source is not epoch_iterator:
                self._ahead = TargetsAhead(epoch_iterator, self.teacher)
            epoch_iterator = self._ahead
        with self.metrics.waiting("data"):
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    # -- logging ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's parts, rates, waiting and throughput since the last line to what the Trainer logs."""
        if "loss" in logs:
            distils = self.teacher is not None
            by_loader = distils and self.teacher is not None and self.teacher.in_workers
            logs.update(self.metrics.drain(self._sum_over_ranks, distils=distils, targets_by_loader=by_loader))
            logs.update({f"lr/{tag(name)}": rate for name, rate in self._rates.items()})
            if self.ternary is not None and not self.is_fsdp_enabled and self.offload is None:
                logs.update(self.ternary.measure())
            if self.saddle is not None:
                logs["lr_boost"] = self.saddle.factor
            if distils:
                logs.update(self.objectives.scheduled(self.ramped_step(max(self.state.global_step - 1, 0))))
                self._tell_if_slow(logs)
        try:
            super().log(logs, start_time)
        except OSError as error:  # a tracker that cannot write must not end the run
            self.warn_once("log", f"a tracker could not write ({error}); training goes on without that line")

    def _tell_if_slow(self, logs: dict[str, float]) -> None:
        """Say once, while there is time to act on it, that the teacher holds the run up."""
        if self.teacher is None or self.teacher.hint_when_slow is None or logs["teacher_wait_share"] < 0.5:
            return
        self._slow_lines += 1
        if self._slow_lines == 3:
            self.warn_once(
                "slow teacher",
                f"the student waits for the teacher {logs['teacher_wait_share']:.0%} of the time "
                f"({logs['tokens_per_second']:,.0f} tokens/s). {self.teacher.hint_when_slow}, or make the targets "
                "once: `limbeck teacher cache`",
            )

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        moved = values.to(self.args.device)
        total: torch.Tensor = self.accelerator.reduce(
            moved.float() if moved.device.type == "mps" else moved, reduction="sum"
        )
        return total

    # -- evaluation during training --------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """CE in nats per token over held-out rows, weighted by tokens; with a teacher at hand the distance to it too.

        `kl_to_teacher` is the forward KL at temperature 1 over the whole vocabulary, whatever is trained; a teacher
        that gives its likeliest ids alone has `kl_to_teacher_at_least`, that of the (K+1)-partition. `divergence` is
        the one that is trained, at its temperature.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ConfigError("evaluation was asked for and there is no eval_dataset; give one, or unset eval_steps.")
        clock, seen, whole, drawn = time.perf_counter(), StepMetrics(), False, False
        if self.ternary is not None:
            self.ternary.state.mix = 1.0  # what a checkpoint holds
        model = self.model_wrapped if self.model_wrapped is not None else self.model
        model.eval()
        self._scores.eval()
        size, world = self.args.per_device_eval_batch_size, self.args.world_size
        count = len(dataset)
        for first in range(0, count, size * world):
            # Every rank runs every round, so that sharded models stay in step; one without rows counts nothing.
            start = first + self.args.process_index * size
            indices = range(start, min(start + size, count)) or range(1)
            inputs = self._prepare_inputs(self._eval_collator([dataset[i] for i in indices]))
            rows = PackedRows.from_batch(inputs)
            with self.compute_loss_context_manager():
                targets = self._targets(rows, inputs, self.eval_teacher)
                reference = None if self.eval_teacher is None else self.eval_teacher.reference(rows)
                with self._streams.recording(first == 0):
                    outputs = self._forward(model, rows, inputs["labels"], targets, reference=reference)
            whole, drawn = reference is not None, targets is not None and targets.weights is not None
            counts = int(start < count)
            found = {name: value * counts for name, value in outputs.metrics.items()}
            seen.add((inputs["labels"] != IGNORE).sum() * counts, found)
        _, means = seen.means(self._sum_over_ranks)
        model.train()
        self._scores.train()
        metrics = evaluation_metrics(means, metric_key_prefix, whole=whole, drawn=drawn)
        metrics.update(self._streams.measure(metric_key_prefix))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.metrics.skip(time.perf_counter() - clock)  # throughput is of training alone
        return metrics

    # -- optimizer -------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The groups of `optimizer` and `parameter_lr_multipliers`; every parameter in exactly one of them."""
        if self.optimizer is None:
            args = self.args
            adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
            rules = args.parameter_lr_multipliers
            groups = build_groups(
                model or self.model, args.optimizer, args.learning_rate, args.weight_decay, rules, adam
            )
            groups += objective_groups(self.objectives, args.optimizer, args.learning_rate, adam)
            self.optimizer = HybridOptimizer(groups)
        # Here too, because it may be the user's own: `optimizers=(…, None)`.
        check_groups(model or self.model, self.optimizer.param_groups)
        check_groups(self.objectives, self.optimizer.param_groups)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' schedules; warm-up and decay are checked against the length of the run."""
        args = self.args
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        if self.lr_scheduler is not None or kind not in SCHEDULES:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = args.get_warmup_steps(num_training_steps)
        self.lr_scheduler = build_schedule(
            optimizer or self.optimizer,
            kind,
            num_training_steps,
            warmup,
            **args.schedule.model_dump(),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm before clipping; the last moment at which a step can be refused."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.last_grad_norm = float(norm)
        if self.saddle is not None:
            self.step_loss = float(self._sum_over_ranks(self._guard.step_loss(self.args.device)))
        scaled = getattr(self.accelerator, "scaler", None) is not None
        self._guard.check(self.state.global_step + 1, self.last_grad_norm, self.model, self.args, scaled)
        self._rates = {
            str(group.get("name", number)): float(group["lr"])
            for number, group in enumerate(self.optimizer.param_groups)
        }
        return norm

    def probe_loss(self, rows: int) -> torch.Tensor:
        """The loss of the first `rows` training rows, written out so that it can be differentiated twice."""
        model = self.accelerator.unwrap_model(self.model).eval()
        self.objectives.eval()
        items = [self.train_dataset[i] for i in range(min(rows, len(self.train_dataset)))]
        inputs = self._prepare_inputs(self.data_collator(items))
        packed = PackedRows.from_batch(inputs)
        targets = self._targets(packed, inputs, self.teacher)
        batch = Batch(inputs["labels"], targets, step=self.ramped_step(self.state.global_step))
        request = LossRequest(batch, self.objectives, exact=True)
        loss: torch.Tensor = model(
            **packed.to(self.args.device).model_inputs(self.args.attention), loss_request=request
        ).loss
        model.train()
        self.objectives.train()
        return loss

    def _took(self, seconds: float) -> None:
        self.metrics.skip(seconds)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch; none at all when a run is resumed from its last checkpoint, where the Trainer adds a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # -- what a checkpoint holds of this class ------------------------------------------------------------

    def progress_state(self) -> dict[str, Any]:
        """Sums that have not been logged yet, and the saddle monitor: what a resumed run goes on with."""
        saddle = self.saddle.state() if self.saddle is not None else None
        return {**super().progress_state(), "metrics": self.metrics.state(self._sum_over_ranks), "saddle": saddle}

    def restore_progress(self, state: dict[str, Any]) -> None:
        """The inverse of `progress_state`."""
        super().restore_progress(state)
        self.metrics.restore(state["metrics"], main=self.is_world_process_zero())
        if self.saddle is not None and state["saddle"] is not None:
            self.saddle.restore(state["saddle"])
