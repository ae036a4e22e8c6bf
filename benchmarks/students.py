"""RetNet students beside a Llama of the same size: training, decoding and memory at lengths from 1k to 64k tokens.

    python benchmarks/students.py
    python benchmarks/students.py --quick --json

Both models have the same width, layers and (within 1 %) weights, float32, on this machine's cores. A training step is
forward, cross-entropy and backward over 2,048 tokens, as rows of one length. Decoding is one token after a context of
so many: the RetNet has read it (its state is what `generate` carries), the Llama's key/value cache of that length is
filled with random numbers, which costs the same as real ones. The crossing is the context from which a token of the
RetNet takes less time. Cases take turns.
"""

import sys
from itertools import pairwise

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from common import (
    Comparison,
    Repeats,
    Span,
    arguments,
    interleaved,
    medians,
    now,
    peak_memory,
    ratio,
    report,
    resident_bytes,
    since,
)
from limbeck.students.retnet_hrm.configuration import RetNetHRMConfig
from limbeck.students.retnet_hrm.modeling import RetNetHRMForCausalLM
from limbeck.students.retnet_hrm.retention import Decays, Places, retention

TOKENS, CHUNK = 2048, 128
FULL = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 4096}
QUICK = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}


def models(size: dict) -> tuple:
    """A RetNet and a Llama of equal weights: 4 D² more in retention's products is 4/3 D less in the MLP's width."""
    torch.manual_seed(0)
    width = size["hidden_size"]
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "llama", **size, intermediate_size=3 * width, num_key_value_heads=size["num_attention_heads"],
        tie_word_embeddings=True, max_position_embeddings=1 << 17,
    ))  # fmt: skip
    retnet = RetNetHRMForCausalLM(
        RetNetHRMConfig(**size, intermediate_size=3 * width - 4 * width // 3, eos_token_id=None)
    )
    return retnet.eval(), llama.eval()


# -- the forms ------------------------------------------------------------------------------------------------------


def form(chunk: int, size: dict, length: int = TOKENS):
    """Retention of one row, forward and backward, in chunks of `chunk`; gives its time."""
    heads, width = size["num_attention_heads"], size["hidden_size"]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, factor * width // heads, requires_grad=True) for factor in (1, 1, 2))

    def run() -> Span:
        start = now()
        places = Places.of(length, 0, None, None, q.device)
        out, _ = retention(q, k, v, Decays.of(places, heads, chunk, q.dtype))
        out.sum().backward()
        return since(start)

    return run


def form_difference() -> float:
    """The largest difference of logits between the forms, in float64, of a model that has everything."""
    torch.manual_seed(0)
    config = RetNetHRMConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, H_cycles=2,
        L_cycles=3, memory=True, memory_heads=2, memory_chunk=4, eos_token_id=None,
    )  # fmt: skip
    model = RetNetHRMForCausalLM(config).double().eval()
    for parameter in model.parameters():  # so large that everything shows
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.12)
    ids, found = torch.randint(0, 64, (2, 50)), []
    with torch.no_grad():
        for chunk in (50, 1, 16):
            model.config.chunk_size = chunk
            found.append(model(ids, use_cache=False).logits)
        cache, parts = None, []
        for start, end in pairwise((0, 7, 8, 31, 50)):
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        found.append(torch.cat(parts, dim=1))
    return max(float((one - found[0]).abs().max()) for one in found[1:])


# -- training -------------------------------------------------------------------------------------------------------


