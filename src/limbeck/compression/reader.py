"""A checkpoint read one layer at a time: what a model's config describes, and no more of it in memory than a layer.

The one idea: a model of a single layer of the same architecture is transformers' own code, with its masks and
rotations; each layer of the checkpoint gives it its tensors in turn, straight from the mapped file.

Shapes: B rows, T positions, H hidden width.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.errors import LimbeckError
from limbeck.models import is_constant
from limbeck.storage import inside, read_json

Tensor = torch.Tensor
_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.(.+)$")
#: One expert's matrix on disk, under any of its names.
_EXPERT = re.compile(r"^mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight$")
#: Lists of a config that have an entry for each layer.
PER_LAYER = ("layer_types", "no_rope_layers")
_PROJECTION = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class CheckpointReader:
    """The tensors of a folder of safetensors, by layer.

    Args:
        folder: with config.json and weights, in one file or with an index.

    Raises:
        LimbeckError: there are no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where = {name: file for name, file in _weight_map(folder).items() if not is_constant(name)}
        if not self._where:
            raise LimbeckError(f"{folder} holds no .safetensors weights. Convert the checkpoint to safetensors first.")
        self._layers: dict[int, dict[str, str]] = {}
        for name in self._where:
            found = _LAYER.match(name)
            if found is not None:
                rest = found[2].replace("block_sparse_moe.", "mlp.")  # Mixtral's name on disk
                self._layers.setdefault(int(found[1]), {})[rest] = name

    def outside(self) -> list[str]:
        """Names of the tensors that belong to no layer."""
        return [name for name in self._where if _LAYER.match(name) is None]

    def names(self, number: int) -> dict[str, str]:
        """A layer's tensors: name inside the layer -> name on disk."""
        return self._layers.get(number, {})

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file; a checkpoint of the body alone has it without `model.`.

        Raises:
            LimbeckError: it is not there, or its file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        stored = name if name in self._where else name.removeprefix("model.")
        if stored not in self._where:
            raise LimbeckError(f"{self.folder} has no tensor {name}. Get the whole checkpoint.")
        try:
            with safe_open(inside(self.folder, self._where[stored]), framework="pt") as file:
                found: Tensor = file.get_tensor(stored)
                return found
        except (OSError, SafetensorError) as error:
            raise LimbeckError(f"tensor {name} of {self.folder} cannot be read: {error}") from None

    @torch.no_grad()
    def fill(self, module: nn.Module, number: int, place: Callable[[str, nn.Parameter], Tensor] | None = None) -> None:
        """Give a layer of the architecture the weights of layer `number`.

        Args:
            module: the layer; its parameters are replaced.
            number: which.
            place: makes the tensor that a parameter of that name is copied into; default new ones in the precision of
                the file.

        Raises:
            LimbeckError: the checkpoint lacks a tensor of the layer, or has one that the layer has not.
        """
        held = dict(self.names(number))
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            target = None if place is None else place(name, parameter)
            if name in held:
                found = self.tensor(held.pop(name))
                if found.shape != parameter.shape:
                    raise LimbeckError(
                        f"tensor {name} of layer {number} of {self.folder} has shape {tuple(found.shape)} and its "
                        f"config means {tuple(parameter.shape)}."
                    )
                value = found.clone() if target is None else target.copy_(found)
            elif leaf in ("gate_up_proj", "down_proj") and parameter.ndim == 3:
                value = self._stacked(held, leaf, parameter, number, target)
            else:
                raise LimbeckError(f"{self.folder} has no tensor {name} of layer {number}. Get the whole checkpoint.")
            if parameter.device.type == "meta":
                made = nn.Parameter(value, requires_grad=place is not None)
                setattr(module.get_submodule(owner), leaf, made)
        for name, _ in module.named_buffers():
            held.pop(name, None)
        if held:
            raise LimbeckError(
                f"{self.folder} has tensors in layer {number} that {type(module).__name__} does not know: "
                f"{', '.join(sorted(held)[:3])}."
            )

    def _stacked(self, held: dict[str, str], leaf: str, like: nn.Parameter, number: int, made: Tensor | None) -> Tensor:
        """One fused tensor of the experts, filled expert by expert."""
        half = like.shape[1] // 2
        wanted = ("down_proj",) if leaf == "down_proj" else ("gate_proj", "up_proj")
        count = 0
        for name in list(held):
            found = _EXPERT.match(name)
            kind = None if found is None else _PROJECTION.get(found[2], found[2])
            if found is None or kind not in wanted:
                continue
            value = self.tensor(held.pop(name))
            made = torch.empty(like.shape, dtype=value.dtype) if made is None else made
            part = made[int(found[1])]
            if leaf == "gate_up_proj":
                part = part[:half] if kind == "gate_proj" else part[half:]
            if part.shape != value.shape:
                raise LimbeckError(
                    f"an expert's {kind} in layer {number} of {self.folder} has shape {tuple(value.shape)} and its "
                    f"config means {tuple(part.shape)}."
                )
            part.copy_(value)
            count += 1
        if made is None or count != like.shape[0] * len(wanted):
            raise LimbeckError(
                f"layer {number} of {self.folder} has {count} matrices for {leaf} and its config means "
                f"{like.shape[0] * len(wanted)}."
            )
        return made


