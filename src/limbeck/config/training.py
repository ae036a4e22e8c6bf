"""Sections about the loss, the optimizer and the training loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from limbeck.config.base import OR_WORDS, Count, Fraction, NotNegative, Positive, Section
from limbeck.registry import DIVERGENCES, OBJECTIVES, Choice, OneOf

Tail = Literal["bucket", "renormalise", "ignore"]
Algorithm = Literal["muon", "lion", "adamw"]


class WeightedChoice(Choice):
    """An objective by its name, or `{name: NAME, weight: W, parameter: value}`."""

    weight: Annotated[float, Field(gt=0.0)] = 1.0


class LossConfig(Section):
    """(1-alpha)·CE + alpha·temperature²·D(teacher, student), and for students with routers their two losses."""

    alpha: Fraction = Field(0.5, description="Weight of the divergence; 0 is plain cross-entropy.")
    alpha_initial: Fraction | None = Field(None, description="Weight at step 0 of a ramp; default no ramp.")
    alpha_final: Fraction | None = Field(None, description="Weight after the ramp; default alpha.")
    alpha_warmup_steps: Count = Field(0, description="Steps of the linear ramp from alpha_initial to alpha_final.")
    temperature: Positive = Field(2.0, description="Softens both distributions inside the divergence.")
    temperature_initial: Positive | None = Field(None, description="Temperature at step 0 of a ramp.")
    temperature_final: Positive | None = Field(None, description="Temperature after the ramp; default temperature.")
    temperature_warmup_steps: Count = Field(
        0, description="Steps of the ramp; it goes by the declared temperatures (teacher.temperatures)."
    )
    load_balance: Annotated[float, Field(ge=0.0)] = Field(
        0.01, description="Weight of the load-balancing loss of a student with routed experts."
    )
    router_aux: Annotated[float, Field(ge=0.0)] = Field(0.001, description="Weight of router_aux_kind.")
    router_aux_kind: Literal["z", "entropy"] = Field(
        "z", description="`z`: mean squared logsumexp of the router's logits; `entropy`: mean entropy of its choices."
    )
    halting: Annotated[float, Field(ge=0.0)] = Field(
        0.5, description="Weight of the halting head's cross-entropy, for a RetNet-HRM that has one."
    )
    divergence: Annotated[Choice, OneOf(DIVERGENCES, default="forward_kl")] = Field(
        Choice(name="forward_kl"),
        description="How the student is compared with the teacher: a name, or {name: jsd, beta: 0.3} with the "
        "teacher's share of the mixture, {name: skewed_kl, skew: 0.1} with its share mixed into the student.",
    )
    objectives: list[Annotated[WeightedChoice, OneOf(OBJECTIVES)]] = Field(
        default_factory=list,
        description="Further terms of the loss: names, or {name: NAME, weight: 0.1, parameter: value}.",
    )
    tail: Tail = Field("bucket", description="What becomes of the mass outside the stored ids.")
    chunk_size: PositiveInt | None = Field(None, description="Positions per chunk of logits; default by memory.")

    @field_validator("divergence", mode="before")
    @classmethod
    def _parameters_of_the_default(cls, value: Any) -> Any:
        nameless = isinstance(value, dict) and "name" not in value
        return {"name": cls.model_fields["divergence"].default.name, **value} if nameless else value

    @model_validator(mode="after")
    def _ramps_are_whole(self) -> "LossConfig":
        for name in ("alpha", "temperature"):
            initial, steps = getattr(self, f"{name}_initial"), getattr(self, f"{name}_warmup_steps")
            final = getattr(self, f"{name}_final")
            if (initial is None) != (steps == 0):
                raise ValueError(
                    f"loss.{name}_initial is {initial} and loss.{name}_warmup_steps is {steps}; a ramp needs both"
                )
            if initial is None and final is not None:
                raise ValueError(f"loss.{name}_final is {final} and there is no loss.{name}_initial; set loss.{name}")
            if final is not None and name in self.model_fields_set and final != getattr(self, name):
                raise ValueError(
                    f"loss.{name} is {getattr(self, name)} and loss.{name}_final is {final}; set one of them"
                )
        return self

    def end(self, name: Literal["alpha", "temperature"]) -> float:
        """The value after the ramp, or the constant one."""
        final = getattr(self, f"{name}_final")
        return float(getattr(self, name) if final is None else final)

    def undeclared(self, temperatures: Sequence[float]) -> tuple[str, float] | None:
        """The key and value of a temperature that is not among the declared ones; None when all are."""
        wanted = {"temperature": self.end("temperature"), "temperature_initial": self.temperature_initial}
        return next(((k, v) for k, v in wanted.items() if v is not None and v not in temperatures), None)

    @property
    def wanted_temperatures(self) -> tuple[float, ...]:
        """What a teacher declares when nobody says: the temperature, or five levels of its ramp."""
        end = self.end("temperature")
        if self.temperature_initial is None:
            return (end,)
        start = self.temperature_initial
        return (start, *(round(start + (end - start) * i / 4, 6) for i in (1, 2, 3)), end)


class LRMultiplier(Section):
    """One rule of `parameter_lr_multipliers`."""

    pattern: str = Field(description="Regular expression searched in parameter names.")
    lr_multiplier: Annotated[float, Field(ge=0.0)] = Field(description="Factor on the learning rate; 0 freezes.")


class MuonConfig(Section):
    """Momentum with an orthogonalised update, for hidden matrices."""

    learning_rate: Positive | None = Field(None, description="Default training.learning_rate, or 0.02.")
    weight_decay: NotNegative | None = Field(None, description="Default training.weight_decay.")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.95, description="Decay rate of the momentum.")
    nesterov: bool = Field(True, description="Look ahead along the momentum.")
    ns_steps: Annotated[int, Field(ge=1, le=20)] = Field(5, description="Newton–Schulz steps.")
    adjust_lr: Literal["original", "match_rms_adamw"] = Field(
        "original", description="Factor on the rate: √max(1, out/in), or 0.2·√max(out, in) (then one rate fits all)."
    )
    split_heads: bool = Field(True, description="Orthogonalise each head of q, k and v apart.")


class LionConfig(Section):
    """Sign of the momentum; for what Muon does not fit, or everything."""

    learning_rate: Positive | None = Field(None, description="Default 1e-4 beside Muon, else training.learning_rate.")
    weight_decay: NotNegative | None = Field(None, description="Default training.weight_decay.")
    beta1: Fraction = Field(0.9, description="Share of the momentum in the direction taken.")
    beta2: Fraction = Field(0.99, description="Decay rate of the momentum.")


class AdamWConfig(Section):
    """AdamW; its decay rates are training.adam_beta1 and adam_beta2."""

    learning_rate: Positive | None = Field(None, description="Default 3e-4 beside Muon, else training.learning_rate.")
    weight_decay: NotNegative | None = Field(None, description="Default training.weight_decay.")


class StreamsConfig(Section):
    """The parameters that mix mHC-lite streams: a group of their own, by the algorithm of what is no matrix."""

    learning_rate: Positive | None = Field(None, description="Default that of their algorithm.")


class AlgorithmRule(Section):
    """One rule of `optimizer.algorithms`."""

    pattern: str = Field(description="Regular expression searched in parameter names.")
    algorithm: Algorithm = Field(description="What its parameters are trained with.")


#: Learning rates where the recipe gives none; AdamW's beside Muon.
DEFAULT_RATES = {"muon": 0.02, "lion": 1e-4, "adamw": 3e-4}


class OptimizerConfig(Section):
    """Which algorithm trains what."""

    name: Literal["auto", "adamw", "lion", "muon_lion", "muon_adamw"] = Field(
        "auto",
        description="One for everything, or Muon for hidden matrices and the second for the rest; `auto`: Muon + AdamW "
        "for a new student, AdamW for a pretrained one or a learning_rate that is given; rates by the student's width.",
    )
    muon: MuonConfig = Field(default_factory=MuonConfig, description="Muon.")
    lion: LionConfig = Field(default_factory=LionConfig, description="Lion.")
    adamw: AdamWConfig = Field(default_factory=AdamWConfig, description="AdamW.")
    mhc: StreamsConfig = Field(default_factory=StreamsConfig, description="Mixing of mHC-lite streams.")
    algorithms: list[AlgorithmRule] = Field(
        default_factory=list, description="Other algorithms by parameter name; the first match wins."
    )

    @property
    def default_learning_rate(self) -> float:
        """The rate of hidden matrices when the recipe gives none."""
        return 5e-4 if self.for_matrices == "adamw" else DEFAULT_RATES[self.for_matrices]

    @property
    def for_matrices(self) -> str:
        """The algorithm of hidden matrices."""
        return "adamw" if self.name == "auto" else self.name.partition("_")[0]

    @property
    def for_others(self) -> str:
        """The algorithm of everything else."""
        return "adamw" if self.name == "auto" else self.name.rpartition("_")[2]


class SaddleConfig(Section):
    """Interventions where training stalls: a higher learning rate for a while, or a step along negative curvature."""

    enabled: bool = Field(False, description="Watch for stalls and act on them.")
    patience_steps: Annotated[int, Field(ge=2)] = Field(50, description="Steps in the window that is looked at.")
    gradient_norm: Positive | Literal["auto"] = Field(
        0.65, description="A stall has a gradient norm below this; `auto`: a tenth of the run's median."
    )
    min_improvement: NotNegative = Field(1e-3, description="A stall improves the loss by a smaller share than this.")
    min_loss: NotNegative = Field(0.0, description="Below this loss nothing is a stall.")
    boosts: list[Annotated[float, Field(gt=1.0)]] = Field(
        [1.5, 2.0, 2.5, 3.0], description="Factors on the learning rate, from stall to stall.", min_length=1
    )
    boost_steps: PositiveInt = Field(75, description="Steps that a boost lasts.")
    cooldown_steps: Count = Field(200, description="Steps after an intervention without another.")
    curvature: bool = Field(
        False, description="Prove negative curvature first (Lanczos), and move along it instead of boosting."
    )
    lanczos_steps: Annotated[int, Field(ge=2)] = Field(14, description="Hessian-vector products of a proof.")
    probe_rows: PositiveInt = Field(8, description="Fixed training rows on which curvature and moves are measured.")


class TrackingConfig(Section):
    """How trackers know the run."""

    project: str = Field("limbeck", description="Project of W&B and trackio.", min_length=1)
    name: str | None = Field(None, description="Name of the run there; default the recipe's.")
    tags: Annotated[list[str], OR_WORDS] = Field(default_factory=list, description="W&B's tags of the run.")


class ScheduleConfig(Section):
    """How the learning rate comes down; keys of `training`."""

    decay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.1, description="Share of the steps in which warmup_stable_decay goes down at the end."
    )
    decay_type: Literal["linear", "cosine", "1-sqrt"] = Field(
        "linear", description="How warmup_stable_decay goes down."
    )
    min_lr_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Where a decay ends, as a share of the peak."
    )


class TrainingConfig(ScheduleConfig):
    """The training loop; names are those of transformers.TrainingArguments."""

    output_dir: Path | None = Field(None, description="Folder of checkpoints and `final/`; default OUTPUT_DIR/student.")
    mode: Literal["distill", "ce"] = Field("distill", description="`ce` trains without a teacher.")
    max_steps: Literal[-1] | PositiveInt = Field(-1, description="Optimizer steps; -1 goes by num_train_epochs.")
    num_train_epochs: Positive = Field(1.0, description="Passes over the training rows when max_steps is -1.")
    per_device_train_batch_size: PositiveInt = Field(8, description="Rows in one micro-batch of a device.")
    per_device_eval_batch_size: PositiveInt = Field(8, description="Rows in one evaluation batch.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Micro-batches in one optimizer step.")
    learning_rate: Positive | None = Field(
        None, description="Peak learning rate (of Muon, where it is named); default by optimizer.name."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"] = Field(
        "cosine", description="Shape of the learning rate after warm-up."
    )
    warmup_steps: Count = Field(0, description="Steps of linear warm-up.")
    weight_decay: NotNegative = Field(0.0, description="Decoupled weight decay of matrices.")
    adam_beta1: Fraction = Field(0.9, description="AdamW's first decay rate.")
    adam_beta2: Fraction = Field(0.95, description="AdamW's second decay rate.")
    max_grad_norm: NotNegative = Field(1.0, description="Gradient norm is clipped to this; 0: never.")
    bf16: bool | Literal["auto"] = Field(
        False, description="bfloat16 autocast; `auto`: where the device computes faster in it."
    )
    fp16: bool = Field(False, description="float16 autocast with loss scaling (GPU).")
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    offload_experts: Literal["cpu", "disk"] | None = Field(
        None,
        description="Keep routed experts, their gradients and optimizer state in the CPU's memory, or in files that "
        "are mapped into it; a layer's come to the device when they are in use.",
    )
    offload_dir: Path | None = Field(None, description="Folder of offload_experts: disk; default beside the student.")
    logging_steps: PositiveInt = Field(10, description="Steps between log lines.")
    eval_steps: PositiveInt | None = Field(None, description="Steps between evaluations; default none.")
    eval_rows: PositiveInt | None = Field(64, description="Held-out rows of an evaluation during training.")
    save_steps: PositiveInt | None = Field(
        None, description="Steps between checkpoints; default eval_steps, or 500. Must divide eval_steps."
    )
    save_total_limit: PositiveInt | None = Field(3, description="Newest checkpoints kept, beside the best one.")
    dashboard: Literal["auto", "on", "off"] = Field(
        "auto",
        description="A live panel on the terminal; `auto`: where stderr is one. All messages go to training.log.",
    )
    step_line: Literal["combined", "throughput", "parts", "both"] = Field(
        "combined",
        description="Form of a step's line: all in one, `[step/total] loss=… tok/s=…`, `Step N: Total Loss: …`, or "
        "the last two.",
    )
    resume: bool = Field(True, description="Continue from the newest whole checkpoint in output_dir.")
    resume_from: Path | None = Field(None, description="Continue from this checkpoint of another run or mode.")
    report_to: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], OR_WORDS] = Field(
        ["tensorboard"], description="Trackers: tensorboard, wandb, trackio; [] for none."
    )
    device: Literal["cpu", "cuda"] | None = Field(None, description="cpu or cuda; default cuda where there is one.")
    dataloader_num_workers: Count = Field(0, description="Processes that read and collate rows.")

    @property
    def schedule(self) -> ScheduleConfig:
        """The keys that shape the schedule."""
        return ScheduleConfig.model_validate(self.model_dump(include=set(ScheduleConfig.model_fields)))

    @model_validator(mode="after")
    def _one_precision(self) -> "TrainingConfig":
        if self.bf16 is True and self.fp16:
            raise ValueError("training.bf16 and training.fp16 are both true; choose one")
        return self

    @model_validator(mode="after")
    def _layers_come_one_at_a_time(self) -> "TrainingConfig":
        if self.offload_experts is not None and not self.activation_checkpointing:
            raise ValueError(
                f"training.offload_experts is {self.offload_experts} and training.activation_checkpointing is false: "
                "every layer's experts would stay until the backward pass. Set activation_checkpointing: true"
            )
        return self

    @model_validator(mode="after")
    def _best_is_saved(self) -> "TrainingConfig":
        if self.eval_steps and self.save_steps and self.eval_steps % self.save_steps:
            raise ValueError(
                f"training.eval_steps ({self.eval_steps}) is no multiple of training.save_steps ({self.save_steps}), "
                "so the best step might have no checkpoint; choose multiples"
            )
        return self


class PhaseConfig(Section):
    """One stage of training: its length, and the keys in which it differs from the recipe."""

    stage_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = Field(
        description="Name of the stage's folder."
    )
    num_epochs: Positive | None = Field(None, description="Passes over the training rows.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps, instead of num_epochs.")
    parameter_lr_multipliers: list[LRMultiplier] | None = Field(
        None, description="Rules of this stage, instead of the recipe's."
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `training` that differ: mode, learning_rate, warmup_steps …"
    )
    optimizer: dict[str, Any] = Field(default_factory=dict, description="Keys of `optimizer` that differ.")
    loss: dict[str, Any] = Field(default_factory=dict, description="Keys of `loss` that differ.")
    dataset: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `dataset` that differ: name, max_length …; packed and cached apart."
    )

    @model_validator(mode="after")
    def _one_length(self) -> "PhaseConfig":
        if (self.num_epochs is None) == (self.max_steps is None):
            raise ValueError(f"stage {self.stage_name!r} needs exactly one of num_epochs and max_steps")
        if self.stage_name in ("final", "best", "latest", "runs") or self.stage_name.startswith("step_"):
            raise ValueError(f"stage_name {self.stage_name!r} names something else in the run's folder; choose another")
        for key in ("output_dir", "resume_from", "max_steps", "num_train_epochs"):
            if key in self.training:
                raise ValueError(
                    f"stage {self.stage_name!r} sets training.{key}; a stage's length is its max_steps or num_epochs, "
                    "and its folder follows from the run's"
                )
        return self


class StagesConfig(Section):
    """Training in stages: optimizer and schedule start anew in each, weights go on."""

    enabled: bool = Field(False, description="Train in the stages of `configs`, in order.")
    configs: list[PhaseConfig] = Field(default_factory=list, description="The stages.")

    @model_validator(mode="after")
    def _named_once(self) -> "StagesConfig":
        names = [stage.stage_name for stage in self.configs]
        if self.enabled and not names:
            raise ValueError("stages.enabled is true and stages.configs is empty; add a stage or set it to false")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages.configs has two stages named {name!r}; give each its own name")
        return self
