"""The model that is served, as the recipe describes it: precision, float8 weights, a LoRA adapter; and who it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrize

from limbeck.config import TeacherConfig
from limbeck.config.recipe import TeacherServerConfig
from limbeck.console import say
from limbeck.data.tokenizer import load_tokenizer
from limbeck.errors import ConfigError, LimbeckError
from limbeck.models import hidden_matrices, load_frozen, model_identity
from limbeck.storage import fingerprint, sha256_file_cached
from limbeck.students.quantizer import to_float8
from limbeck.teachers.local import LocalTeacher


@dataclass(frozen=True)
class Served:
    """A loaded teacher and what it tells of itself.

    Attributes:
        teacher: the model.
        name: as shown to callers: the last part of its path or hub id.
        fingerprint: hash of weights, adapter, quantisation and precision.
        tokenizer: hash of its tokenizer.
        attention: what of per_document and packed it can do.
        max_length: positions of one sequence.
    """

    teacher: LocalTeacher
    name: str
    fingerprint: str
    tokenizer: str
    attention: tuple[str, ...]
    max_length: int


def load_served(section: TeacherConfig, server: TeacherServerConfig, device: str | None = None) -> Served:
    """Load a teacher to be served.

    Args:
        section: the model and how it is run.
        server: its adapter, quantisation and limits.
        device: where the section names none.

    Raises:
        ConfigError: no model is named, or the adapter needs peft.
        LimbeckError: model, tokenizer or adapter cannot be loaded.
    """
    source = section.source
    if source is None:
        raise ConfigError("no model to serve: `limbeck teacher serve MODEL` (a folder, a hub id, or tiny-python).")
    tokenizer = load_tokenizer(*source)
    model = load_frozen(source, section.local.dtype, section.local.device or device)
    identity: dict[str, Any] = {**model_identity(source.name, source.revision), "dtype": str(model.dtype)}
    if server.adapter is not None:
        model = merge_adapter(model, server.adapter)
        identity["adapter"] = _adapter_identity(server.adapter)
    if server.quantization == "fp8":
        before = _bytes(model)
        hold_as_float8(model)
        identity["quantization"] = "fp8"
        say(f"weights as float8: {before / 1e9:.2f} GB -> {_bytes(model) / 1e9:.2f} GB")
    teacher = LocalTeacher(
        model,
        attention="packed",
        max_batch_tokens=section.local.max_batch_tokens,
        vocab_size=tokenizer.vocab_size,
    )
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None) or server.max_tokens
    return Served(
        teacher=teacher,
        name=Path(source.name).name,
        fingerprint=fingerprint(identity),
        tokenizer=tokenizer.hash,
        attention=("per_document", "packed") if teacher.keeps_documents_apart else ("packed",),
        max_length=min(int(length), server.max_tokens),
    )


def merge_adapter(model: Any, folder: Path) -> Any:
    """Merge a LoRA adapter (safetensors) into the model's weights.

    Raises:
        ConfigError: peft is not installed.
        LimbeckError: the folder is no adapter in safetensors, or does not fit the model.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise ConfigError("an adapter needs peft: `pip install 'limbeck[serve]'`.") from None
    absent = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if absent:
        raise LimbeckError(f"{folder} is no adapter in safetensors: {', '.join(absent)} is missing.")
    misfit = f"the adapter {folder} does not fit {type(model).__name__}"
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError) as error:
        raise LimbeckError(f"{misfit}: {error}") from error
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        stored = set(tensors.keys())
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # peft leaves what is missing at its initialisation, and drops what it does not know; embeddings may be among them.
    missing, foreign = wanted - stored, stored - wanted - set(adapted.state_dict())
    if missing or foreign:
        raise LimbeckError(
            f"{misfit}: {len(missing)} of its tensors are missing and {len(foreign)} are not of this model (the first: "
            f"{min(missing | foreign)})."
        )
    return adapted.merge_and_unload()


def _adapter_identity(folder: Path) -> list[str]:
    return [sha256_file_cached(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")]


class _Float8(nn.Module):
    """A weight that is stored as float8 values and a scale a row, and multiplied out in use."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return values.to(self._dtype) * scales.to(self._dtype)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return to_float8(weight)


def hold_as_float8(model: Any) -> None:
    """Store the matrices between hidden states (fused experts too) as E4M3 with a scale a row.

    Embedding, head, norms and routers keep their precision. It saves memory, not time: products run in the model's
    own precision. torchao's and transformers' float8 leave fused experts, most of a large teacher, as they are.
    """
    model.requires_grad_(False)
    for name in sorted(hidden_matrices(model)):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if "router" in owner.rpartition(".")[2] or owner.endswith(".gate"):
            continue
        parametrize.register_parametrization(module, leaf, _Float8(getattr(module, leaf).dtype), unsafe=True)


def _bytes(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
