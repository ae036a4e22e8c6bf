"""Experts that do not fit: their weights, gradients and optimizer state in memory-mapped files or in the CPU's memory.

The one idea: the routed experts' fused tensors are most of a mixture, and only one layer's are in use at a time. They
stay where there is room, as ordinary CPU tensors (mapped from files for `disk`, so that the system keeps in memory what
is in use); a layer's forward moves its own to the device, and with gradient checkpointing its backward does so again.
Gradients go back where the weights are, and the optimizer works there, one tensor after another. Nothing else of the
training knows.

    OFFLOAD_DIR/limbeck-offload-PID/NAME.weight  NAME.grad  NAME.exp_avg …     while it trains; checkpoints hold all

Shapes: E experts; all tensors are those of the model.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.compression.reader import CheckpointReader
from limbeck.config import StudentConfig
from limbeck.console import say
from limbeck.errors import ConfigError
from limbeck.models import choose_device, model_config, resolve_model
from limbeck.optim.state import STATE_HOME
from limbeck.registration import METHOD
from limbeck.students.build import build_student, finish_student, require_vocabulary
from limbeck.students.quantizer import TernaryQuantizationConfig
from limbeck.students.ternary import apply_ternary, use_own_experts

Tensor = torch.Tensor
_OWN = "limbeck-offload-"  # and the number of the process
_SHARD = "2GB"  # of a checkpoint, so that writing one holds no more


def expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The fused tensors of the routed experts, by name."""
    return {
        f"{prefix}.{leaf}": parameter
        for prefix, module in model.named_modules()
        if hasattr(module, "is_transposed") and not getattr(module, "is_low_rank", False)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


class ExpertOffload:
    """Where a model's experts live while it is trained.

    Args:
        kind: cpu or disk.
        folder: for the files of `disk`, which lie in a folder of this process's own inside it.
        device: that everything else is on.
    """

    def __init__(self, kind: str, folder: Path, device: str | None = None) -> None:
        self.kind = kind
        self.device = torch.device(choose_device(device))
        self._gradients: dict[str, Tensor] = {}
        self._names: set[str] = set()
        if kind == "disk":
            folder.mkdir(parents=True, exist_ok=True)
            _remove_those_of_the_dead(folder)
            self.folder = folder / f"{_OWN}{os.getpid()}"
            self.folder.mkdir()

    def empty(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the same shape in float32, all zeros on disk, for whatever `name` calls it."""
        if self.kind == "cpu":
            return torch.zeros(like.shape, dtype=torch.float32)
        path = self.folder / name
        return torch.from_file(str(path), shared=True, size=like.numel(), dtype=torch.float32).reshape(like.shape)

    def build(self, section: StudentConfig, keys: dict[str, int], seed: int) -> Any:
        """The student with its experts at home; pretrained weights are read layer by layer.

        Raises:
            ConfigError: as `build_student`, or the student has no fused experts.
        """
        if section.source is None:
            model = build_student(section, keys, seed)
            for name, parameter in expert_tensors(model).items():
                parameter.data = self.empty(f"{name}.weight", parameter).copy_(parameter.detach())
        else:
            model = self._of_weights(section, keys)
        held = expert_tensors(model)
        if not held:
            raise ConfigError(
                f"training.offload_experts is {self.kind} and {type(model).__name__} has no fused routed experts to "
                "keep elsewhere. Leave it out."
            )
        for name, parameter in held.items():
            self._names.add(name)
            setattr(parameter, STATE_HOME, self._home_of(name))
            if self.kind == "disk":
                parameter.register_post_accumulate_grad_hook(self._keeper(name))  # type: ignore[no-untyped-call]
        use_own_experts(model)
        self._place(model)
        count = sum(parameter.numel() for parameter in held.values())
        where = f"in {self.folder}" if self.kind == "disk" else "in the CPU's memory"
        say(f"experts: {count:,} weights in float32 {where}, with their gradients and optimizer state")
        return model

    def _of_weights(self, section: StudentConfig, keys: dict[str, int]) -> Any:
        """Pretrained weights, never more than a layer's twice in memory."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        from limbeck.compression.plan import fetched_folder

        assert section.source is not None
        config = model_config(section.source, "student")
        for key, value in section.config.items():
            setattr(config, key, value)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        require_vocabulary(section, model, keys["vocab_size"])
        folder = fetched_folder(Path(resolve_model(section.source.name)), section.source.name, section.revision)
        self.fill(model, folder)
        held = getattr(config, "quantization_config", None)
        if held is not None:
            _make_as_saved(model, held, section.source.name)
        finish_student(model, section)
        return model

    @torch.no_grad()
    def fill(self, model: Any, folder: Path) -> None:
        """Give a model the weights of a folder, layer by layer; experts where they are, or at home.

        Raises:
            LimbeckError: the folder lacks a tensor, or has one of another shape.
        """
        reader = CheckpointReader(folder)
        for number, layer in enumerate(model.model.layers):
            reader.fill(layer, number, self._placer(f"model.layers.{number}."))
        tied = {name for name in model.all_tied_weights_keys if model.config.tie_word_embeddings}
        for name, parameter in list(model.named_parameters()):
            if ".layers." in name or name in tied:
                continue
            held = reader.tensor(name)
            owner, _, leaf = name.rpartition(".")
            if parameter.device.type == "meta":
                setattr(model.get_submodule(owner), leaf, nn.Parameter(held.float().clone()))
            else:
                parameter.copy_(held)
        model.tie_weights()

    def _placer(self, prefix: str) -> Callable[[str, nn.Parameter], Tensor]:
        def place(name: str, parameter: nn.Parameter) -> Tensor:
            if parameter.device.type != "meta":
                return parameter.data
            if parameter.ndim == 3 and name.rpartition(".")[0].endswith("experts"):
                return self.empty(f"{prefix}{name}.weight", parameter)
            return torch.empty(parameter.shape, dtype=torch.float32)

        return place

    def _place(self, model: Any) -> None:
        """Everything but the experts to the device, and tell whoever would move the rest that this is meant."""
        model.save_pretrained = _in_shards(model.save_pretrained)
        if self.device.type == "cpu":
            return
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in self._names:
                tensor.data = tensor.data.to(self.device)
        # transformers and accelerate leave a model where it is when it says that it is spread over devices.
        model.hf_device_map = {"": str(self.device), "experts": "cpu"}

    def _home_of(self, name: str) -> Callable[[str, Tensor], Tensor]:
        return lambda key, like: self.empty(f"{name}.{key}", like)

    def _keeper(self, name: str) -> Callable[[Tensor], None]:
        """After a gradient has been added up: keep it in its file, where later micro-batches add to it."""

        def keep(parameter: Tensor) -> None:
            store = self._gradients.get(name)
            if store is None:
                store = self._gradients[name] = self.empty(f"{name}.grad", parameter)
            if parameter.grad is not None and parameter.grad is not store:
                store.copy_(parameter.grad)
                parameter.grad = store

        return keep

    def adopt_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring an optimizer's state that was loaded for the experts to where they are."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                home = getattr(parameter, STATE_HOME, None)
                state = optimizer.state.get(parameter, {}) if home is not None else {}
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[key] = home(key, parameter).copy_(value)  # type: ignore[misc]

    def loading(self) -> AbstractContextManager[None]:
        """While it lasts, torch.load maps files instead of reading them."""
        config: Any = torch.utils.serialization.config
        found: AbstractContextManager[None] = config.patch("load.mmap", True)
        return found

    def close(self) -> None:
        """Remove the files, and their place where nothing else is in it."""
        if self.kind == "disk":
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()


def _remove_those_of_the_dead(place: Path) -> None:
    """Files that a killed process left; they hold nothing that a checkpoint does not."""
    import psutil

    for folder in place.glob(f"{_OWN}*"):
        owner = folder.name.removeprefix(_OWN)
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _make_as_saved(model: Any, held: Any, name: str) -> None:
    """Weights that were ternary in use when they were saved are so again."""
    settings = TernaryQuantizationConfig.from_dict(held if isinstance(held, dict) else held.to_dict())
    if settings.quant_method != METHOD or settings.format != "shadow":
        raise ConfigError(
            f"training.offload_experts reads weights as they are, and those of {name} are quantised. Start from a "
            "checkpoint of its training."
        )
    apply_ternary(model, settings.weights, settings.state)


def _in_shards(save: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        return save(*args, **{"max_shard_size": _SHARD, **kwargs})

    return save_pretrained
