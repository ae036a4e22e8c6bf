"""The recipe: every section together, and what one section means for another."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, PrivateAttr, ValidationError, field_validator, model_validator

from limbeck.config.base import OR_WORDS, ModelSource, Positive, Section, Seed, merged
from limbeck.config.compress import CompressConfig
from limbeck.config.data import DatasetConfig, TokenizerConfig
from limbeck.config.engine import BenchConfig, EngineConfig, ServerConfig
from limbeck.config.moved import rewritten
from limbeck.config.student import StudentConfig
from limbeck.config.teacher import EnvironmentName, TeacherConfig
from limbeck.config.training import (
    LossConfig,
    LRMultiplier,
    OptimizerConfig,
    PhaseConfig,
    SaddleConfig,
    StagesConfig,
    TrackingConfig,
    TrainingConfig,
)
from limbeck.errors import ConfigError
from limbeck.registry import SUITES, Choice, OneOf


class EvaluationConfig(Section):
    """What is measured on the held-out rows once training is done."""

    max_rows: PositiveInt | None = Field(None, description="Held-out rows scored; default all.")
    batch_size: PositiveInt = Field(8, description="Rows in one batch.")
    suites: list[Annotated[Choice, OneOf(SUITES, default="fidelity")]] = Field(
        [Choice(name="fidelity")], description="What is measured: names, or {name: NAME, parameter: value}."
    )
    model: Path | None = Field(None, description="Folder of the model `limbeck eval` scores; default the student.")


class GenerationConfig(Section):
    """The sample that shows what the student writes."""

    prompt: str = Field("def ", description="Text to continue.")
    max_new_tokens: PositiveInt = Field(96, description="Tokens to write.")
    temperature: Annotated[float, Field(ge=0.0)] = Field(0.7, description="0 takes the likeliest token.")
    top_k: Annotated[int, Field(ge=0)] = Field(40, description="Sample among this many; 0: all.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Sample among the fewest tokens whose probabilities add up to this."
    )
    seed: Seed = Field(0, description="Seed of the sampling.")
    model: Path | None = Field(None, description="Folder of the model `limbeck generate` runs; default the student.")


class ExportConfig(Section):
    """What `limbeck export` writes, and from what."""

    input: Path | None = Field(None, description="A run's folder, a student's or a model's; default the recipe's run.")
    output: Path | None = Field(None, description="File (gguf) or folder (packed, hf); default INPUT/export/.")
    format: Literal["gguf", "packed", "hf"] = Field(
        "gguf",
        description="`gguf` for llama.cpp; `packed` for transformers with limbeck; `hf`: plain weights for whatever "
        "loads transformers models.",
    )
    type: Literal["auto", "tq2_0", "tq1_0", "q2_0", "q4_0", "f16"] = Field(
        "auto", description="GGUF type of ternary weights; `auto`: the smallest that holds their groups exactly."
    )
    embedding: Literal["q8_0", "f16"] = Field("q8_0", description="GGUF type of embedding and head.")
    rest: Literal["bf16", "f16", "f32", "fp8"] = Field(
        "bf16",
        description="Precision of what is not ternary in `packed` (fp8: matrices E4M3, vectors bf16), of all in `hf`.",
    )
    group_size: PositiveInt | None = Field(
        None, description="Checked against the student's: groups are chosen in training, not in export."
    )
    verify_tokens: PositiveInt = Field(1000, description="Held-out tokens that --verify runs through llama.cpp.")


class TeacherServerConfig(Section):
    """`limbeck teacher serve`: where it listens, and what it takes in at most."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port; 0 takes a free one and says which.")
    quantization: Literal["fp8"] | None = Field(
        None, description="`fp8`: hold matrices as float8 with a scale a row; half of bfloat16's memory."
    )
    adapter: Path | None = Field(None, description="Folder of a LoRA adapter (peft) merged into the model.")
    api_key_env: EnvironmentName | None = Field(
        None, description="Environment variable with the key that callers must send; default no key."
    )
    max_sequences: PositiveInt = Field(128, description="Sequences in one request.")
    max_tokens: PositiveInt = Field(32768, description="Tokens in one request.")
    max_top_k: PositiveInt = Field(1024, description="Largest K of a request.")
    max_queue_tokens: PositiveInt = Field(262144, description="Tokens waiting before new requests are sent away.")
    max_body_mb: Positive = Field(4.0, description="Size of a request's body.")
    max_reply_mb: Positive = Field(256.0, description="Size of a reply.")
    max_replies_mb: Positive = Field(
        1024.0, description="Size of all replies that are being read; more are sent away for a while."
    )
    max_connections: PositiveInt = Field(
        512, description="Connections at once; for one more, the one longest without a request is closed."
    )


