"""The recipe: every key limbeck knows, its type, its default and what it does.

The one idea: this file is the only place a key is defined. The YAML reader, the command-line flags, the
JSON schema and the help text are all derived from these models; an unknown key is an error, never ignored.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0.0)]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]


class Section(BaseModel):
    """A part of the recipe; refuses keys it does not define."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class DatasetConfig(Section):
    """The text, and how it is cut into rows of tokens."""

    name: str = Field(
        "stdlib",
        description="`stdlib` (the Python standard library's sources), a .txt/.jsonl/.parquet file, a folder of "
        "them, a local dataset folder, or a Hugging Face dataset id.",
    )
    config_name: str | None = Field(None, description="Configuration of a Hugging Face dataset.")
    revision: str | None = Field(None, description="Commit or tag of a Hugging Face dataset.")
    split: str = Field("train", description="Split of a Hugging Face dataset to read.")
    text_column: str = Field("text", description="Column or JSON key that holds the text.")
    streaming: bool = Field(True, description="Stream a Hugging Face dataset instead of downloading it whole.")
    recursive: bool = Field(False, description="Look for files in subfolders too.")
    max_samples: PositiveInt | None = Field(None, description="Stop after this many documents.")
    max_length: Annotated[int, Field(ge=2)] = Field(1024, description="Tokens in a packed row.")
    validation_fraction: Fraction = Field(
        0.02, description="Share of the documents, chosen by a hash of their name, held out of training."
    )
    attention: Literal["per_document", "packed"] = Field(
        "per_document",
        description="`per_document`: positions restart and attention stops at document borders; "
        "`packed`: plain causal attention over the whole row.",
    )
    packed_dir: Path | None = Field(None, description="Folder of the packed rows; default OUTPUT_DIR/data.")
    rows_per_shard: PositiveInt = Field(4096, description="Rows in one Parquet shard.")
    train_rows: PositiveInt | None = Field(
        None, description="Cache and train on this many rows, evenly spaced over the training split; default all."
    )
    num_proc: PositiveInt | None = Field(None, description="Tokenising processes; default one per core.")


class TokenizerConfig(Section):
    """The tokenizer: somebody's, or one trained on the dataset."""

    name: str | None = Field(None, description="Folder or hub id of a tokenizer; default the teacher's.")
    revision: str | None = Field(None, description="Commit or tag of a hub tokenizer.")
    train_vocab_size: Annotated[int, Field(ge=260)] | None = Field(
        None, description="Train a byte-level BPE of this many entries on the training documents."
    )

    @model_validator(mode="after")
    def _one_source(self) -> "TokenizerConfig":
        if self.name is not None and self.train_vocab_size is not None:
            raise ValueError(
                f"tokenizer.name ({self.name}) and tokenizer.train_vocab_size ({self.train_vocab_size}) "
                "exclude each other; remove one"
            )
        return self


class SamplingConfig(Section):
    """Head + sampled tail (Random-Sampling KD, arXiv 2503.16870): unbiased sparse targets."""

    head: Annotated[int, Field(ge=0)] = Field(32, description="The most likely ids, kept exactly.")
    draws: PositiveInt = Field(32, description="Draws, with replacement, from the rest of the vocabulary.")
    seed: Seed = Field(0, description="Seed of the draws; the same rows always get the same draws.")


class TeacherConfig(Section):
    """The model that is distilled, and what is kept of its predictions."""

    model: str | None = Field(
        None, description="Folder or hub id of a causal LM; `tiny-python` is the model in the package."
    )
    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run the model repository's own Python code.")
    use_cached_logits: bool = Field(
        True, description="Read targets from cache_dir (true) or run the teacher beside the student (false)."
    )
    cache_dir: Path | None = Field(None, description="Folder of cached targets; default OUTPUT_DIR/cache.")
    top_k: PositiveInt | None = Field(64, description="Token ids kept per position; null keeps the vocabulary.")
    temperatures: list[Positive] | None = Field(
        None, description="Temperatures whose normaliser is stored; default 1 and loss.temperature."
    )
    sampling: SamplingConfig | None = Field(None, description="Replace top-k by head + sampled tail.")
    dtype: Dtype = Field(
        "auto",
        description="Precision of the teacher's weights; `auto`: the checkpoint's own, but float32 on a CPU without "
        "bfloat16 instructions.",
    )
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")] | None = Field(
        None, description="Device of the teacher (cpu, cuda, cuda:1); default the student's."
    )
    batch_size: PositiveInt | None = Field(None, description="Rows in one forward pass; default by max_batch_tokens.")
    max_batch_tokens: PositiveInt = Field(8192, description="Tokens in one forward pass of the teacher.")
    rows_per_shard: PositiveInt = Field(256, description="Packed rows in one HDF5 shard of the cache.")
    compression: Literal["gzip", "none"] = Field("gzip", description="HDF5's own filter on top of the codec.")
    max_kl: Positive = Field(1e-4, description="Largest mean KL (nats) the codec may cost; above it caching stops.")
    splits: list[Literal["train", "validation"]] = Field(
        ["train", "validation"], description="Splits of the packed data to cache.", min_length=1
    )

    @model_validator(mode="after")
    def _sampling_replaces_top_k(self) -> "TeacherConfig":
        if self.sampling is not None and self.top_k is None:
            raise ValueError(
                "teacher.sampling draws a sparse support and teacher.top_k: null keeps the whole vocabulary; remove one"
            )
        return self


