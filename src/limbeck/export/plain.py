"""A plain checkpoint: s·code and everything else in one precision, for whatever loads transformers models.

The one idea: a scale has eight significant bits, so bfloat16 and float16 hold s·code exactly; what is lost is that
activations are no longer rounded, and the precision of everything else. How much that is, is measured.
"""

from pathlib import Path
from typing import Any

import torch

from limbeck.export.folder import written_folder
from limbeck.export.source import ExportSource
from limbeck.export.verify import Agreement, log_probs
from limbeck.models import load_causal_lm
from limbeck.storage import copy_beside

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def export_plain(source: ExportSource, target: Path, precision: str) -> int:
    """Write the plain folder, replaced as a whole; returns the bytes of its weights.

    Args:
        source: a student, ternary or not.
        target: folder to write.
        precision: bf16, f16 or f32.
    """
    from transformers import AutoModelForCausalLM

    config = type(source.model.config).from_dict(_plain_config(source))
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
    model.load_state_dict({name: source.plain(name, tensor) for name, tensor in source.tensors()})
    model.generation_config = source.model.generation_config
    with written_folder(target, "hf") as partial:
        model.save_pretrained(partial)
        copy_beside(source.folder, partial)
    return sum(path.stat().st_size for path in target.glob("*.safetensors"))


def _plain_config(source: ExportSource) -> dict[str, Any]:
    found: dict[str, Any] = source.model.config.to_dict()
    found.pop("quantization_config", None)
    return found


@torch.no_grad()
def difference(source: ExportSource, target: Path, rows: torch.Tensor) -> dict[str, float]:
    """How far the written model is from the student on rows `[n, T]`: mean KL in nats, and equal first choices."""
    written = load_causal_lm(str(target), dtype="auto").eval()
    agreement = Agreement()
    for row in rows:
        agreement.add(*(log_probs(model, row) for model in (source.model, written)))
    return agreement.record()
