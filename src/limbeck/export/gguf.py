"""GGUF files that stock llama.cpp runs: ternary weights as exactly the codes and scales of training.

The one idea: what a tensor becomes is planned first, from names and shapes alone, so that anything the format
can not hold is refused before a byte is written; then tensors are read, packed and written one at a time.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from limbeck.console import progress
from limbeck.errors import LimbeckError
from limbeck.export.architectures.base import Architecture, Target, architecture
from limbeck.export.blocks import BLOCK_TYPES, Array, BlockType, encode_blocks
from limbeck.export.disk import DiskTensors
from limbeck.export.source import ternary_settings
from limbeck.export.vocabulary import add_vocabulary
from limbeck.storage import commit_file, temporary_for
from limbeck.students.ternary import TernaryTensor, group_width, quantise

_FILE_TYPES = {"tq2_0": 37, "tq1_0": 36, "q2_0": 41, "q4_0": 2, "f16": 1}


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: from which runtime tensor, as which type, in which shape."""

    source: str
    target: Target
    kind: str
    shape: tuple[int, ...]


class Shapes(Protocol):
    """The tensors of a model by their runtime names: of a folder, or of a model without weights."""

    def names(self) -> Iterable[str]:
        """Runtime names, in a fixed order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""


@dataclass(frozen=True)
class GGUFLayout:
    """What a model becomes in GGUF, from its config and the names and shapes of its tensors alone.

    Attributes:
        config: its transformers config.
        ternary: what is ternary in it and how (`quantization_config`); empty for a dense model.
        kind: auto, tq2_0, tq1_0, q2_0, q4_0 or f16.
        embedding: q8_0 or f16.
        what: how a message calls it.
    """

    config: Any
    ternary: dict[str, Any]
    kind: str
    embedding: str
    what: str

    @cached_property
    def architecture(self) -> Architecture:
        """Its architecture in GGUF."""
        return architecture(self.config)

    def check(self, tensors: Shapes) -> str:
        """Find out whether the format can hold it, numbers and all; returns the type of the ternary weights."""
        arch, chosen = self.architecture, self.choose(tensors)
        self.plan(tensors, chosen)
        arch.add_numbers(_Nowhere())
        return chosen

    def choose(self, tensors: Shapes) -> str:
        """The type of the ternary weights."""
        names = self.ternary.get("weights", [])
        if not names:
            if self.kind not in ("auto", "f16"):
                raise LimbeckError(
                    f"{self.what} has no ternary weights and --type is {self.kind}. Train it with student.ternary, "
                    "or export it with --type f16."
                )
            return "f16"
        if self.kind == "f16":
            return "f16"
        wanted = ["tq2_0", "q2_0", "q4_0"] if self.kind == "auto" else [self.kind]
        reasons: dict[str, str] = {}
        for kind in wanted:
            for name in names:
                columns = tensors.shape(name)[-1]
                reason = BLOCK_TYPES[kind].fits(columns, group_width(columns, self.ternary["group_size"]))
                if reason is not None:
                    reasons[kind] = f"{name}: {reason}"
                    break
            else:
                return kind
        raise LimbeckError(
            "no type holds every ternary weight exactly: "
            + "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
            + ". Choose another --type, or train with a student.ternary.group_size and widths that divide."
        )

    def plan(self, tensors: Shapes, chosen: str) -> list[Planned]:
        """Every tensor of the file, in order, with ternary weights of the chosen type."""
        ternary = set(self.ternary.get("weights", []))
        planned = []
        for name in tensors.names():
            shape = tensors.shape(name)
            for target in self.architecture.targets(name):
                probe = torch.empty(shape, device="meta")
                final = tuple((target.change or target.rows)(probe).shape)
                planned.append(Planned(name, target, self._type(name, final, name in ternary, chosen), final))
        return planned

    def _type(self, name: str, shape: tuple[int, ...], ternary: bool, chosen: str) -> str:
        if ternary:
            return chosen
        if "embed_tokens" in name or name.startswith("lm_head"):
            return self.embedding if shape[-1] % 32 == 0 else "f16"
        return "f32" if self.architecture.stays_float32(name, shape) else "f16"


class _Nowhere:
    """A writer that writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@dataclass(frozen=True)