class StudentConfig(Section):
    """The model that is trained: pretrained, or built from a config."""

    model: str | None = Field(None, description="Folder or hub id of pretrained weights to start from.")
    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run the model repository's own Python code.")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="A transformers config (with `model_type`) for a new model; over pretrained ones, keys to change.",
    )

    @model_validator(mode="after")
    def _has_architecture(self) -> "StudentConfig":
        if self.model is None and self.config and "model_type" not in self.config:
            raise ValueError("student.config needs `model_type` (say llama or qwen3) when student.model is not set")
        return self


Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "tvd"]
Tail = Literal["bucket", "renormalise", "ignore"]


class LossConfig(Section):
    """(1-alpha)·CE + alpha·temperature²·D(teacher, student)."""

    alpha: Fraction = Field(0.5, description="Weight of the divergence; 0 is plain cross-entropy.")
    temperature: Positive = Field(2.0, description="Softens both distributions inside the divergence.")
    divergence: Divergence = Field("forward_kl", description="How the student is compared with the teacher.")
    jsd_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="Teacher's share of the JSD mixture.")
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="Teacher's share mixed into the student in skewed KL."
    )
    tail: Tail = Field("bucket", description="What becomes of the mass outside the stored ids.")
    chunk_size: PositiveInt | None = Field(None, description="Positions per chunk of logits; default by memory.")


class LRMultiplier(Section):
    """One rule of `parameter_lr_multipliers`."""

    pattern: str = Field(description="Regular expression searched in parameter names.")
    lr_multiplier: Annotated[float, Field(ge=0.0)] = Field(description="Factor on the learning rate; 0 freezes.")


class TrainingConfig(Section):
    """The training loop; names are those of transformers.TrainingArguments."""

    output_dir: Path | None = Field(None, description="Folder of checkpoints and `final/`; default OUTPUT_DIR/student.")
    mode: Literal["distill", "ce"] = Field("distill", description="`ce` trains without a teacher.")
    max_steps: Literal[-1] | PositiveInt = Field(-1, description="Optimizer steps; -1 goes by num_train_epochs.")
    num_train_epochs: Positive = Field(1.0, description="Passes over the training rows when max_steps is -1.")
    per_device_train_batch_size: PositiveInt = Field(8, description="Rows in one micro-batch of a device.")
    per_device_eval_batch_size: PositiveInt = Field(8, description="Rows in one evaluation batch.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Micro-batches in one optimizer step.")
    learning_rate: Positive = Field(5e-4, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the learning rate after warm-up."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps of linear warm-up.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Decoupled weight decay.")
    adam_beta1: Fraction = Field(0.9, description="AdamW's first decay rate.")
    adam_beta2: Fraction = Field(0.95, description="AdamW's second decay rate.")
    max_grad_norm: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="Gradient norm is clipped to this; 0: never."
    )
    bf16: bool | Literal["auto"] = Field(
        False, description="bfloat16 autocast; `auto`: where the device computes faster in it."
    )
    fp16: bool = Field(False, description="float16 autocast with loss scaling (GPU).")
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    logging_steps: PositiveInt = Field(10, description="Steps between log lines.")
    eval_steps: PositiveInt | None = Field(None, description="Steps between evaluations; default none.")
    eval_rows: PositiveInt | None = Field(64, description="Held-out rows of an evaluation during training.")
    save_steps: PositiveInt | None = Field(
        None, description="Steps between checkpoints; default eval_steps, or only at the end. Must divide eval_steps."
    )
    save_total_limit: PositiveInt | None = Field(3, description="Newest checkpoints kept, beside the best one.")
    resume: bool = Field(True, description="Continue from the newest whole checkpoint in output_dir.")
    resume_from: Path | None = Field(None, description="Continue from this checkpoint of another run or mode.")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        ["tensorboard"], description="Trackers: tensorboard, wandb, trackio; [] for none."
    )
    device: Literal["cpu", "cuda"] | None = Field(None, description="cpu or cuda; default cuda where there is one.")
    dataloader_num_workers: Annotated[int, Field(ge=0)] = Field(0, description="Processes that read and collate rows.")

    @model_validator(mode="after")
    def _one_precision(self) -> "TrainingConfig":
        if self.bf16 is True and self.fp16:
            raise ValueError("training.bf16 and training.fp16 are both true; choose one")
        return self

    @model_validator(mode="after")
    def _best_is_saved(self) -> "TrainingConfig":
        if self.eval_steps and self.save_steps and self.eval_steps % self.save_steps:
            raise ValueError(
                f"training.eval_steps ({self.eval_steps}) is no multiple of training.save_steps ({self.save_steps}), "
                "so the best step might have no checkpoint; choose multiples"
            )
        return self