def _weight_map(folder: Path) -> dict[str, str]:
    """Name of each tensor -> its file: by the index, of the file that transformers looks for, or of all there are."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        found = read_json(index)
        where = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(where, dict):
            raise LimbeckError(f"{index} has no weight_map. Get the whole checkpoint again.")
        return {str(name): str(file) for name, file in where.items()}
    one = [path for path in (folder / "model.safetensors", folder / "ternary.safetensors") if path.is_file()]
    files = one[:1] or sorted(folder.glob("*.safetensors"))
    return {name: path.name for path in files for name in _names(path)}


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise LimbeckError(f"{path} cannot be read: {error}") from None


def layer_config(config: Any, number: int, *, routed: bool) -> Any:
    """The config of a model that has layer `number` alone, and a vocabulary of a few ids."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = 1, 8, None
    for key in PER_LAYER:
        if getattr(small, key, None):
            setattr(small, key, [getattr(config, key)[number]])
    if hasattr(small, "mlp_only_layers"):
        small.mlp_only_layers, small.decoder_sparse_step = ([] if routed else [0]), 1
    return small


class LayerModel:
    """A model of one layer, filled with each layer of a checkpoint in turn.

    Args:
        reader: the checkpoint.
        config: its transformers config.
        number: the layer.
        dtype: to compute in.
    """

    def __init__(self, reader: CheckpointReader, config: Any, number: int, dtype: torch.dtype) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        routed = any(name.startswith("mlp.experts.") for name in reader.names(number))
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(layer_config(config, number, routed=routed), dtype=dtype)
        self.body: Any = model.model.eval()
        self.body.norm = self.body.embed_tokens = nn.Identity()
        self.layer: Any = self.body.layers[0]
        reader.fill(self.layer, number)
        self._stored = {name: parameter.dtype for name, parameter in self.layer.named_parameters()}
        self.layer.to(dtype)
        self.is_routed = routed

    def stored_dtype(self, name: str) -> torch.dtype:
        """The precision in the file of a tensor inside the layer, or of the experts that it stands for."""
        found: torch.dtype = self._stored.get(name) or self._stored["mlp.experts.down_proj"]
        return found

    @torch.no_grad()
    def __call__(self, hidden: Tensor, **inputs: Any) -> Tensor:
        """`[B, T, H]` through the layer; `inputs` as a model's forward has them, without `input_ids`."""
        with torch.autocast(hidden.device.type, enabled=False):
            result: Tensor = self.body(inputs_embeds=hidden, **inputs).last_hidden_state
        return result
