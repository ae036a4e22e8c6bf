"""The fused loss beside the dense formula, TRL's chunked divergence and its limit: time and peak memory as ratios.

    python benchmarks/loss.py                         V 151,936, N 1,024, D 1,024 on this CPU
    python benchmarks/loss.py --quick --json          one thread, V 75,968, N 128, D 512; memory: N 512, D 256
    python benchmarks/loss.py --device cuda --shape liger   BT 8,192, D 2,048, V 128,256, bf16, beside Liger

Each case computes the loss (CE + temperature² · KL) and its gradients for hidden states and head. The dense
and the fused case get the teacher's predictions ready-made (all logits; top-64 targets); TRL's kernel has no
sparse form and projects a teacher of the same width itself, which is its way of not storing them.

The limit is the three matrix products alone (logits, their gradients to hidden states and head), 256 positions at a
time, as 160 MB of logits at V 151,936 are. On a CPU that multiplies bfloat16 in hardware the fused loss under autocast
stands beside the same products in bfloat16. The second temperature's cost is the fused loss at τ 2 over that at τ 1.
"""

import gc
import sys

import torch

from common import Comparison, Repeats, arguments, interleaved, medians, peak_memory, ratio, report
from limbeck import SparseTargets, fused_distillation_loss
from limbeck.models import bfloat16_is_fast

ALPHA, TAU, K, CHUNK = 0.5, 2.0, 64, 256


def dense_loss(hidden, weight, labels, teacher_logits):
    """The formula as recipes write it: all logits, log-softmax, kl_div."""
    logits = (hidden @ weight.T).float()
    ce = torch.nn.functional.cross_entropy(logits, labels)
    kl = torch.nn.functional.kl_div(
        (logits / TAU).log_softmax(-1), (teacher_logits.float() / TAU).softmax(-1), reduction="batchmean"
    )
    return (1 - ALPHA) * ce + ALPHA * TAU**2 * kl


def trl_loss(hidden, weight, teacher_hidden, teacher_weight):
    """TRL's chunked forward KL alone: less than the other two compute, as TRL's trainer adds no CE."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, teacher_hidden, teacher_weight, None, 0.0, TAU, 1.0, None, 1.0, None
    )
    return TAU**2 * kl.mean()


def fused(hidden, weight, labels, targets, temperature=TAU):
    return fused_distillation_loss(hidden, weight, labels, targets, alpha=ALPHA, temperature=temperature).loss


def fused_bfloat16(*given):
    with torch.autocast(given[0].device.type, dtype=torch.bfloat16):
        return fused(*given)


class Products:
    """Logits, ∂L/∂hidden and ∂L/∂W by matrix products into memory that is there already; nothing else."""

    def __init__(self, hidden, weight, dtype):
        self._hidden, self._weight = (tensor.detach().to(dtype) for tensor in (hidden, weight))
        self._grad_hidden, self._grad_weight = torch.empty_like(self._hidden), torch.zeros_like(self._weight)
        self._logits = self._hidden.new_empty(min(CHUNK, len(hidden)), len(weight))

    def __call__(self):
        for start in range(0, len(self._hidden), CHUNK):
            chunk = self._hidden[start : start + CHUNK]
            logits = self._logits[: len(chunk)]
            torch.mm(chunk, self._weight.T, out=logits)
            torch.mm(logits, self._weight, out=self._grad_hidden[start : start + CHUNK])
            self._grad_weight.addmm_(logits.T, chunk, beta=float(start > 0))


def gradients(loss_function, hidden, weight, *rest):
    """Run forward and backward; returns (∂L/∂hidden, ∂L/∂W) and drops them from the tensors."""
    loss_function(hidden, weight, *rest).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    return found


def max_gradient_error() -> float:
    """Largest difference to the dense gradients with K = V, relative to their largest entry, in float32."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(64, 96, requires_grad=True), torch.randn(2048, 96, requires_grad=True)
    labels, teacher = torch.randint(0, 2048, (64,)), torch.randn(64, 2048) * 2
    targets = SparseTargets.from_logits(teacher, None, (1.0, TAU))
    ours = gradients(fused, hidden, weight, labels, targets)
    dense = gradients(dense_loss, hidden, weight, labels, teacher)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, dense, strict=True))


def cpu_cases(positions: int, width: int, vocab: int) -> dict:
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, requires_grad=True)
    weight = (torch.randn(vocab, width) * width**-0.5).requires_grad_()
    labels = torch.randint(0, vocab, (positions,))
    teacher_hidden = torch.randn(positions, width)
    teacher_weight = torch.randn(vocab, width) * width**-0.5 * 3
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_weight.T
        targets = SparseTargets.from_logits(teacher_logits, K, (1.0, TAU))
    given = (hidden, weight, labels, targets)
    cases = {
        "fused": lambda: gradients(fused, *given),
        "fused_tau1": lambda: gradients(fused, *given, 1.0),
        "products": Products(hidden, weight, torch.float32),
        "dense": lambda: gradients(dense_loss, hidden, weight, labels, teacher_logits),
        "trl": lambda: gradients(trl_loss, hidden, weight, teacher_hidden, teacher_weight),
    }
    if bfloat16_is_fast("cpu"):
        cases |= {
            "fused_bfloat16": lambda: gradients(fused_bfloat16, *given),
            "fused_bfloat16_tau1": lambda: gradients(fused_bfloat16, *given, 1.0),
            "products_bfloat16": Products(hidden, weight, torch.bfloat16),
        }
    return cases


