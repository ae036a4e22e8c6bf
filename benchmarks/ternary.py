"""Ternary training and export: what the quantiser costs a step, and how small a 125M-parameter student gets.

    python benchmarks/ternary.py
    python benchmarks/ternary.py --quick --json

The shape is Llama-like with 125M parameters: width 768, 12 layers, vocabulary 32,000, tied embedding. A step is
forward, fused CE and backward over 2 × 256 tokens in float32; the dense and the ternary student take turns. Sizes
are of the checkpoint (float32 shadow weights), the packed checkpoint, and GGUF (TQ2_0, embedding Q8_0).
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import arguments, report
from limbeck.config import TernaryConfig
from limbeck.data.dataset import PackedRows
from limbeck.export.gguf import GGUFExport
from limbeck.export.packed import export_packed
from limbeck.export.source import Source
from limbeck.students.build import make_ternary
from limbeck.training.head import LossRequest, attach_fused_loss

SHAPE = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000, "tie_word_embeddings": True,
    "max_position_embeddings": 1024, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip


def new_model(ternary: bool):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE))
    if ternary:
        make_ternary(model, TernaryConfig(group_size=256))
    return model


def step_seconds(model, ids: torch.Tensor) -> float:
    rows = PackedRows(torch.arange(len(ids)), ids, torch.zeros_like(ids))
    started = time.perf_counter()
    request = LossRequest(rows.labels, None, {"temperature": 1.0})
    model(**rows.model_inputs("packed"), loss_request=request).loss.backward()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=False)
    return seconds


def overhead(repeats: int) -> dict[str, float]:
    """Median seconds of a step, dense and ternary, and the median of their ratio."""
    models = {name: new_model(name == "ternary").train() for name in ("dense", "ternary")}
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 256), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        attach_fused_loss(model)
        step_seconds(model, ids)
    for _ in range(repeats):
        for name, model in models.items():
            seconds[name].append(step_seconds(model, ids))
    ratios = [ternary / dense for dense, ternary in zip(seconds["dense"], seconds["ternary"], strict=True)]
    return {
        "dense_step_seconds": statistics.median(seconds["dense"]),
        "ternary_step_seconds": statistics.median(seconds["ternary"]),
        "qat_step_overhead": statistics.median(ratios),
    }


def byte_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 32,000 entries, most of them never used: sizes need a vocabulary of the right length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<|endoftext|>", *letters])}
    pairs = [(a, b) for a in letters for b in letters]
    merges = pairs[: SHAPE["vocab_size"] - len(vocab)]
    vocab.update({a + b: len(vocab) + number for number, (a, b) in enumerate(merges)})
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def sizes() -> dict[str, float]:
    """Megabytes (10⁶) of the checkpoint, packed and GGUF."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "final"
        new_model(True).save_pretrained(folder)
        byte_tokenizer(folder)
        checkpoint = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        packed = export_packed(Source.open(folder), Path(name) / "packed")
        written = GGUFExport(folder, "tq2_0").write(Path(name) / "student.gguf")
    return {
        "checkpoint_mb": checkpoint / 1e6,
        "packed_mb": packed["bytes"] / 1e6,
        "gguf_mb": written["bytes"] / 1e6,
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    found = {"parameters": sum(p.numel() for p in new_model(False).parameters()), "threads": torch.get_num_threads()}
    report({**found, **overhead(2 if options.quick else 9), **sizes()}, options.json)


if __name__ == "__main__":
    main()
