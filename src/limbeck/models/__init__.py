"""Facts about models of transformers, and how they are loaded.

The one idea: everything that loads a model or asks what it is goes through here, so that safetensors-only, no remote
code, the choice of device and precision, and the meaning of `tiny-python` are decided once. What needs torch is
imported on first use: processes that only tokenise load names, and none of it.
"""

from typing import TYPE_CHECKING

from limbeck.lazy import lazy_names

if TYPE_CHECKING:
    from limbeck.models.head import (
        LogitTransform,
        OutputHead,
        embedded_vocab_size,
        head_replaced,
        last_hidden_states,
        verified_transform,
    )
    from limbeck.models.loading import (
        SHIPPED,
        bfloat16_is_fast,
        choose_device,
        choose_dtype,
        is_constant,
        load_causal_lm,
        load_frozen,
        model_config,
        model_identity,
        require_context,
        require_reachable,
        require_whole,
        resolve_model,
    )
    from limbeck.models.structure import (
        MatrixLayout,
        hidden_matrices,
        keeps_documents_apart,
        refuse_mixed_documents,
        require_causal,
        require_packing,
    )

#: The module that each name comes from.
_HOMES = {
    **dict.fromkeys(
        ("LogitTransform", "OutputHead", "embedded_vocab_size", "head_replaced", "last_hidden_states",
         "verified_transform"),
        "limbeck.models.head",
    ),
    **dict.fromkeys(
        ("SHIPPED", "bfloat16_is_fast", "choose_device", "choose_dtype", "is_constant", "load_causal_lm", "load_frozen",
         "model_config", "model_identity", "require_context", "require_reachable", "require_whole", "resolve_model"),
        "limbeck.models.loading",
    ),
    **dict.fromkeys(
        ("MatrixLayout", "hidden_matrices", "keeps_documents_apart", "refuse_mixed_documents", "require_causal",
         "require_packing"),
        "limbeck.models.structure",
    ),
}  # fmt: skip

__all__ = [
    "SHIPPED",
    "LogitTransform",
    "MatrixLayout",
    "OutputHead",
    "bfloat16_is_fast",
    "choose_device",
    "choose_dtype",
    "embedded_vocab_size",
    "head_replaced",
    "hidden_matrices",
    "is_constant",
    "keeps_documents_apart",
    "last_hidden_states",
    "load_causal_lm",
    "load_frozen",
    "model_config",
    "model_identity",
    "refuse_mixed_documents",
    "require_causal",
    "require_context",
    "require_packing",
    "require_reachable",
    "require_whole",
    "resolve_model",
    "verified_transform",
]

__getattr__ = lazy_names(__name__, _HOMES)