class GGUFExport:
    """A model folder on its way to GGUF.

    Args:
        folder: a model with config, weights and tokenizer.
        name: what the file says it is (`general.name`); default the folder's.
        kind: auto, tq2_0, tq1_0, q2_0, q4_0 or f16; `auto` is the smallest that holds every group exactly.
        embedding: q8_0 or f16, for the embedding and the head.

    Raises:
        LimbeckError: the architecture, the tokenizer or a tensor can not be expressed; says which and why.
    """

    folder: Path
    kind: str = "auto"
    embedding: str = "q8_0"
    name: str | None = None

    @cached_property
    def config(self) -> Any:
        """The model's transformers config."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder)

    @cached_property
    def ternary(self) -> dict[str, Any]:
        """What the folder says of its ternary weights; empty for a dense model."""
        return ternary_settings(self.folder)

    @cached_property
    def layout(self) -> GGUFLayout:
        """What becomes of its tensors."""
        return GGUFLayout(self.config, self.ternary, self.kind, self.embedding, str(self.folder))

    def quantised(self, name: str, tensors: DiskTensors) -> TernaryTensor:
        """Codes and scales of a ternary weight, as its training used them."""
        return quantise(tensors.get(name), self.ternary["group_size"], self.ternary["scale"])

    def part(self, planned: Planned, tensors: DiskTensors) -> TernaryTensor | torch.Tensor:
        """What a planned tensor holds: codes and scales, or values in float32."""
        target = planned.target
        if planned.kind in BLOCK_TYPES:
            whole = self.quantised(planned.source, tensors)
            return TernaryTensor(target.rows(whole.codes), target.rows(whole.scales))
        if planned.source in self.ternary.get("weights", []):
            weight = self.quantised(planned.source, tensors).dequantise()
        else:
            weight = tensors.get(planned.source).float()
        return target.change(weight) if target.change else target.rows(weight)

    def write(self, path: Path) -> dict[str, Any]:
        """Write the file, whole or not at all; returns its type and bytes."""
        import gguf

        tensors = DiskTensors(self.folder)
        arch, chosen = self.layout.architecture, self.layout.choose(tensors)
        planned = self.layout.plan(tensors, chosen)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary_for(path, own=True)
        writer = gguf.GGUFWriter(partial, arch.name)
        try:
            writer.add_file_type(_FILE_TYPES[chosen])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            if self.ternary.get("activation_bits") is not None:  # how limbeck's engine is to round them
                writer.add_bool("limbeck.activations_per_token", True)
            arch.add_numbers(writer)
            add_vocabulary(writer, self.folder, self.config.vocab_size, self.name or self.folder.resolve().name)
            for entry in planned:
                raw, size = _storage(entry.kind, entry.shape)
                number: Any = raw  # q2_0 is newer than the package's list of types
                writer.add_tensor_info(entry.target.name, entry.shape, np.dtype(np.float32), size, raw_dtype=number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress("writing tensors", len(planned)) as bar:
                for entry in planned:
                    writer.write_tensor_data(stored(self.part(entry, tensors), entry.kind))
                    bar.advance()
            writer.close()
            commit_file(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk fails here again
                writer.close()
            partial.unlink(missing_ok=True)
            raise
        return {"type": chosen, "bytes": path.stat().st_size, "tensors": len(planned)}


def _storage(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """GGUF's number of a type, and the bytes of a tensor."""
    count = int(np.prod(shape))
    if kind in BLOCK_TYPES:
        block: BlockType = BLOCK_TYPES[kind]
        return block.number, count // block.columns * block.bytes
    return {"f32": (0, 4 * count), "f16": (1, 2 * count), "q8_0": (8, count // 32 * 34)}[kind]


def stored(part: TernaryTensor | torch.Tensor, kind: str) -> Array:
    """A tensor's bytes as they go into the file: blocks of codes and scales, or f32, f16 and q8_0 values."""
    if isinstance(part, TernaryTensor):
        return encode_blocks(part, BLOCK_TYPES[kind])
    array: Array = part.contiguous().numpy()
    if kind == "q8_0":
        from gguf import GGMLQuantizationType, quants

        return quants.quantize(array, GGMLQuantizationType.Q8_0)
    return array.astype(np.float16 if kind == "f16" else np.float32)
