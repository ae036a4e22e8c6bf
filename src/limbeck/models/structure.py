"""What a model is made of: its matrices between hidden states, and whether it keeps packed documents apart."""

import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from limbeck.errors import ConfigError

_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
_HEADS = re.compile(r"(^|\.)([qkv]_proj|q_b_proj|qkv_proj|query_key_value|c_attn|Wqkv|in_proj_qkvz?)\.weight$")
#: Gate and up projection one above the other; GraniteMoe and JetMoe call them `input_linear`.
_GATE_UP = re.compile(r"(^|\.)(gate_up_proj|input_linear)(\.weight)?$")


@dataclass(frozen=True)
class MatrixLayout:
    """How a parameter holds matrices.

    Attributes:
        rows: rows of one matrix; 0 when the last two dimensions are one matrix.
        transposed: True when outputs are columns (GPT-2's Conv1D, some experts), so that `rows` counts columns.
        low_rank: one of two factors of a small correction, which stays in full precision.
    """

    rows: int = 0
    transposed: bool = False
    low_rank: bool = False

    def split(self, tensor: Tensor) -> Tensor:
        """`[..., R·k, C]` to the `[n, R, C]` matrices in it."""
        oriented = tensor.mT if self.transposed else tensor
        rows = self.rows or oriented.shape[-2]
        return oriented.reshape(-1, rows, oriented.shape[-1])

    def join(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `split`."""
        if not self.transposed:
            return matrices.reshape(shape)
        return matrices.reshape(*shape[:-2], shape[-1], shape[-2]).mT

    def factor(self, shape: torch.Size, adjust_lr: str) -> float:
        """c: what the learning rate is multiplied by for matrices of a parameter of this shape."""
        out, into = (shape[-1], shape[-2]) if self.transposed else (shape[-2], shape[-1])
        rows = self.rows or out
        if adjust_lr == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, into))
        return math.sqrt(max(1.0, rows / into))


def hidden_matrices(model: nn.Module, *, split_heads: bool = True) -> dict[str, MatrixLayout]:
    """The parameters that are matrices between hidden states, by name, and how they hold them.

    These are the weights of linear layers and the fused 3-D experts; not embeddings, output head, routers,
    gates of one column, convolutions, norms and biases.
    """
    config = getattr(model, "config", None)
    hidden_size = getattr(config, "hidden_size", None)
    outside = {id(parameter) for parameter in _embeddings(model)}
    found = {}
    for prefix, module in model.named_modules():
        owner = prefix.rpartition(".")[0]
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            experts = parameter.ndim == 3 and ("expert" in name or "ParallelExperts" in type(module).__name__)
            if (
                not ((linear and parameter.ndim == 2) or experts)
                or id(parameter) in outside
                or _ROUTER.search(name)
                or name.endswith("bias")
                or min(parameter.shape[-2:]) < 2
            ):
                continue
            transposed = _is_transposed(module, leaf, parameter, hidden_size)
            out = parameter.shape[-1 if transposed else -2]
            rows = 0
            if _GATE_UP.search(name) and getattr(module, "is_concatenated", True) and out % 2 == 0:
                rows = out // 2
            elif split_heads and _HEADS.search(name):
                rows = _head_rows(model.get_submodule(owner) if owner else model, config, out, prefix)
            found[name] = MatrixLayout(rows, transposed, bool(getattr(module, "is_low_rank", False)))
    return found


def _embeddings(model: Any) -> list[nn.Parameter]:
    held = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [*held, *([head.weight] if head is not None else [])]


def _is_transposed(module: nn.Module, leaf: str, parameter: nn.Parameter, hidden_size: int | None) -> bool:
    """True for `[in, out]` weights: GPT-2's Conv1D, and experts whose gate/up reads hidden states from rows."""
    if parameter.ndim == 2:
        return type(module).__name__ == "Conv1D"
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    if hidden_size is None or parameter.shape[-1] == parameter.shape[-2]:
        return False
    return bool(parameter.shape[-1 if "down" in leaf else -2] == hidden_size)


def _head_rows(attention: nn.Module, config: Any, out: int, name: str = "") -> int:
    """Rows of one head when `out` rows are whole heads of one width; 0 when they are not."""
    latent = getattr(attention, "qk_head_dim", None)  # DeepSeek: queries have a part with and one without positions
    if latent is not None and name.rpartition(".")[2] in ("q_proj", "q_b_proj"):
        return int(latent) if out > latent and out % latent == 0 else 0
    key, value = getattr(attention, "head_k_dim", None), getattr(attention, "head_v_dim", None)
    if key is not None and key != value:  # linear attention whose keys and values differ in width
        width = {"q_proj": key, "k_proj": key, "v_proj": value}.get(name.rpartition(".")[2], 0)
    else:
        width = key if key is not None else getattr(attention, "head_dim", None)
    if width is None and config is not None:
        heads = getattr(config, "num_attention_heads", None)
        width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    return int(width) if width and out > width and out % width == 0 else 0


def keeps_documents_apart(model: Any) -> bool:
    """True when block-causal attention follows from restarting `position_ids`.

    Asked of the model itself: two short documents share a row, every token of the first is changed, and the logits of
    the second must not move. Attention masks the first document out exactly; convolutions, recurrences and linear
    attention carry something of it across the border, however little before they are trained (5e-4 was the least
    seen). In float32 a rounding (1e-5 of the largest logit) is allowed: experts multiply tokens in groups, and the
    size of a group may change the order of a sum.
    """
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


def require_causal(model: Any, role: str) -> None:
    """Refuse a model whose predictions depend on what they are to predict.

    Asked of the model itself: the last of some tokens is changed, and the logits before it must not move.

    Raises:
        ConfigError: says which model.
    """
    device, training = next(model.parameters()).device, model.training
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(10, device=device) * 7 + 3).remainder(vocab).unsqueeze(0)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocab
    model.eval()
    try:
        with torch.no_grad():
            one, two = (model(input_ids=tokens).logits[:, :-1].float() for tokens in (ids, other))
    except (ValueError, RuntimeError, NotImplementedError, TypeError):
        return  # whoever runs it says what is wrong
    finally:
        model.train(training)
    if float((one - two).abs().max()) > 1e-3 * float(one.abs().max()) + 1e-6:
        raise ConfigError(
            f"the {role} ({type(model).__name__}) sees the tokens that it is to predict: it is bidirectional. Choose a "
            "causal model (with BERT-like configs, is_decoder: true)."
        )


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
