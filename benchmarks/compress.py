"""Compressing a mixture of experts: what each method loses, how time grows with the model, how much memory it takes.

    python benchmarks/compress.py [--quick] [--json]

Losses are held-out cross-entropies of `tiny-moe`, the mixture in the package, on modules of the standard library that
it has not seen, measured on 64 (quick) or 256 of its training rows and kept to half of the experts' weights; `mean` is
the routing-weighted mean of the experts, a shared core of rank 0. Time and memory are of synthetic checkpoints with
random weights, measured on 4 rows of 512 random tokens: 2 layers and 20 layers in turn; and of 3 layers of 200 MB
the peak of a process over one layer with two H × H matrices in float64, without the shapes that oneDNN caches (a few
hundred MB at most, whatever the model).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common import arguments, interleaved, ratio, report
from limbeck.compression.plan import CompressionPlan
from limbeck.compression.run import Compression
from limbeck.config import ModelSource
from limbeck.config.compress import CompressConfig
from limbeck.data.dataset import PackedDataset, PackedRows
from limbeck.folders import StageFolder
from limbeck.models import load_causal_lm, resolve_model
from limbeck.pipeline import run_pipeline
from limbeck.recipe import load_recipe

CASES = {
    "mean": {"method": "shared_core", "rank": 0},
    "latent": {"method": "latent", "keep": 0.5},
    "shared_core": {"method": "shared_core", "keep": 0.5},
    "core_delta": {"method": "core_delta", "keep": 0.5},
    "prune": {"method": "prune", "keep": 0.5},
}
#: A synthetic model's layer: 16 experts of 128 in 256; and a larger one, of 64 experts of 512 in 1,024.
LAYER = {"model_type": "qwen3_moe", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
         "decoder_sparse_step": 1, "vocab_size": 1024, "tie_word_embeddings": True}  # fmt: skip
LARGE = {**LAYER, "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64}


def packed_rows(folder: Path) -> Path:
    """The standard library's sources as rows of `tiny-moe`'s tokens."""
    recipe = load_recipe(None, {
        "output_dir": str(folder), "dataset": {"name": "stdlib", "max_length": 256, "validation_fraction": 0.05},
        "tokenizer": {"name": resolve_model("tiny-moe")},
    })  # fmt: skip
    run_pipeline(recipe, "pack")
    return recipe.packed_dir


def compressed(source: str, section: dict, rows: PackedDataset | None, out: Path, attention="per_document") -> Path:
    """Compress a model into a folder."""
    plan = CompressionPlan.of(CompressConfig(**section), ModelSource(source))
    folder = StageFolder(out, "compress", {"of": source, **section})
    Compression(plan, rows, attention, folder, "cpu").run(force=out.exists())
    return out


@torch.no_grad()
def held_out_loss(model, rows: PackedDataset, attention="per_document") -> float:
    """Mean cross-entropy in nats."""
    total = count = 0.0
    for start in range(0, len(rows), 8):
        batch = rows.rows(range(start, min(start + 8, len(rows))))
        logits = model(**batch.model_inputs(attention)).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        total, count = total + float(loss), count + int((batch.labels != -100).sum())
    return total / count


def losses(folder: Path, quick: bool) -> dict[str, float]:
    """How much each case adds to the held-out loss, in nats."""
    packed = packed_rows(folder / "rows")
    rows = PackedDataset(packed, "train", 64 if quick else 256)
    held_out = PackedDataset(packed, "validation", 64 if quick else 256)
    own = held_out_loss(load_causal_lm("tiny-moe", dtype="float32").eval(), held_out)
    found = {}
    for name, section in CASES.items():
        model = load_causal_lm(str(compressed("tiny-moe", section, rows, folder / name)), dtype="float32").eval()
        found[name] = held_out_loss(model, held_out) - own
    return found


class RandomRows:
    """Calibration text of random ids, as `PackedDataset` gives it."""

    max_length = 512

    def __len__(self) -> int:
        return 4

    def rows(self, indices) -> PackedRows:
        """One document a row."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(LAYER["vocab_size"], (len(self), self.max_length), generator=generator)[list(indices)]
        return PackedRows(torch.tensor(list(indices)), ids, torch.zeros_like(ids))


def synthetic(folder: Path, layers: int, sizes: dict = LAYER) -> Path:
    """A checkpoint with random weights in bfloat16, written layer by layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from limbeck.storage import write_json

    config = AutoConfig.for_model(**{**sizes, "num_hidden_layers": 1, "dtype": "bfloat16"})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    from safetensors.torch import save_file

    index = {}
    outside = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    outside.pop("lm_head.weight", None)
    inside = {name: value for name, value in model.state_dict().items() if ".layers." in name}
    for number in range(layers):
        file = f"layer-{number}.safetensors"
        tensors = {name.replace(".layers.0.", f".layers.{number}."): value for name, value in inside.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    save_file(outside, folder / "outside.safetensors", metadata={"format": "pt"})
    index |= dict.fromkeys(outside, "outside.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    config.num_hidden_layers = layers
    config.save_pretrained(folder)
    return folder


#: Peak of anonymous memory beyond what the process holds once everything is imported.
_MEASURED = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import compress
from transformers import AutoModelForCausalLM
import accelerate, safetensors.torch
def held():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
before = peak = held()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, held())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
compress.compressed(sys.argv[2], {"method": "latent", "keep": 0.5}, compress.RandomRows(), Path(sys.argv[3]))
done = True
watcher.join()
print(peak - before)
"""


def peak_over_layer(source: Path, out: Path) -> float:
    """Peak memory of compressing over a layer's weights and two H × H matrices in float64."""
    command = [sys.executable, "-c", _MEASURED, str(Path(__file__).parent), str(source), str(out)]
    environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak = int(done.stdout.split()[-1])
    experts, hidden, inside = LARGE["num_experts"], LARGE["hidden_size"], LARGE["moe_intermediate_size"]
    layer = 2 * 3 * experts * hidden * inside
    return peak / (layer + 2 * 8 * hidden**2)


def main() -> int:
    given = arguments(__doc__.splitlines()[0]).parse_args()
    if given.quick:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        added = losses(folder, given.quick)
        one, ten = synthetic(folder / "one", 2), synthetic(folder / "ten", 20)
        section = {"method": "latent", "keep": 0.5}
        found = interleaved(
            {
                "1x": lambda: compressed(str(one), section, RandomRows(), folder / "out-one"),
                "10x": lambda: compressed(str(ten), section, RandomRows(), folder / "out-ten"),
            },
            3 if given.quick else 5,
        )
        memory = peak_over_layer(synthetic(folder / "large", 3, LARGE), folder / "measured")
    result = {
        "loss_increase": added,
        "latent_over_prune_loss_increase": added["latent"] / added["prune"],
        "shared_core_over_mean_loss_increase": added["shared_core"] / added["mean"],
        "seconds": {name: case.seconds for name, case in found.items()},
        "peak_memory_over_layer": memory,
    }
    return report(result, given.json, {"time_ratio_10x_model": ratio(found["10x"], found["1x"])})


if __name__ == "__main__":
    sys.exit(main())
