"""What a token costs as models and texts grow: from 10M to 1B parameters, and behind texts of up to 64k tokens.

    python benchmarks/engine_scaling.py
    python benchmarks/engine_scaling.py --json --plot docs/engine-scaling.svg

Llama-shaped ternary models with random weights (TQ2_0, vocabulary 4,096) decode 32 tokens with one thread; a
RetNet-HRM, a Qwen3-Next (of which one layer in four attends) and a Llama of some million parameters decode 16 tokens
behind texts of 1k to 64k. Each figure is the median of five. `linear_exponent` is the slope of log seconds over log
parameters, from 50M on: 1 is linear. `--quick` leaves out the largest model and the longest texts.
"""

import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common import arguments, report
from engine import LlamaShape, write_llama
from limbeck.kernels import native

WIDTHS = {"10M": (256, 8), "30M": (512, 8), "100M": (768, 14), "300M": (1280, 16), "1B": (2048, 20)}  # width, layers
LENGTHS = (1024, 4096, 16384, 65536)
VOCABULARY = 4096


def llama_file(folder: Path, name: str) -> Path:
    """A Llama of random ternary weights."""
    width, layers = WIDTHS[name]
    inside = width * 7 // 2 // 256 * 256
    write_llama(folder / f"{name}.gguf", LlamaShape(width, inside, layers, width // 64, 131072, VOCABULARY), "tq2_0")
    return folder / f"{name}.gguf"


def student_file(folder: Path, name: str) -> Path:
    """A student of transformers' or our own, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from limbeck.config import TernaryConfig
    from limbeck.data.tokenizer import load_tokenizer
    from limbeck.export.gguf import GGUFExport
    from limbeck.students.build import make_ternary

    base = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    attention = {"num_key_value_heads": 2, "max_position_embeddings": 131072, "head_dim": 64}
    settings = {
        "retnet_hrm": {**base, "num_hidden_layers": 4, "H_cycles": 2, "L_cycles": 2},
        "qwen3_next": {
            **base, **attention, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2,
            "norm_topk_prob": True, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        },
        "llama": {**base, **attention, "num_hidden_layers": 4},
    }[name]  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
    make_ternary(model, TernaryConfig(group_size=256))
    model.save_pretrained(folder / name)
    load_tokenizer("tiny-python").hf.save_pretrained(folder / name)
    GGUFExport(folder / name).write(folder / f"{name}.gguf")
    return folder / f"{name}.gguf"


def decoding(engine, line: int, count: int) -> float:
    """Median seconds of a token."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for number in range(count):
            engine.forward([(line, [number + 1], False)])
        seconds.append((time.perf_counter() - start) / count)
    return statistics.median(seconds)


def by_parameters(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    found = {}
    for name in names:
        path = llama_file(folder, name)
        engine = native().Engine(str(path), 1, True)
        line = engine.create()
        engine.forward([(line, [1] * 8, False)])
        found[name] = {"parameters": engine.parameters, "milliseconds": 1e3 * decoding(engine, line, 32)}
        path.unlink()
    return found


def by_length(folder: Path, lengths: list[int]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for name in ("retnet_hrm", "qwen3_next", "llama"):
        engine = native().Engine(str(student_file(folder, name)), 1, True)
        line, at = engine.create(), 0
        found[name] = {}
        for length in lengths:
            tokens = np.random.default_rng(0).integers(5, VOCABULARY, length - at - 80).tolist()
            engine.forward([(line, tokens, False)])
            found[name][length] = 1e3 * decoding(engine, line, 16)
            at = engine.length(line)
    return found


def plot(path: Path, parameters: dict, lengths: dict) -> None:
    """Both, on logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "limbeck"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    x = [entry["parameters"] for entry in parameters.values()]
    y = [entry["milliseconds"] for entry in parameters.values()]
    left.loglog(x, y, "o-", label="measured")
    left.loglog([x[0], x[-1]], [y[-1] * x[0] / x[-1], y[-1]], ":", color="gray", label="in proportion")
    left.set(xlabel="parameters", ylabel="milliseconds a token, one thread", title="Ternary Llamas")
    left.legend()
    for name, entry in lengths.items():
        right.loglog(list(entry), list(entry.values()), "o-", label=name, base=2)
    right.set(xlabel="tokens before", ylabel="milliseconds a token, one thread", title="Length of the text")
    right.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    names = list(WIDTHS)[:4] if given.quick else list(WIDTHS)
    lengths = list(LENGTHS)[:2] if given.quick else list(LENGTHS)
    with tempfile.TemporaryDirectory() as folder:
        parameters = by_parameters(Path(folder), names)
        texts = by_length(Path(folder), lengths)
    large = [entry for entry in parameters.values() if entry["parameters"] > 5e7]
    logs = [[math.log(entry[key]) for entry in large] for key in ("parameters", "milliseconds")]
    slope = statistics.linear_regression(*logs).slope
    growth = {f"{name}_longest_over_shortest": entry[lengths[-1]] / entry[lengths[0]] for name, entry in texts.items()}
    if given.plot:
        plot(given.plot, parameters, texts)
    return report({"by_parameters": parameters, "by_length": texts, "linear_exponent": slope, **growth}, given.json)


if __name__ == "__main__":
    sys.exit(main())
