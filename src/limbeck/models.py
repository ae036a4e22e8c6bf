"""Names of models: a folder, a hub id, or the one in the package; and the hash of their weights.

The one idea: everything that loads a model goes through here, so that safetensors-only, no remote code
and the meaning of `tiny-python` are decided once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import ConfigError, LimbeckError
from limbeck.storage import fingerprint, sha256_file_cached

#: Models shipped in the package, by name.
SHIPPED = {"tiny-python": Path(__file__).parent / "assets" / "tiny-python"}


def resolve_model(name: str) -> str:
    """The path or hub id that `name` stands for."""
    return str(SHIPPED[name]) if name in SHIPPED else name


def model_identity(name: str, revision: str | None = None) -> dict[str, str]:
    """What a model is: the hash of its config and weights (folder), or its commit (hub).

    Where it lies is no part of it: the same weights on another machine are the same model.
    """
    folder = Path(resolve_model(name))
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json"))
        if not any(path.suffix == ".safetensors" for path in files):
            raise LimbeckError(f"{folder} holds no .safetensors weights. Convert the checkpoint to safetensors first.")
        return {"weights": fingerprint([[p.name, sha256_file_cached(p)] for p in files])}
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return {"weights": str(HfApi().model_info(name, revision=revision).sha)}
    except HFValidationError:
        problem = "it is no hub id either"
    except (HfHubHTTPError, OSError) as error:
        problem = f"the hub cannot be reached ({type(error).__name__}) and holds no local copy"
        local = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(local, str):  # …/snapshots/COMMIT/config.json
            return {"weights": Path(local).parent.name}
    raise LimbeckError(f"model {name!r} is no folder here, and {problem}. Check the name and the network.")


def load_causal_lm(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    **changes: Any,
) -> Any:
    """Load a causal LM from safetensors; `changes` are keys of its config to override.

    Raises:
        LimbeckError: the model is missing, is no causal LM, or has no safetensors weights.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            **changes,
        )
    except (OSError, ValueError, TypeError, SafetensorError, StrictDataclassError) as error:
        raise LimbeckError(f"model {name!r} could not be loaded: {error}") from error


def bfloat16_is_fast(device: str) -> bool:
    """True when `device` multiplies bfloat16 matrices in hardware."""
    import torch

    if device.startswith("cpu"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def choose_dtype(wanted: str, device: str) -> str:
    """The dtype to load a frozen model in: `auto` avoids bfloat16 where it would be emulated."""
    return "float32" if wanted == "auto" and not bfloat16_is_fast(device) else wanted


def embedded_vocab_size(model: Any) -> int:
    """Width of the model's logits."""
    return int(model.get_output_embeddings().weight.shape[0])


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read the transform from a transformers config (Gemma, Granite, Cohere, Falcon-H1 spellings)."""
        scale = 1.0
        if getattr(config, "logits_scaling", None):
            scale /= float(config.logits_scaling)
        for key in ("logit_scale", "lm_head_multiplier"):
            if getattr(config, key, None):
                scale *= float(getattr(config, key))
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Any) -> Any:
        """Apply it to plain logits."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


@contextmanager
def head_replaced(head: Any, forward: Callable[[Any], Any]) -> Iterator[None]:
    """Let the output embedding compute `forward(hidden)` instead of logits while the context lasts."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def keeps_documents_apart(model: Any) -> bool:
    """True when block-causal attention follows from restarting `position_ids`.

    Asked of the model itself: two short documents share a row, and the second must give the logits it gives
    alone. Linear-attention models carry their state across the border and fail this.
    """
    import torch

    device = next(model.parameters()).device
    vocab = model.get_input_embeddings().weight.shape[0]
    border, length = 5, 11
    # Two rows: some attention kernels look at the positions of single rows only.
    ids = ((torch.arange(length, device=device) * 7 + 3) % vocab).repeat(2, 1)
    positions = torch.cat([torch.arange(border), torch.arange(length - border)]).to(device).repeat(2, 1)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, border:].float()
            plain = model(input_ids=ids, use_cache=False).logits[0, border:].float()
            alone = model(input_ids=ids[:, border:], use_cache=False).logits[0].float()
    except (ValueError, RuntimeError, NotImplementedError):
        return False  # a kernel that refuses packed rows says the same thing
    finally:
        model.train(training)
    # What one document does to the next in an ordinary row is the scale to judge the packed row by.
    return bool((packed - alone).abs().max() <= 0.1 * (plain - alone).abs().max())


def require_packing(model: Any, role: str) -> None:
    """Refuse `attention: per_document` for a model that cannot do it.

    Raises:
        ConfigError: says which model, and what to choose instead.
    """
    if not keeps_documents_apart(model):
        raise ConfigError(
            f"dataset.attention is per_document and the {role} ({type(model).__name__}) does not keep the documents "
            "of a packed row apart. Set dataset.attention: packed, or choose a model with ordinary attention."
        )


def verified_transform(model: Any) -> LogitTransform:
    """What the model does to its logits, checked against its own logits of a few tokens.

    Raises:
        LimbeckError: it has no linear output embedding, or does something that its config does not tell.
    """
    import torch

    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise LimbeckError(f"{type(model).__name__} has no output embedding (lm_head); it is no causal LM.")
    transform = LogitTransform.of(model.config.get_text_config())
    seen: list[Any] = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    training = model.training
    try:
        model.eval()
        ids = torch.arange(8, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        model.train(training)
    if not torch.allclose(logits.float(), transform(seen[0].float()), rtol=1e-2, atol=1e-2):
        raise LimbeckError(
            f"{type(model).__name__} changes its logits after lm_head in a way limbeck does not know "
            f"(scale {transform.scale}, soft-cap {transform.softcap} read from its config do not reproduce them)."
        )
    return transform
