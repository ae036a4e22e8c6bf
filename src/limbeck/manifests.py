"""What each kind of folder says of itself once it is complete: `manifest.json`, field by field.

docs/formats.md describes the folders.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from limbeck.folders import Manifest


class Record(BaseModel):
    """A part of a manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardRecord(Record):
    """One file of rows."""

    file: str
    rows: int
    sha256: str


class PackedShard(ShardRecord):
    """A Parquet file of packed rows."""

    tokens: int


class PackedSplit(Record):
    """The rows of one split."""

    rows: int
    tokens: int
    shards: list[PackedShard]


class TokenizerRecord(Record):
    """Whose ids the rows hold."""

    name: str
    hash: str
    vocab_size: int


class PackedManifest(Manifest):
    """Packed rows."""

    command: ClassVar[str] = "data pack"

    kind: str = "packed"
    held_out: str = "documents"
    documents: int
    max_length: int
    tokenizer: TokenizerRecord
    splits: dict[str, PackedSplit]


class CacheShard(ShardRecord):
    """An HDF5 file of coded targets."""

    bytes: int
    roundtrip_kl: float
    teacher_mass: float


class CacheSplit(Record):
    """The targets of one split, and the fingerprint of the rows they were made for."""

    rows: int
    packed: str
    shards: list[CacheShard]


class CacheManifest(Manifest):
    """A teacher's cached targets."""

    command: ClassVar[str] = "teacher cache"

    kind: str = "teacher_cache"
    teacher: dict[str, Any]
    tokenizer: str
    attention: str
    max_length: int
    codec: dict[str, Any]
    splits: dict[str, CacheSplit]
    positions: int
    bytes_per_position: float
    roundtrip_kl: float
    teacher_mass: float


class CompressedLayer(Record):
    """What became of one layer of a compressed model.

    Attributes:
        layer: its number in the model that was compressed.
        description: how its experts are held, or how many channels stay.
        error: ‖y − ŷ‖ / ‖y‖ of what the exchanged part gives for a sample of its inputs.
        before, after: weights of that part.
    """

    layer: int
    description: dict[str, Any]
    error: float
    before: int
    after: int

    @property
    def how(self) -> str:
        """The method and its number."""
        numbers = [str(value) for key, value in self.description.items() if key != "method"]
        return " ".join([str(self.description["method"]), *numbers])


class CompressedManifest(Manifest):
    """A compressed model."""

    command: ClassVar[str] = "compress"

    kind: str = "compressed"
    model: str
    layers: list[CompressedLayer]
    bytes: int
    weights: dict[str, str]


class StudentManifest(Manifest):
    """A trained student; `stages` are the names of the training's stages, where it has any."""

    command: ClassVar[str] = "train"

    kind: str = "student"
    steps: int
    best_step: int | None
    best_eval_loss: float | None
    parameters: int
    weights: dict[str, str]
    advice: str
    stages: list[str] | None = None


class CheckpointManifest(Manifest):
    """A checkpoint inside a student's folder: the checksum of every file."""

    command: ClassVar[str] = "train"

    kind: str = "checkpoint"
    step: int
    bytes: int
    files: dict[str, str]


class TokenizerManifest(Manifest):
    """A tokenizer that was trained."""

    kind: str = "tokenizer"
    hash: str


class EvaluationManifest(Manifest):
    """Held-out scores."""

    kind: str = "evaluation"


class SampleManifest(Manifest):
    """A generated sample."""

    kind: str = "sample"


class ExportManifest(Manifest):
    """Exported files."""

    kind: str = "export"
