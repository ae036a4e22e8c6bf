"""Packed checkpoints: 2-bit codes and float16 scales in safetensors, loadable by `AutoModelForCausalLM`.

The one idea: the folder is a transformers checkpoint whose `quantization_config` says `packed`; after
`import limbeck`, `from_pretrained` makes modules that unpack in use, with exactly training's codes and scales.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from limbeck.export.folder import written_folder
from limbeck.export.source import ExportSource
from limbeck.models import load_causal_lm
from limbeck.storage import copy_beside, read_json, write_json
from limbeck.students.quantizer import float8_key, pack_codes, packed_key, to_float8
from limbeck.students.weights_file import KEY, rename_weights

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "fp8": torch.bfloat16}


def export_packed(source: ExportSource, target: Path, rest: str = "bf16") -> dict[str, Any]:
    """Write the packed checkpoint; returns sizes in bytes and bits a ternary weight.

    Args:
        source: a ternary student.
        target: folder to write; replaced as a whole.
        rest: precision of everything that is not ternary: bf16, f16 or f32; or fp8: matrices as float8 with a scale a
            row, the rest bf16.
    """
    with written_folder(target, "packed") as partial:
        bits = _write(source, partial, rest)
    total = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return {"bytes": total, "bits_per_ternary_weight": bits}


def _write(source: ExportSource, partial: Path, rest: str) -> float:
    """Write everything into the folder; returns bits a ternary weight."""
    tensors: dict[str, torch.Tensor] = {}
    ternary_bytes = weights = 0
    seen: set[int] = set()
    float8: list[str] = []
    for name, tensor in source.tensors():
        if name in source.ternary:
            packed = source.quantised(name, tensor)
            stem = packed_key(name)
            tensors[f"{stem}.codes"], tensors[f"{stem}.scales"] = pack_codes(packed.codes), packed.scales.contiguous()
            ternary_bytes += tensors[f"{stem}.codes"].nbytes + tensors[f"{stem}.scales"].nbytes
            weights += tensor.numel()
        elif tensor.data_ptr() not in seen or tensor.numel() == 0:  # a tied head is its embedding
            seen.add(tensor.data_ptr())
            if rest == "fp8" and tensor.ndim == 2 and tensor.is_floating_point():
                values, scales = to_float8(tensor)
                tensors[f"{float8_key(name)}.values"], tensors[f"{float8_key(name)}.scales"] = values, scales
                float8.append(name)
                continue
            tensors[name] = tensor.to(_DTYPES[rest]) if tensor.is_floating_point() else tensor.clone()
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    config = read_json(source.folder / "config.json")
    config["quantization_config"].update(format="packed", float8=float8)
    config["quantization_config"].pop(KEY, None)
    config["dtype"] = str(_DTYPES[rest]).removeprefix("torch.")
    write_json(partial / "config.json", config)
    copy_beside(source.folder, partial)
    rename_weights(partial)
    return 8.0 * ternary_bytes / max(weights, 1)


def verify_packed(source: ExportSource, target: Path) -> bool:
    """Load the packed checkpoint as its users do; True when every code and scale is training's."""
    model = load_causal_lm(str(target), dtype="auto")
    modules = dict(model.named_modules())
    held = dict(source.model.named_parameters())
    for name in source.ternary:
        wanted = source.quantised(name, held[name])
        found: Any = modules[packed_key(name)]
        if not torch.equal(found.codes, pack_codes(wanted.codes)) or not torch.equal(found.scales, wanted.scales):
            return False
    return True