def step(model, length: int, vocab: int):
    """A training step over `TOKENS` tokens (one row, where rows are longer); gives its time."""
    ids = torch.randint(0, vocab, (max(1, TOKENS // length), length))

    def run() -> Span:
        start = now()
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        span = since(start)
        model.zero_grad(set_to_none=False)
        return span

    return run


# -- decoding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read(model, length: int, vocab: int):
    """The RetNet's cache after a context of `length` tokens, read 2,048 at a time."""
    cache = None
    for start in range(0, length, TOKENS):
        ids = torch.randint(0, vocab, (1, min(TOKENS, length - start)))
        cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def filled(model, length: int) -> DynamicCache:
    """A key/value cache of `length` tokens."""
    config, cache = model.config, DynamicCache()
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def decode(model, cache, tokens: int):
    """So many tokens, one at a time; gives the time of one."""
    token = torch.ones(1, 1, dtype=torch.long)

    @torch.no_grad()
    def run() -> Span:
        model.eval()
        start = now()
        for _ in range(tokens):
            model(token, past_key_values=cache, use_cache=True)
        return since(start) / tokens

    return run


def bytes_of(cache) -> int:
    """Memory of a cache's tensors."""
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return cache.nbytes()


def decoding(retnet, llama, lengths, vocab: int, repeats: int) -> tuple[dict, dict[str, Repeats]]:
    """Milliseconds a token and bytes of the cache for both models at each context, and the repeats."""
    caches = {("retnet", n): read(retnet, n, vocab) for n in lengths}
    caches |= {("llama", n): filled(llama, n) for n in lengths}
    cases = {
        f"{name} {n}": decode(retnet if name == "retnet" else llama, cache, 48) for (name, n), cache in caches.items()
    }
    found = interleaved(cases, repeats)
    table = {
        name: {
            n: {"ms": 1e3 * found[f"{name} {n}"].seconds, "cache_mb": bytes_of(caches[name, n]) / 1e6} for n in lengths
        }
        for name in ("retnet", "llama")
    }
    return table, found


@torch.no_grad()
def resident_while_decoding(model, marks) -> dict[int, float]:
    """Resident memory of this process after so many tokens have been decoded, one at a time."""
    token, cache, found = torch.ones(1, 1, dtype=torch.long), None, {}
    for number in range(1, max(marks) + 1):
        cache = model(token, past_key_values=cache, use_cache=True).past_key_values
        if number in marks:
            found[number] = resident_bytes() / 1e6
    return found


def crossing(table: dict, lengths) -> int | None:
    """The first context at which a token of the RetNet takes less time than one of the Llama."""
    return next((n for n in lengths if table["retnet"][n]["ms"] < table["llama"][n]["ms"]), None)


def main() -> int:
    given = arguments(__doc__.splitlines()[0]).parse_args()
    size, repeats = (QUICK, 5) if given.quick else (FULL, 3)
    if given.quick:
        torch.set_num_threads(1)
    lengths = (256, 1024, 4096, 16384) if given.quick else (256, 1024, 2048, 4096, 16384, 65536)
    retnet, llama = models(size)
    vocab = size["vocab_size"]
    comparisons: dict[str, Comparison] = {}
    forms = interleaved({"parallel": form(TOKENS, size), "chunkwise": form(CHUNK, size)}, repeats)
    comparisons["chunkwise_speedup_vs_parallel_2048"] = ratio(forms["parallel"], forms["chunkwise"])
    rows = (1024,) if given.quick else (1024, 4096)
    steps = {
        f"{name} {n}": step(model, n, vocab) for n in rows for name, model in (("retnet", retnet), ("llama", llama))
    }
    training = interleaved(steps, repeats)
    comparisons["train_tokens_ratio_vs_llama"] = ratio(training[f"llama {rows[0]}"], training[f"retnet {rows[0]}"])
    for n in rows[1:]:
        comparisons[f"train_tokens_ratio_vs_llama_{n}"] = ratio(training[f"llama {n}"], training[f"retnet {n}"])
    table, decoded = decoding(retnet, llama, lengths, vocab, repeats)
    comparisons["decode_ms_ratio_16k_over_1k"] = ratio(decoded["retnet 16384"], decoded["retnet 1024"])
    comparisons["llama_decode_ms_ratio_16k_over_1k"] = ratio(decoded["llama 16384"], decoded["llama 1024"])
    both = {"retnet": retnet, "llama": llama}
    tokens = {name: max(TOKENS, int(name.split()[1])) for name in steps}
    result = {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in both.items()},
        "max_form_difference": form_difference(),
        "decode": table,
        "decode_faster_than_llama_from": crossing(table, lengths),
        "training_tokens_per_second": {name: tokens[name] / case.seconds for name, case in training.items()},
        "training_peak_mb": {name: peak_memory(case) / 1e6 for name, case in steps.items()},
        "forms": medians(forms),
    }
    if not given.quick:
        result["resident_mb_after_tokens"] = resident_while_decoding(models(QUICK)[0], (1024, 4096, 16384, 65536))
    return report(result, given.json, comparisons, ["chunkwise_speedup_vs_parallel_2048"])


if __name__ == "__main__":
    sys.exit(main())
