"""Proof of an export: the file read back, and the same tokens through llama.cpp and through the student.

The one idea: the file is decoded by the gguf package and run by llama.cpp, neither of which is ours; weights
must be equal, and what a runtime computes with them is reported as KL, first choices and perplexity.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.data.dataset import PackedDataset
from limbeck.export.blocks import BLOCK_TYPES, Array, decode_blocks, teach_gguf_q2
from limbeck.export.disk import DiskTensors
from limbeck.export.gguf import GGUFExport, Planned, stored
from limbeck.models import load_causal_lm
from limbeck.students.ternary import TernaryTensor


def weights_equal(export: GGUFExport, path: Path) -> list[str]:
    """Names of tensors in the file that are not exactly the student's; none when all is well.

    A tensor is compared twice: its decoded values, and the bytes that hold codes and scales (an all-zero
    group's scale shows in no value).
    """
    import gguf

    teach_gguf_q2()
    in_file = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensors = DiskTensors(export.folder)
    planned = export.layout.plan(tensors, export.layout.choose(tensors))
    wrong = [name for name in in_file if name not in {entry.target.name for entry in planned}]
    for entry in planned:
        found = in_file.get(entry.target.name)
        if found is None or not _same(entry, np.asarray(found.data), export, tensors):
            wrong.append(entry.target.name)
    return wrong


def _same(entry: Planned, data: Array, export: GGUFExport, tensors: DiskTensors) -> bool:
    part = export.part(entry, tensors)
    if data.tobytes() != stored(part, entry.kind).tobytes():
        return False
    if not isinstance(part, TernaryTensor):
        return True
    decoded = decode_blocks(data, BLOCK_TYPES[entry.kind], entry.shape[-1]).reshape(entry.shape)
    return bool(np.array_equal(decoded, part.dequantise().numpy()))


def held_out_rows(run: Path, count: int) -> torch.Tensor | None:
    """At least `count` tokens of a run's validation rows, `[rows, T]`; None where there are none."""
    for folder in (run / "data", run.parent / "data", run.parent.parent / "data"):
        if (folder / "manifest.json").is_file():
            rows = PackedDataset(folder, "validation")
            length = rows.max_length
            wanted = min(len(rows), -(-count // length))
            return torch.stack([torch.as_tensor(rows[i]["input_ids"]) for i in range(wanted)]) if wanted else None
    return None


@dataclass
class Agreement:
    """How far one model is from another over rows: sums that `record` divides by the positions."""

    positions: int = 0
    kl: float = 0.0
    matches: int = 0

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Count a row's log-probabilities `[T, V]` of both."""
        self.positions += len(ours)
        self.kl += float((ours.exp() * (ours - theirs)).sum())
        self.matches += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    def record(self) -> dict[str, Any]:
        """Positions, mean KL(ours ‖ theirs) in nats, and the share of equal first choices."""
        return {
            "tokens": self.positions,
            "kl_mean": self.kl / self.positions,
            "top1_agreement": self.matches / self.positions,
        }


@torch.no_grad()
def log_probs(model: Any, row: torch.Tensor) -> torch.Tensor:
    """A model's log-probabilities `[T, V]` of one row of tokens `[T]`."""
    found: torch.Tensor = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(dim=-1)
    return found


def compare_with_llama_cpp(export: GGUFExport, path: Path, rows: torch.Tensor) -> dict[str, Any]:
    """The rows through both programs: mean KL(torch ‖ llama.cpp), first choices, and the perplexity of each."""
    from llama_cpp import Llama

    student = load_causal_lm(str(export.folder), dtype="float32").eval()
    length = rows.shape[1]
    llama = Llama(str(path), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    agreement, torch_loss, llama_loss = Agreement(), 0.0, 0.0
    for row in rows:
        ours = log_probs(student, row)
        llama.reset()
        llama.eval(row.tolist())
        theirs = torch.from_numpy(np.array(llama.scores[:length], dtype=np.float32)).log_softmax(dim=-1)
        agreement.add(ours, theirs)
        following = row[1:].unsqueeze(-1)
        torch_loss -= float(ours[:-1].gather(1, following).sum())
        llama_loss -= float(theirs[:-1].gather(1, following).sum())
    llama.close()
    predicted = rows.numel() - len(rows)
    return {
        **agreement.record(),
        "perplexity_torch": math.exp(torch_loss / predicted),
        "perplexity_llama_cpp": math.exp(llama_loss / predicted),
    }
