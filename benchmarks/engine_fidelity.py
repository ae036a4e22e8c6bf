"""How far the engine's logits are from the student's own in transformers, on a run's held-out rows.

    python benchmarks/engine_fidelity.py outputs/quickstart [--json]

The student is exported anew with its embedding in F16 and in Q8_0, and compared with its embedding rounded likewise;
each file runs with every kind of cache. Told are the mean distance of logits over their size, the share of equal first
choices, and KL(student ‖ engine) in nats.
"""

import sys
import tempfile
from pathlib import Path

import gguf
import torch

from common import arguments, report
from limbeck.config.engine import EngineConfig
from limbeck.data.dataset import PackedDataset
from limbeck.export.gguf import GGUFExport
from limbeck.models import load_causal_lm
from limbeck.serving.model import GgufModel

ROWS, LENGTH = 8, 256


@torch.no_grad()
def compared(wanted: list[torch.Tensor], rows: list[torch.Tensor], path: Path, cache: str) -> dict[str, float]:
    model = GgufModel(path, EngineConfig(cache=cache))
    found = [torch.from_numpy(model.line().extend(ids.tolist(), every=True)) for ids in rows]
    ours, theirs = torch.cat(found), torch.cat(wanted)
    log_p = theirs.log_softmax(-1)
    return {
        "relative_distance": round(float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).mean()), 5),
        "top1_agreement": round(float((ours.argmax(1) == theirs.argmax(1)).double().mean()), 5),
        "kl": float((log_p.exp() * (log_p - ours.log_softmax(-1))).sum(-1).mean()),
    }


@torch.no_grad()
def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    folder = given.run / "student" / "final"
    held_out = PackedDataset(given.run / "data", "validation", ROWS)
    rows = [held_out[number]["input_ids"][:LENGTH] for number in range(len(held_out))]
    found: dict = {"positions": sum(map(len, rows))}
    with tempfile.TemporaryDirectory() as place:
        for embedding in ("f16", "q8_0"):
            path = Path(place) / f"{embedding}.gguf"
            GGUFExport(folder, "auto", embedding).write(path)
            student = load_causal_lm(str(folder), dtype="float32").eval()
            own = [student(input_ids=ids[None], use_cache=False).logits[0] for ids in rows]
            table = student.get_input_embeddings().weight
            kind = getattr(gguf.GGMLQuantizationType, embedding.upper())
            rounded = gguf.quants.dequantize(gguf.quants.quantize(table.detach().numpy(), kind), kind)
            table.copy_(torch.from_numpy(rounded))
            wanted = [student(input_ids=ids[None], use_cache=False).logits[0] for ids in rows]
            found[f"embedding {embedding}, cache f16, from the unrounded student"] = compared(own, rows, path, "f16")
            for cache in ("f32", "f16", "int8"):
                found[f"embedding {embedding}, cache {cache}"] = compared(wanted, rows, path, cache)
    return report(found, given.json)


if __name__ == "__main__":
    sys.exit(main())