class PipelineConfig(Section):
    """What `limbeck run` does beside the stages that the recipe's sections ask for."""

    ce_baseline: bool = Field(False, description="Also train the same student with CE alone, for comparison.")
    generate: bool = Field(False, description="End with a generated sample.")
    export: Annotated[list[Literal["packed", "gguf", "hf"]], OR_WORDS] = Field(
        default_factory=list, description="Formats to export the student to, with `export.type` and the like."
    )


class Recipe(Section):
    """One whole run: data, teacher, student, losses, training, evaluation."""

    name: str = Field("run", description="Name of the run: letters, digits, `_`, `-` and dots.")
    output_dir: Path | None = Field(None, description="Folder of the run; default outputs/NAME.")
    seed: Seed = Field(0, description="Seed of initialisation and data order.")
    plugins: Annotated[list[str], OR_WORDS] = Field(
        default_factory=list,
        description="Python files or modules that add parts of your own (divergences, objectives, stages …); they are "
        "imported, so that their code runs.",
    )
    dataset: DatasetConfig = Field(default_factory=DatasetConfig, description="Text and packing.")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="Tokenizer.")
    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="Teacher and its targets.")
    student: StudentConfig = Field(default_factory=StudentConfig, description="Student model.")
    compress: CompressConfig | None = Field(
        None, description="Compress the teacher, or another model, into the student's first weights; default none."
    )
    loss: LossConfig = Field(default_factory=LossConfig, description="Loss.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Training loop.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Trackers.")
    saddle: SaddleConfig = Field(default_factory=SaddleConfig, description="Saddle interventions.")
    parameter_lr_multipliers: list[LRMultiplier] = Field(
        default_factory=list, description="Learning-rate factors by parameter name; the first match wins."
    )
    stages: StagesConfig = Field(default_factory=StagesConfig, description="Training in stages.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Held-out scores.")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="Generated sample.")
    export: ExportConfig = Field(default_factory=ExportConfig, description="Export.")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="How GGUF files are run.")
    server: ServerConfig = Field(default_factory=ServerConfig, description="`limbeck serve`.")
    bench: BenchConfig = Field(default_factory=BenchConfig, description="`limbeck bench`.")
    teacher_server: TeacherServerConfig = Field(
        default_factory=TeacherServerConfig, description="`limbeck teacher serve`."
    )
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig, description="Extent of `limbeck run`.")
    tiny: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys that `--tiny` lays over the recipe: the same run on a laptop.",
    )

    _suffix: str = PrivateAttr("")  # of the data and cache folders of a stage with a dataset of its own

    @field_validator("name")
    @classmethod
    def _a_folders_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w-][\w.-]*", value):
            raise ValueError("a run's name has letters, digits, `_`, `-` and dots, and begins with no dot")
        return value

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, tree: Any) -> Any:
        return rewritten(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _temperatures_are_declared(self) -> "Recipe":
        if self.stages.enabled or not self.distils:
            return self
        missing = self.loss.undeclared(self.temperatures)
        if missing is not None:
            raise ValueError(
                f"loss.{missing[0]} is {missing[1]} and teacher.temperatures declares {list(self.temperatures)}; "
                "add it there, or use one of these"
            )
        return self

    @model_validator(mode="after")
    def _stages_resume_by_themselves(self) -> "Recipe":
        for key in ("max_steps", "num_train_epochs"):
            if self.stages.enabled and key in self.training.model_fields_set:
                raise ValueError(
                    f"training.{key} is {getattr(self.training, key)} and stages.enabled is true; a run is as long "
                    "as its stages. Set max_steps or num_epochs of each, or stages.enabled: false"
                )
        if self.stages.enabled and self.training.resume_from is not None:
            raise ValueError(
                f"training.resume_from is {self.training.resume_from} and stages.enabled is true; stages continue by "
                "themselves where they were. To start the first one from weights, set student.model"
            )
        return self

    @model_validator(mode="after")
    def _student_is_compressed(self) -> "Recipe":
        if self.compress is None:
            return self
        student, made = self.student, str(self.compress_dir)
        if student.model not in (None, made):
            raise ValueError(
                f"student.model is {student.model} and compress makes the student's weights in {made}; leave one of "
                "the two out"
            )
        if student.preset is not None or student.builder is not None:
            raise ValueError("compress makes the student's weights, so leave student.preset and student.builder out")
        if student.model is None:  # it follows from the run's folder, and is not the user's word
            self.student = student.model_copy(update={"model": made})
            self.student.model_fields_set.discard("model")
        return self

    @property
    def compress_dir(self) -> Path:
        """Folder of the compressed model that the student starts from."""
        named = None if self.compress is None else self.compress.output_dir
        return named or self.root / "checkpoint-0"

    @property
    def compress_source(self) -> ModelSource:
        """The model that is compressed.

        Raises:
            ConfigError: none is named.
        """
        named = None if self.compress is None else self.compress.model
        found = self.teacher.source if named is None else ModelSource(named)
        if found is None:
            raise ConfigError("nothing to compress: set teacher.model or compress.model.")
        return found

    @property
    def root(self) -> Path:
        """Folder of the run."""
        return self.output_dir or Path("outputs") / self.name

    @property
    def packed_dir(self) -> Path:
        """Folder of the packed rows."""
        return self.dataset.packed_dir or self.root / f"data{self._suffix}"

    @property
    def cache_dir(self) -> Path:
        """Folder of the teacher's cached targets."""
        return self.teacher.cache.dir or self.root / f"cache{self._suffix}"

    @property
    def student_dir(self) -> Path:
        """Folder of the student's checkpoints and final weights."""
        return self.training.output_dir or self.root / "student"

    @property
    def tokenizer_source(self) -> ModelSource:
        """The tokenizer: the one that this run trains, the one that is named, the teacher's or the student's.

        Raises:
            ConfigError: none is named.
        """
        own = self.tokenizer
        if own.train_vocab_size is not None:
            return ModelSource(str(self.root / "tokenizer"))
        named = None if own.name is None else ModelSource(own.name, own.revision)
        compressed = None if self.compress is None else self.compress_source
        found = named or self.teacher.source or compressed or self.student.source
        if found is not None:
            return found
        if self.teacher.is_remote or self.teacher.cache.dir is not None:
            raise ConfigError("no tokenizer: name the teacher's own, `--tokenizer FOLDER_OR_HUB_ID`.")
        raise ConfigError(
            "no tokenizer: tokenizer.name, tokenizer.train_vocab_size, teacher.model and student.model are all unset. "
            "Set one of them."
        )

    @property
    def data_name(self) -> str:
        """`""`, or `:NAME` when the data are those of stage NAME."""
        return self._suffix.replace("-", ":", 1)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate of hidden matrices."""
        return self.training.learning_rate or self.optimizer.default_learning_rate

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The declared temperatures, ascending, always with 1: the teacher's, or all that the stages want."""
        declared = self.teacher.temperatures
        if declared is None:
            stages = self.stages.configs if self.stages.enabled else []
            losses = [self.loss, *(loss for stage in stages if (loss := self._stage_loss(stage)) is not None)]
            declared = [value for loss in losses for value in loss.wanted_temperatures]
        return tuple(sorted({1.0, *declared}))

    @property
    def distils(self) -> bool:
        """True when a teacher takes part in the training."""
        if self.stages.enabled:
            return any(stage.training.get("mode", self.training.mode) == "distill" for stage in self.stages.configs)
        return self.training.mode == "distill"

    def _stage_loss(self, stage: PhaseConfig) -> LossConfig | None:
        """The loss of a stage; None when its keys are wrong, which `stage_recipe` reports by name."""
        try:
            tree = rewritten({"loss": merged(self.loss.model_dump(exclude_unset=True), stage.loss)}, override=True)
            return LossConfig.model_validate(tree["loss"])
        except ValidationError:
            return None

    def stage_recipes(self) -> Iterator[tuple[PhaseConfig, "Recipe"]]:
        """Each stage with the whole recipe that it means.

        Raises:
            pydantic.ValidationError: a stage's keys are wrong.
        """
        folders = {self.dataset.model_dump_json(): ""}
        for stage in self.stages.configs:
            recipe = self.stage_recipe(stage)
            recipe._suffix = folders.setdefault(recipe.dataset.model_dump_json(), f"-{stage.stage_name}")
            if recipe._suffix:
                recipe.teacher.cache.dir = None  # the named folder is for the recipe's own rows
            if recipe.student.ternary is not None and stage is not self.stages.configs[0]:
                recipe.student.ternary.warmup_steps = 0  # the first stage has made the weights ternary
            yield stage, recipe

    def training_recipes(self) -> list["Recipe"]:
        """What is trained, one after the other: the recipes of its stages, or the recipe itself."""
        return [own for _, own in self.stage_recipes()] if self.stages.enabled else [self]

    def stage_recipe(self, stage: PhaseConfig) -> "Recipe":
        """The whole recipe of a stage, but for the folders of its own data.

        Raises:
            pydantic.ValidationError: the stage's keys are wrong.
            ConfigError: it wants another temperature than the one at which targets are sampled.
        """
        own = Recipe.model_validate(self._stage_tree(stage))
        wanted, sampled = own.loss.end("temperature"), self.loss.end("temperature")
        if self.teacher.sampling is not None and own.distils and wanted != sampled:
            raise ConfigError(
                f"stage {stage.stage_name} has loss.temperature {wanted} and teacher.sampling draws at {sampled}. "
                "Give every stage the same temperature, or use teacher.top_k."
            )
        return own

    def _stage_tree(self, stage: PhaseConfig) -> dict[str, Any]:
        tree = self.model_dump(exclude_unset=True)
        for section in ("training", "optimizer", "loss", "dataset"):
            tree[section] = merged(tree.get(section, {}), getattr(stage, section), section)
        if stage.dataset and "packed_dir" not in stage.dataset:
            tree["dataset"]["packed_dir"] = None
        length = {"max_steps": stage.max_steps} if stage.max_steps else {"num_train_epochs": stage.num_epochs}
        tree["training"] = {**tree["training"], "max_steps": -1, **length}
        tree["training"]["output_dir"] = self.student_dir / stage.stage_name
        teacher = self.teacher
        if teacher.temperatures is not None or teacher.model is not None or teacher.is_remote:
            tree["teacher"] = {**tree.get("teacher", {}), "temperatures": list(self.temperatures)}
        tree["output_dir"] = self.root
        tree.pop("stages", None)
        if stage.parameter_lr_multipliers is not None:
            tree["parameter_lr_multipliers"] = [rule.model_dump() for rule in stage.parameter_lr_multipliers]
        return rewritten(tree, override=True)

    def without_teacher(self) -> "Recipe":
        """The same recipe trained with cross-entropy alone, in every stage."""
        stages = [
            stage.model_copy(update={"training": {**stage.training, "mode": "ce"}}) for stage in self.stages.configs
        ]
        changes = {
            "training": self.training.model_copy(update={"mode": "ce"}),
            "stages": self.stages.model_copy(update={"configs": stages}),
        }
        return self.model_copy(update=changes)
