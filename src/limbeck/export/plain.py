"""A plain checkpoint: s·code and everything else in one precision, for whatever loads transformers models.

The one idea: a scale has eight significant bits, so bfloat16 and float16 hold s·code exactly; what is lost is that
activations are no longer rounded, and the precision of everything else. How much that is, is measured.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from limbeck.export.source import MADE_BY, ExportSource
from limbeck.models import load_causal_lm
from limbeck.storage import commit_folder, temporary_for

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_COPIED = (".json", ".jinja", ".txt", ".model")


def export_plain(source: ExportSource, target: Path, precision: str) -> int:
    """Write the plain folder, replaced as a whole; returns the bytes of its weights.

    Args:
        source: a student, ternary or not.
        target: folder to write.
        precision: bf16, f16 or f32.
    """
    from transformers import AutoModelForCausalLM

    partial = temporary_for(target, own=True)
    partial.mkdir(parents=True)
    try:
        config = type(source.model.config).from_dict(_plain_config(source))
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
        model.load_state_dict({name: source.plain(name, tensor) for name, tensor in source.tensors()})
        model.generation_config = source.model.generation_config
        model.save_pretrained(partial)
        own = {path.name for path in partial.iterdir()}
        for path in source.folder.iterdir():
            named = path.suffix in _COPIED and not path.name.endswith((".index.json", "manifest.json"))
            if named and path.name not in own:
                shutil.copy2(path, partial / path.name)
        (partial / MADE_BY).write_text("hf\n")
        commit_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what a failed write left; nothing after a finished one
    return sum(path.stat().st_size for path in target.glob("*.safetensors"))


def _plain_config(source: ExportSource) -> dict[str, Any]:
    found: dict[str, Any] = source.model.config.to_dict()
    found.pop("quantization_config", None)
    return found


@torch.no_grad()
def difference(source: ExportSource, target: Path, rows: torch.Tensor) -> dict[str, float]:
    """How far the written model is from the student on rows `[n, T]`: mean KL in nats, and equal first choices."""
    written = load_causal_lm(str(target), dtype="auto").eval()
    kl = matches = 0.0
    for row in rows:
        ours, theirs = (
            model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(dim=-1)
            for model in (source.model, written)
        )
        kl += float((ours.exp() * (ours - theirs)).sum())
        matches += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return {"tokens": rows.numel(), "kl_mean": kl / rows.numel(), "top1_agreement": matches / rows.numel()}
