"""Students by name: what `student.preset` stands for, keys of `student` that the recipe's own are laid over.

Sizes in the names are with a vocabulary of 32,000 ids and tied embeddings; ids are the tokenizer's.
"""

from typing import Any

_RETNET_350M = {
    "model_type": "retnet_hrm", "hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 12,
    "num_attention_heads": 10, "tie_word_embeddings": True,
}  # fmt: skip
_RETNET_500M = {
    **_RETNET_350M, "hidden_size": 1536, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12,
}  # fmt: skip
_RETNET_SMALL = {
    **_RETNET_350M, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_CYCLES = {"H_cycles": 2, "L_cycles": 3, "L_bp_cycles": [1, 2]}
_TITANS = {**_CYCLES, "segments": 2, "halting": True, "memory": True}
_NANO = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": True,
}  # fmt: skip
_NANO_SMALL = {
    **_NANO, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_NANO_PARTS: dict[str, Any] = {"ternary": {"group_size": 256}, "mhc": {"streams": 2}}

#: Every preset, by name.
PRESETS: dict[str, dict[str, Any]] = {
    "retnet-350m": {"config": _RETNET_350M},
    "retnet-500m": {"config": _RETNET_500M},
    "retnet-small": {"config": _RETNET_SMALL},
    "retnet-hrm-350m": {"config": {**_RETNET_350M, **_CYCLES}},
    "retnet-hrm-500m": {"config": {**_RETNET_500M, **_CYCLES}},
    "retnet-hrm-small": {"config": {**_RETNET_SMALL, **_CYCLES}},
    "titan-retnet-hrm-350m": {"config": {**_RETNET_350M, **_TITANS, "memory_heads": 10}},
    "titan-retnet-hrm-small": {"config": {**_RETNET_SMALL, **_TITANS, "memory_heads": 4}},
    "nano-125m": {"config": _NANO, **_NANO_PARTS},
    "nano-small": {"config": _NANO_SMALL, **_NANO_PARTS},
}
