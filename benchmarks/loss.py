"""The fused loss beside the dense formula and TRL's chunked divergence: time and peak memory as ratios.

    python benchmarks/loss.py                         V 151,936, N 1,024, D 1,024 on this CPU, float32
    python benchmarks/loss.py --device cuda --shape liger   BT 8,192, D 2,048, V 128,256, bf16, beside Liger

Each case computes the loss (CE + temperature² · KL) and its gradients for hidden states and head. The dense
and the fused case get the teacher's predictions ready-made (all logits; top-64 targets); TRL's kernel has no
sparse form and projects a teacher of the same width itself, which is its way of not storing them.
"""

import gc

import torch

from common import arguments, interleaved, peak_memory, report
from limbeck import SparseTargets, fused_distillation_loss

ALPHA, TAU, K = 0.5, 2.0, 64


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


def fused(hidden, weight, labels, targets):
    return fused_distillation_loss(hidden, weight, labels, targets, alpha=ALPHA, temperature=TAU).loss


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
    return {
        "fused": lambda: gradients(fused, hidden, weight, labels, targets),
        "dense": lambda: gradients(dense_loss, hidden, weight, labels, teacher_logits),
        "trl": lambda: gradients(trl_loss, hidden, weight, teacher_hidden, teacher_weight),
    }


def run_cpu(repeats: int) -> dict:
    """The issue's shape: every case's peak memory (which also warms it up), then interleaved times."""
    positions, width, vocab = 1024, 1024, 151936
    cases = cpu_cases(positions, width, vocab)
    memory = {}
    for name, case in cases.items():
        gc.collect()
        memory[name] = peak_memory(case)
    seconds = interleaved(cases, repeats)
    return {
        "shape": {"positions": positions, "width": width, "vocab": vocab, "top_k": K, "dtype": "float32"},
        "seconds": seconds,
        "peak_bytes": memory,
        "time_ratio_vs_dense": seconds["fused"] / seconds["dense"],
        "memory_ratio_vs_dense": memory["fused"] / memory["dense"],
        "time_ratio_vs_trl": seconds["fused"] / seconds["trl"],
        "memory_ratio_vs_trl": memory["fused"] / memory["trl"],
    }


def run_cpu_quick() -> dict:
    """Half the width, one run each against the dense formula; TRL on a quarter of the positions."""
    cases = cpu_cases(1024, 512, 151936)
    memory, seconds = {}, {}
    for name in ("fused", "dense"):
        gc.collect()
        memory[name] = peak_memory(lambda name=name: seconds.update(interleaved({name: cases[name]}, 1)))
    small = cpu_cases(256, 512, 151936)
    beside_trl = interleaved({name: small[name] for name in ("fused", "trl")}, 1)
    return {
        "shape": {"positions": 1024, "width": 512, "vocab": 151936, "top_k": K, "dtype": "float32"},
        "shape_beside_trl": {"positions": 256, "width": 512, "vocab": 151936},
        "seconds": seconds,
        "seconds_beside_trl": beside_trl,
        "peak_bytes": memory,
        "time_ratio_vs_dense": seconds["fused"] / seconds["dense"],
        "memory_ratio_vs_dense": memory["fused"] / memory["dense"],
        "time_ratio_vs_trl": beside_trl["fused"] / beside_trl["trl"],
    }


def run_cuda(shape: str, repeats: int) -> dict:
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

    cases = {"fused": lambda: gradients(fused, hidden, weight, labels, targets), "dense": dense}
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
    seconds = interleaved({name: (lambda c=case: timed(c)) for name, case in cases.items()}, repeats)
    result = {
        "shape": {"positions": positions, "width": width, "vocab": vocab, "top_k": K, "dtype": "bfloat16"},
        "device": torch.cuda.get_device_name(),
        "seconds": seconds,
        "peak_bytes": memory,
        "time_ratio_vs_dense": seconds["fused"] / seconds["dense"],
        "memory_ratio_vs_dense": memory["fused"] / memory["dense"],
    }
    if "liger" in cases:
        result["time_ratio_vs_liger"] = seconds["fused"] / seconds["liger"]
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="default", choices=["default", "liger"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda":
        result = run_cuda(options.shape, options.repeats)
    else:
        result = run_cpu_quick() if options.quick else run_cpu(options.repeats)
    report({**result, "max_grad_error": max_gradient_error()}, options.json)


if __name__ == "__main__":
    main()
