"""Names of models: a folder, a hub id, or the one in the package; and the hash of their weights.

The one idea: everything that loads a model goes through here, so that safetensors-only, no remote code
and the meaning of `tiny-python` are decided once.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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
        LimbeckError: the model is missing, is no causal LM, has no safetensors weights, or not exactly its tensors.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them; the error of transformers does not
            **changes,
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise LimbeckError(f"model {name!r} could not be loaded: {error}") from error
    require_whole(f"model {name!r}", report, model)
    return model


#: Constants that older versions of models kept beside their weights.
_CONSTANTS = re.compile(r"\.(masked_bias|rotary_emb\.inv_freq|position_ids)$|(^|\.)decoder\.version$")


def require_whole(what: str, report: Mapping[str, Collection[Any]], model: Any) -> None:
    """Refuse weights that are not exactly those the model has: transformers would leave the others random.

    Constants that the model makes itself, such as attention masks, may be among the weights.

    Args:
        what: the checkpoint, for the message.
        report: the loading report of `from_pretrained(..., output_loading_info=True)`.
        model: the model that was loaded.

    Raises:
        LimbeckError: tensors are missing, unexpected, or of another shape; how many, and the first of them.
    """
    wrong = []
    buffers = [f".{name}" for name, _ in model.named_buffers()]
    for key, label in (("missing_keys", "missing"), ("mismatched_keys", "of another shape"),
                       ("unexpected_keys", "not of this model")):  # fmt: skip
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report.get(key, ()))
        if key == "unexpected_keys":  # a checkpoint may leave out the name of the base model
            names = [name for name in names if not _CONSTANTS.search(name)]
            names = [name for name in names if not any(buffer.endswith(f".{name}") for buffer in buffers)]
        if names:
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            wrong.append(f"{len(names)} tensors are {label} ({shown})")
    if wrong:
        raise LimbeckError(
            f"{what} does not hold the weights that its config.json describes: {'; '.join(wrong)}. Get the whole "
            "checkpoint again, or mend its config.json."
        )


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


#: Spellings of a soft-cap in configs: Gemma, RecurrentGemma, xLSTM.
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read the transform from a transformers config (Gemma, Granite, Cohere, Falcon-H1, … spellings)."""
        scale = 1.0
        if getattr(config, "logits_scaling", None):
            scale /= float(config.logits_scaling)
        for key in ("logit_scale", "lm_head_multiplier"):
            if getattr(config, key, None):
                scale *= float(getattr(config, key))
        caps = (getattr(config, key, None) for key in _SOFT_CAPS)
        return cls(scale, next((float(cap) for cap in caps if cap), None))

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

    Asked of the model itself: two short documents share a row, every token of the first is changed, and the logits of
    the second must not move. Attention masks the first document out exactly; convolutions, recurrences and linear
    attention carry something of it across the border, however little before they are trained (5e-4 was the least
    seen). In float32 a rounding (1e-5 of the largest logit) is allowed: experts multiply tokens in groups, and the
    size of a group may change the order of a sum.
    """
    import torch

    device = next(model.parameters()).device
    vocab = model.get_input_embeddings().weight.shape[0]
    border, length = 6, 13
    positions = torch.cat([torch.arange(border), torch.arange(length - border)]).to(device).repeat(2, 1)
    training = model.training
    model.eval()
    found = []
    try:
        with torch.no_grad():
            for change in (0, 1):
                ids = torch.arange(length, device=device) * 7 + 3
                ids[:border] += change
                # Two rows: some attention kernels look at the positions of single rows only.
                rows = (ids % vocab).repeat(2, 1)
                logits = model(input_ids=rows, position_ids=positions, use_cache=False).logits
                found.append(logits[:, border:].float())
    except (ValueError, RuntimeError, NotImplementedError):
        return False  # a kernel that refuses packed rows says the same thing
    finally:
        model.train(training)
    one, other = found
    slack = 1e-5 * float(one.abs().max()) if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.0
    return bool((one - other).abs().max() <= slack)


def require_packing(model: Any, role: str) -> None:
    """Refuse `attention: per_document` for a model that cannot do it.

    Raises:
        ConfigError: says which model, and what to choose instead.
    """
    if not keeps_documents_apart(model):
        refuse_mixed_documents(model, role)


def refuse_mixed_documents(model: Any, role: str) -> NoReturn:
    """The refusal of a model that does not keep documents apart."""
    raise ConfigError(
        f"dataset.attention is per_document and the {role} ({type(model).__name__}) does not keep the documents "
        'of a packed row apart. Set dataset.attention: packed (in Python: attention="packed"), or choose a model '
        "with ordinary attention."
    )


def verified_transform(model: Any) -> LogitTransform:
    """What the model does to its logits, checked by what it makes of logits up to ±60.

    Raises:
        LimbeckError: it has no linear output embedding, or does something that its config does not tell.
    """
    import torch

    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise LimbeckError(f"{type(model).__name__} has no output embedding (lm_head); it is no causal LM.")
    transform = LogitTransform.of(model.config.get_text_config())
    vocab, device = head.weight.shape[0], head.weight.device
    # A model's own logits may be so small that a soft-cap does not show.
    probe = torch.linspace(-60.0, 60.0, vocab, device=device).to(head.weight.dtype)
    training = model.training
    try:
        model.eval()
        ids = torch.arange(8, device=device).unsqueeze(0) % vocab
        with torch.no_grad(), head_replaced(head, lambda hidden: probe.expand(*hidden.shape[:-1], vocab)):
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    expected = transform(probe.float()).expand_as(logits)
    if not torch.allclose(logits.float(), expected, rtol=2e-2, atol=1e-2):
        raise LimbeckError(
            f"{type(model).__name__} changes its logits after lm_head in a way limbeck does not know "
            f"(scale {transform.scale}, soft-cap {transform.softcap} read from its config do not reproduce them)."
        )
    return transform


class OutputHead:
    """The way from a model's last hidden states to log-probabilities, a few positions at a time.

    Args:
        model: a causal LM.
        vocab_size: ids from here on are padding of the embedding and get probability 0; None: all ids count.
    """

    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        self._head = model.get_output_embeddings()
        self._transform = LogitTransform.of(model.config.get_text_config())
        width = embedded_vocab_size(model)
        self.vocab_size = width if vocab_size is None else min(width, vocab_size)

    def logits(self, hidden: Any) -> Any:
        """Logits `[..., V]` in float32 of hidden states `[..., D]`."""
        import torch

        logits = torch.nn.functional.linear(hidden, self._head.weight, getattr(self._head, "bias", None))
        return self._transform(logits[..., : self.vocab_size].float())

    def log_probs(self, hidden: Any) -> Any:
        """Log-probabilities `[..., V]` in float32."""
        return self.logits(hidden).log_softmax(dim=-1)


def last_hidden_states(model: Any, **inputs: Any) -> Any:
    """What the model's output embedding is given `[B, T, D]`; no logits are made."""
    seen: list[Any] = []

    def keep(hidden: Any) -> Any:
        seen.append(hidden)
        return hidden[..., :1]

    with head_replaced(model.get_output_embeddings(), keep):
        model(**inputs)
    return seen[0]