class EvaluationConfig(Section):
    """What is measured on the held-out rows once training is done."""

    max_rows: PositiveInt | None = Field(None, description="Held-out rows scored; default all.")
    batch_size: PositiveInt = Field(8, description="Rows in one batch.")
    model: Path | None = Field(None, description="Folder of the model `limbeck eval` scores; default the student.")


class GenerationConfig(Section):
    """The sample that shows what the student writes."""

    prompt: str = Field("def ", description="Text to continue.")
    max_new_tokens: PositiveInt = Field(96, description="Tokens to write.")
    temperature: Annotated[float, Field(ge=0.0)] = Field(0.7, description="0 takes the likeliest token.")
    top_k: Annotated[int, Field(ge=0)] = Field(40, description="Sample among this many; 0: all.")
    seed: Seed = Field(0, description="Seed of the sampling.")
    model: Path | None = Field(None, description="Folder of the model `limbeck generate` runs; default the student.")


class Stage(Section):
    """One stage of training: its length and what learns in it."""

    stage_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(description="Name of the stage's folder.")
    num_epochs: Positive | None = Field(None, description="Passes over the training rows.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps, instead of num_epochs.")
    parameter_lr_multipliers: list[LRMultiplier] | None = Field(
        None, description="Rules of this stage, instead of the recipe's."
    )

    @model_validator(mode="after")
    def _one_length(self) -> "Stage":
        if (self.num_epochs is None) == (self.max_steps is None):
            raise ValueError(f"stage {self.stage_name!r} needs exactly one of num_epochs and max_steps")
        return self


class StagesConfig(Section):
    """Training in stages: optimizer and schedule start anew in each, weights go on."""

    enabled: bool = Field(False, description="Train in the stages of `configs`, in order.")
    configs: list[Stage] = Field(default_factory=list, description="The stages.")

    @model_validator(mode="after")
    def _named_once(self) -> "StagesConfig":
        names = [stage.stage_name for stage in self.configs]
        if self.enabled and not names:
            raise ValueError("stages.enabled is true and stages.configs is empty; add a stage or set it to false")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages.configs has two stages named {name!r}; give each its own name")
        return self


class PipelineConfig(Section):
    """What `limbeck run` does beside the stages that the recipe's sections ask for."""

    ce_baseline: bool = Field(False, description="Also train the same student with CE alone, for comparison.")
    generate: bool = Field(False, description="End with a generated sample.")


class Recipe(Section):
    """One whole run: data, teacher, student, losses, training, evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = Field("run", description="Name of the run.")
    output_dir: Path | None = Field(None, description="Folder of the run; default outputs/NAME.")
    seed: Seed = Field(0, description="Seed of initialisation and data order.")
    dataset: DatasetConfig = Field(default_factory=DatasetConfig, description="Text and packing.")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="Tokenizer.")
    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="Teacher and its targets.")
    student: StudentConfig = Field(default_factory=StudentConfig, description="Student model.")
    loss: LossConfig = Field(default_factory=LossConfig, description="Loss.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Training loop.")
    parameter_lr_multipliers: list[LRMultiplier] = Field(
        default_factory=list, description="Learning-rate factors by parameter name; the first match wins."
    )
    stages: StagesConfig = Field(default_factory=StagesConfig, description="Training in stages.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Held-out scores.")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="Generated sample.")
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig, description="Extent of `limbeck run`.")

    @model_validator(mode="after")
    def _temperature_is_declared(self) -> "Recipe":
        if self.distils and self.loss.temperature not in self.temperatures:
            raise ValueError(
                f"loss.temperature is {self.loss.temperature} and teacher.temperatures declares "
                f"{list(self.temperatures)}; add it there, or use one of these"
            )
        return self

    @property
    def root(self) -> Path:
        """Folder of the run."""
        return self.output_dir or Path("outputs") / self.name

    @property
    def packed_dir(self) -> Path:
        """Folder of the packed rows."""
        return self.dataset.packed_dir or self.root / "data"

    @property
    def cache_dir(self) -> Path:
        """Folder of the teacher's cached targets."""
        return self.teacher.cache_dir or self.root / "cache"

    @property
    def student_dir(self) -> Path:
        """Folder of the student's checkpoints and final weights."""
        return self.training.output_dir or self.root / "student"

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The declared temperatures, ascending, always with 1."""
        return tuple(sorted({1.0, *(self.teacher.temperatures or [self.loss.temperature])}))

    @property
    def distils(self) -> bool:
        """True when a teacher takes part in the training."""
        return self.training.mode == "distill"
