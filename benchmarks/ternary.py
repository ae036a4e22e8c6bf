"""Ternary training and export: what the quantiser costs a step, and how small a 125M-parameter student gets.

    python benchmarks/ternary.py
    python benchmarks/ternary.py --quick --json

The shape is Llama-like with 125M parameters: width 768, 12 layers, vocabulary 32,000, tied embedding. A step is
forward, fused CE and backward over 2 × 256 tokens in float32; the dense and the ternary student take turns. Sizes
are of the checkpoint (float32 shadow weights), the packed checkpoint, and GGUF (TQ2_0, embedding Q8_0). `--quick`
times a sixth of it (2 layers, vocabulary 5,376) on one thread; products and the rest keep their proportion.

The limit is the dense twin's matrix products alone: of each linear layer the output and both gradients.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import Comparison, Span, arguments, interleaved, medians, now, ratio, report, since
from limbeck.config import LossConfig, TernaryConfig
from limbeck.data.dataset import PackedRows
from limbeck.export.gguf import GGUFExport
from limbeck.export.packed import export_packed
from limbeck.export.source import ExportSource
from limbeck.losses.objective import Batch, Context, Objectives
from limbeck.students.build import make_ternary
from limbeck.training.head import LossRequest, attach_objectives

SHAPE = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000, "tie_word_embeddings": True,
    "max_position_embeddings": 1024, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
QUICK = {"num_hidden_layers": 2, "vocab_size": 5376}


def new_model(ternary: bool, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPE, **changes}))
    if ternary:
        make_ternary(model, TernaryConfig(group_size=256))
    return model


def step(model, ids: torch.Tensor) -> Span:
    rows = PackedRows(torch.arange(len(ids)), ids, torch.zeros_like(ids))
    start = now()
    request = LossRequest(Batch(rows.labels), Objectives.of(Context(LossConfig())))
    model(**rows.model_inputs("packed"), loss_request=request).loss.backward()
    span = since(start)
    model.zero_grad(set_to_none=False)
    return span


class Products:
    """The three products of every linear layer, into memory that is there already."""

    def __init__(self, model, tokens: int) -> None:
        weights = [module.weight.detach() for module in model.modules() if isinstance(module, torch.nn.Linear)]
        made = {weight.shape: (torch.randn(tokens, weight.shape[1]), torch.randn(tokens, weight.shape[0]))
                for weight in weights}  # fmt: skip
        self._layers = [(weight, *made[weight.shape], torch.empty_like(weight)) for weight in weights]
        self._room = {shape: tuple(torch.empty_like(tensor) for tensor in pair) for shape, pair in made.items()}

    def __call__(self) -> None:
        for weight, inputs, gradients, out in self._layers:
            grad_inputs, outputs = self._room[weight.shape]
            torch.mm(inputs, weight.T, out=outputs)
            torch.mm(gradients, weight, out=grad_inputs)
            torch.mm(gradients.T, inputs, out=out)


def overhead(quick: bool) -> tuple[dict, dict[str, Comparison]]:
    """A step, dense and ternary, and the products of the dense one: medians and paired ratios."""
    changes, repeats = (QUICK, 7) if quick else ({}, 9)
    if quick:
        torch.set_num_threads(1)
    models = {name: new_model(name == "ternary", **changes).train() for name in ("dense", "ternary")}
    ids = torch.randint(0, models["dense"].config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0))
    cases: dict = {"products": Products(models["dense"], ids.numel())}
    for name, model in models.items():
        attach_objectives(model)
        cases[name] = lambda model=model: step(model, ids)
    interleaved(cases, 1)  # warm: gradients, allocator
    found = interleaved(cases, repeats)
    return {
        "timed_shape": {**changes, "tokens": ids.numel()},
        "repeats": repeats,
        **medians(found),
        "dense_step_seconds": found["dense"].seconds,
        "ternary_step_seconds": found["ternary"].seconds,
        "limit_products_seconds": found["products"].seconds,
    }, {
        "qat_step_overhead": ratio(found["ternary"], found["dense"]),
        "dense_step_over_products": ratio(found["dense"], found["products"]),
        "ternary_step_over_products": ratio(found["ternary"], found["products"]),
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
        packed = export_packed(ExportSource.open(folder), Path(name) / "packed")
        written = GGUFExport(folder, "tq2_0").write(Path(name) / "student.gguf")
    return {
        "checkpoint_mb": checkpoint / 1e6,
        "packed_mb": packed["bytes"] / 1e6,
        "gguf_mb": written["bytes"] / 1e6,
    }


def main() -> int:
    options = arguments(__doc__).parse_args()
    result, comparisons = overhead(options.quick)
    found = {"parameters": sum(p.numel() for p in new_model(False).parameters()), "threads": torch.get_num_threads()}
    return report({**result, **found, **sizes()}, options.json, comparisons, headline=["qat_step_overhead"])


if __name__ == "__main__":
    sys.exit(main())
