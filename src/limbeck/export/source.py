"""What is exported: the folder of a finished student, found from whatever folder of its run is named.

The one idea: transformers itself loads the model, so names are its runtime names whatever the file's were, and
codes and scales come from the shadow weights exactly as in training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.errors import LimbeckError
from limbeck.models import load_causal_lm
from limbeck.registration import METHOD
from limbeck.registry import ARCHITECTURES
from limbeck.storage import read_json
from limbeck.students.ternary import TernaryTensor, as_matrix, quantise


def model_folder(path: Path) -> Path:
    """The model that a run's folder, a student's folder or a model's folder means.

    Raises:
        LimbeckError: there is no finished model there.
    """
    for folder in (path, path / "final", path / "student" / "final"):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    raise LimbeckError(
        f"{path} holds no finished model (no config.json with .safetensors in it, in final/ or in student/final/). "
        "Name a run's folder, its student/, or a model's folder; train it first with `limbeck train`."
    )


def has_gguf(folder: Path) -> bool:
    """True when the architecture of a finished model's folder has a GGUF form."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") in ARCHITECTURES


def ternary_settings(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a ternary student's folder; empty for a dense model.

    Raises:
        LimbeckError: its weights are packed already.
    """
    settings: dict[str, Any] = read_json(folder / "config.json").get("quantization_config") or {}
    if settings.get("quant_method") != METHOD:
        return {}
    if settings.get("format") == "packed":
        raise LimbeckError(f"{folder} is packed already; export from the training run's final/.")
    return settings


@dataclass(frozen=True)
class ExportSource:
    """A model on disk, with what is ternary in it.

    Attributes:
        folder: where it lies.
        model: loaded, in float32 on the CPU.
        ternary: names of its ternary weights; none for a dense model.
    """

    folder: Path
    model: Any
    ternary: frozenset[str]

    @classmethod
    def open(cls, path: Path) -> "ExportSource":
        """Load the model of a run.

        Raises:
            LimbeckError: there is none, or it is packed already.
        """
        folder = model_folder(path)
        named = ternary_settings(folder).get("weights", [])
        return cls(folder, load_causal_lm(str(folder), dtype="float32").eval(), frozenset(named))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and persistent buffer once, by its runtime name."""
        yield from self.model.state_dict().items()

    def quantised(self, name: str, weight: torch.Tensor) -> TernaryTensor:
        """Codes and scales of a ternary weight `[..., R, C]`: those of its training, never re-derived from s·code."""
        state = self.model.ternary_state
        return quantise(as_matrix(self._owner(name), weight), state.group_size, state.scale)

    def plain(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as it is in use, in the shape in which the model stores it: s·code of a ternary weight."""
        if name not in self.ternary:
            return tensor
        return as_matrix(self._owner(name), self.quantised(name, tensor).dequantise())

    def _owner(self, name: str) -> torch.nn.Module:
        module: torch.nn.Module = self.model.get_submodule(name.rpartition(".")[0])
        return module
