"""Models by name: a folder, a hub id, or the one in the package; their hash, and how they are loaded.

The one idea: everything that loads a model goes through here, so that safetensors-only, no remote code
and the meaning of `tiny-python` are decided once.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from limbeck.config import ModelSource
from limbeck.errors import ConfigError, LimbeckError
from limbeck.hub import HubError, commit_of
from limbeck.storage import fingerprint, sha256_file_cached

#: Models shipped in the package, by name.
SHIPPED = {name: Path(__file__).parent.parent / "assets" / name for name in ("tiny-python", "tiny-moe")}


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
    try:
        return {"weights": commit_of("model", name, revision)}
    except HubError as error:
        if (local := _cached_commit(name, revision)) is not None:
            return {"weights": local}
        raise _not_found("model", name, error) from None


def require_reachable(name: str, what: str, revision: str | None = None) -> None:
    """Refuse at once a name that is no folder here, was never downloaded, and that the hub does not give.

    Raises:
        LimbeckError: says what is wrong with the name or the network.
    """
    if Path(resolve_model(name)).exists() or _cached_commit(name, revision) is not None:
        return
    try:
        commit_of("model", name, revision)
    except HubError as error:
        raise _not_found(what, name, error) from None


def _cached_commit(name: str, revision: str | None) -> str | None:
    """The commit of a model that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "tokenizer.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):  # …/snapshots/COMMIT/config.json
            return Path(found).parent.name
    return None


def _not_found(what: str, name: str, error: HubError) -> LimbeckError:
    return LimbeckError(f"{what} {name!r} is no folder here, and {error}. Check the name and the network.")


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

    require_reachable(name, "model", revision)
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
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LimbeckError(f"model {name!r} could not be loaded: {said[0][:400]}") from error
    require_whole(f"model {name!r}", report, model)
    return model


def model_config(source: ModelSource, role: str) -> Any:
    """A model's transformers config.

    Raises:
        LimbeckError: there is none, or of an architecture that transformers does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    name, revision, remote_code = source
    require_reachable(name, "model", revision)
    path = resolve_model(name)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=remote_code)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            raise LimbeckError(f"{role} {path} has no config.json. Name a model's folder, or a hub id.") from None
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LimbeckError(f"the config of {role} {name!r} cannot be read: {said[0][:300]}") from None


def require_context(config: Any, length: int, what: str, cure: str = "choose another model") -> None:
    """Refuse rows that are longer than a model's context.

    Args:
        config: the model's.
        length: tokens in a row.
        what: how a message calls the model.
        cure: what may be done about it, beside shorter rows.

    Raises:
        ConfigError: names both lengths.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < length:
        raise ConfigError(
            f"dataset.max_length is {length} and the {what} has a context of {most} tokens. Set --seq-len {most}, or "
            f"{cure}."
        )


def load_frozen(source: ModelSource, dtype: str = "auto", device: str | None = None) -> Any:
    """A model that is used and not trained, in eval mode on its device.

    Args:
        source: which.
        dtype: of its weights; see `choose_dtype`.
        device: see `choose_device`.

    Raises:
        LimbeckError: as `load_causal_lm`.
    """
    name, revision, remote_code = source
    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    model = load_causal_lm(name, revision=revision, trust_remote_code=remote_code, dtype=precision)
    return model.to(where).eval()


#: Constants that older versions of models kept beside their weights.
_CONSTANTS = re.compile(r"\.(masked_bias|rotary_emb\.inv_freq|position_ids)$|(^|\.)decoder\.version$")


def is_constant(name: str) -> bool:
    """True for what older versions of models kept beside their weights and models make themselves."""
    return _CONSTANTS.search(name) is not None


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
            names = [name for name in names if not is_constant(name)]
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


def choose_device(wanted: str | None) -> str:
    """The device meant: cuda is this rank's own, and unset is cuda where there is one, else cpu.

    Raises:
        ConfigError: cuda is wanted and there is none.
    """
    import torch

    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {wanted} is wanted and torch sees no GPU here. Use cpu, or leave it unset.")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if wanted == "cuda" else wanted


def choose_dtype(wanted: str, device: str) -> str:
    """The dtype to load a frozen model in: `auto` avoids bfloat16 where it would be emulated."""
    return "float32" if wanted == "auto" and not bfloat16_is_fast(device) else wanted
