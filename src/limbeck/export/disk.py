"""A model folder's tensors, one at a time, under the names that a running model gives them.

The one idea: files may hold an expert's matrices apart and a running model holds them fused; asking for the
fused name reads and stacks just those.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from limbeck.errors import CorruptError

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


class DiskTensors:
    """Read-only view of a folder's safetensors."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
        if index is not None:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: folder / Path(file).name for name, file in names.items()}
        else:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as tensors:
                    self._files.update(dict.fromkeys(tensors.keys(), path))
        self._experts: dict[str, int] = {}
        for name in self._files:
            match = _EXPERT.match(name)
            if match:
                self._experts[match[1]] = max(self._experts.get(match[1], 0), int(match[2]) + 1)

    def names(self) -> Iterator[str]:
        """Runtime names, in a fixed order."""
        yield from sorted(name for name in self._files if not _EXPERT.match(name))
        for prefix in sorted(self._experts):
            yield f"{prefix}.gate_up_proj"
            yield f"{prefix}.down_proj"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a runtime tensor, without reading it."""
        prefix, _, leaf = name.rpartition(".")
        if name in self._files:
            with safe_open(self._files[name], framework="pt") as tensors:
                return tuple(tensors.get_slice(name).get_shape())
        count = self._experts[prefix]
        first = "gate_proj" if leaf == "gate_up_proj" else leaf
        rows, columns = self.shape(f"{prefix}.0.{first}.weight")
        return (count, 2 * rows if leaf == "gate_up_proj" else rows, columns)

    def get(self, name: str) -> torch.Tensor:
        """A runtime tensor.

        Raises:
            CorruptError: the folder does not hold it.
        """
        if name in self._files:
            with safe_open(self._files[name], framework="pt") as tensors:
                found: torch.Tensor = tensors.get_tensor(name)
                return found
        prefix, _, leaf = name.rpartition(".")
        if prefix not in self._experts:
            raise CorruptError(f"{name} is in none of the model's .safetensors files.")
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        each = [
            torch.cat([self.get(f"{prefix}.{expert}.{part}.weight") for part in parts])
            for expert in range(self._experts[prefix])
        ]
        return torch.stack(each)