def peaks(cases: dict, names: tuple[str, ...]) -> dict[str, int]:
    """Each case's peak memory, which also warms it up."""
    memory = {}
    for name in names:
        gc.collect()
        memory[name] = peak_memory(cases[name])
    return memory


def comparisons_of(found: dict[str, Repeats]) -> dict[str, Comparison]:
    """Every comparison whose two cases were run."""
    pairs = {
        "time_ratio_vs_dense": ("fused", "dense"),
        "time_ratio_vs_trl": ("fused", "trl"),
        "time_ratio_vs_liger": ("fused", "liger"),
        "over_limit": ("fused", "products"),
        "over_limit_tau1": ("fused_tau1", "products"),
        "second_temperature_cost": ("fused", "fused_tau1"),
        "over_limit_bfloat16": ("fused_bfloat16", "products_bfloat16"),
        "over_limit_bfloat16_tau1": ("fused_bfloat16_tau1", "products_bfloat16"),
        "second_temperature_cost_bfloat16": ("fused_bfloat16", "fused_bfloat16_tau1"),
        "bfloat16_over_float32": ("fused_bfloat16", "fused"),
        "products_bfloat16_over_float32": ("products_bfloat16", "products"),
    }
    return {n: ratio(found[a], found[b]) for n, (a, b) in pairs.items() if a in found and b in found}


def run_cpu(quick: bool, repeats: int) -> tuple[dict, dict[str, Comparison]]:
    """Every case's peak memory, which also warms it up, then interleaved times."""
    shape = {"positions": 128, "width": 512, "vocab": 75968} if quick else {
        "positions": 1024, "width": 1024, "vocab": 151936,
    }  # fmt: skip
    memory, memory_shape = {}, shape
    if quick:
        torch.set_num_threads(1)
        # The peaks say little where the vocabulary is small.
        memory_shape = {"positions": 512, "width": 256, "vocab": 151936}
        memory = peaks(cpu_cases(**memory_shape), ("fused", "dense"))
    cases = cpu_cases(**shape)
    warm = peaks(cases, tuple(cases))
    memory = memory or warm
    found = interleaved(cases, repeats)
    flops = 6.0 * shape["positions"] * shape["width"] * shape["vocab"]
    return {
        "shape": {**shape, "top_k": K, "dtype": "float32"},
        "shape_of_memory": memory_shape,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        **medians(found),
        "limit_gflops": {name: flops / found[name].seconds / 1e9 for name in found if name.startswith("products")},
        "peak_bytes": memory,
        **{f"memory_ratio_vs_{name}": memory["fused"] / memory[name] for name in ("dense", "trl") if name in memory},
    }, comparisons_of(found)


def run_cuda(shape: str, repeats: int) -> tuple[dict, dict[str, Comparison]]:
    """bf16 on a GPU; `liger` is the shape Liger publishes its fused JSD at (60.7 ms, 11.1 GB on an H100)."""
    positions, width, vocab = (8192, 2048, 128256) if shape == "liger" else (1024, 1024, 151936)
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, **kind).requires_grad_()
    weight = (torch.randn(vocab, width, **kind) * width**-0.5).requires_grad_()
    labels = torch.randint(0, vocab, (positions,), device="cuda")
    teacher_hidden = torch.randn(positions, 2 * width, **kind)
    teacher_weight = torch.randn(vocab, 2 * width, **kind) * (2 * width) ** -0.5 * 3
    parts = []
    with torch.no_grad():
        for start in range(0, positions, 512):
            logits = teacher_hidden[start : start + 512] @ teacher_weight.T
            parts.append(SparseTargets.from_logits(logits, K, (1.0, TAU)))
        from limbeck.targets.sparse import concatenate

        targets = concatenate(parts)

    def dense():
        return gradients(dense_loss, hidden, weight, labels, teacher_hidden @ teacher_weight.T)

    cases = {
        "fused": lambda: gradients(fused, hidden, weight, labels, targets),
        "fused_tau1": lambda: gradients(fused, hidden, weight, labels, targets, 1.0),
        "products": Products(hidden, weight, torch.bfloat16),
        "dense": dense,
    }
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        jsd = LigerFusedLinearJSD(jsd_beta=0.5, temperature=TAU)
        cases["liger"] = lambda: jsd(hidden, weight, teacher_hidden, teacher_weight, labels).backward()
    except ImportError:
        pass

    def timed(case):
        case()
        torch.cuda.synchronize()

    memory = {}
    for name, case in cases.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        timed(case)
        memory[name] = torch.cuda.max_memory_allocated() - base
    found = interleaved({name: (lambda c=case: timed(c)) for name, case in cases.items()}, repeats)
    return {
        "shape": {"positions": positions, "width": width, "vocab": vocab, "top_k": K, "dtype": "bfloat16"},
        "device": torch.cuda.get_device_name(),
        "repeats": repeats,
        **medians(found),
        "peak_bytes": memory,
        "memory_ratio_vs_dense": memory["fused"] / memory["dense"],
    }, comparisons_of(found)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="default", choices=["default", "liger"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda":
        result, comparisons = run_cuda(options.shape, options.repeats)
    else:
        result, comparisons = run_cpu(options.quick, options.repeats)
    headline = [name for name in comparisons if name.startswith("time_ratio")]
    return report({**result, "max_grad_error": max_gradient_error()}, options.json, comparisons, headline)


if __name__ == "__main__":
    sys.exit(main())
