"""GGUF files against the models they came from, by forward passes that read nothing but the file.

The passes follow llama.cpp's graphs of llama, qwen3, qwen3moe and qwen3next: its names, shapes and types of
tensors, its numbers and their defaults, its RoPE and its gated delta rule. No code of the exporter is shared:
files are read and decoded by the gguf package, and Q2_0, which gguf 0.19 does not know, by its layout here.
The reference is transformers' own model, loaded from the folder that was exported.

Shapes: T tokens, H heads, K key heads, D head width.
"""

import copy
import math
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from conftest import save_model, tiny_model
from limbeck.config import TernaryConfig
from limbeck.errors import LimbeckError
from limbeck.export.gguf import GGUFExport
from limbeck.models import load_causal_lm
from limbeck.students.build import make_ternary

Q2_0 = 42
FILE_TYPES = {"f16": 1, "q4_0": 2, "tq1_0": 36, "tq2_0": 37, "q2_0": 41}
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "tq1_0": 34, "tq2_0": 35, "q2_0": Q2_0}
TOLERANCE = 3e-4  # of the logits' standard deviation; float32 in transformers differs from float64 here by less
IDS = torch.tensor([17, 901, 3, 2044, 3999, 512, 17, 260, 88, 1500, 3, 2718])

# Widths of the dense models differ, so that no tensor can stand in another's place; heads are not hidden_size / heads
# wide, but in llama-linear.
DENSE = {
    "hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 40, "max_position_embeddings": 320, "rms_norm_eps": 0.03,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 56, "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}  # fmt: skip
DELTA_NET = {
    "model_type": "qwen3_next", "num_hidden_layers": 4, "full_attention_interval": 2,
    "shared_expert_intermediate_size": 72, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 28, "linear_value_head_dim": 28, "linear_conv_kernel_dim": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.4},
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 80}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
WIDE_EXPERTS = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 256}
CASES = {
    "llama": {**DENSE, "model_type": "llama", "tie_word_embeddings": False},
    "llama-linear": {
        **DENSE, "model_type": "llama", "head_dim": None,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0},
    },
    "qwen3": {**DENSE, "model_type": "qwen3"},
    "qwen3-yarn": {**DENSE, "model_type": "qwen3", "tie_word_embeddings": False, "rope_parameters": YARN},
    "llama-yarn": {
        **DENSE, "model_type": "llama", "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "attention_factor": 1.5, "beta_fast": 8.0, "beta_slow": 2.0,
        },
    },
    "qwen3moe": {**DENSE, **EXPERTS, "model_type": "qwen3_moe", "tie_word_embeddings": False},
    "qwen3next": {**DENSE, **EXPERTS, **DELTA_NET, "tie_word_embeddings": False},
}  # fmt: skip
TERNARY_CASES = {
    "llama": {**DENSE, **WIDE, "model_type": "llama"},
    "qwen3": {**DENSE, **WIDE, "model_type": "qwen3", "tie_word_embeddings": False},
    "qwen3moe": {**DENSE, **WIDE, **WIDE_EXPERTS, "model_type": "qwen3_moe"},
    "qwen3next": {
        **DENSE, **WIDE, **WIDE_EXPERTS, **DELTA_NET, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "shared_expert_intermediate_size": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.25},
    },
}  # fmt: skip
TERNARY_FILES = [(case, kind) for case in TERNARY_CASES for kind in ("tq2_0", "q2_0", "q4_0", "f16")]
TERNARY_FILES.append(("qwen3moe", "tq1_0"))


# What the file holds.


class File:
    """Numbers and tensors of a GGUF file, and which of its tensors were asked for."""

    def __init__(self, path):
        with pytest.MonkeyPatch.context() as patch:
            if Q2_0 not in set(gguf.GGMLQuantizationType):
                number = int.__new__(gguf.GGMLQuantizationType, Q2_0)
                number._name_, number._value_ = "Q2_0", Q2_0
                patch.setattr(gguf.GGMLQuantizationType, "_missing_", lambda value: number if value == Q2_0 else None)
            patch.setitem(gguf.GGML_QUANT_SIZES, Q2_0, (64, 18))
            reader = gguf.GGUFReader(path)
        self.architecture = reader.fields["general.architecture"].contents()
        self.file_type = reader.fields["general.file_type"].contents()
        self.tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
        prefix = f"{self.architecture}."
        self.numbers = {
            key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)
        }
        self.types = {tensor.name: int(tensor.tensor_type) for tensor in reader.tensors}
        self.values = {tensor.name: decoded(tensor) for tensor in reader.tensors}
        self.asked = set()

    def number(self, key, default=None):
        """A number of the architecture; one without a default has to be there."""
        return self.numbers[key] if default is None else self.numbers.get(key, default)

    def tensor(self, name, *shape):
        """A tensor, in the shape that llama.cpp makes it with; vectors, routers and convolutions are float32."""
        self.asked.add(name)
        assert tuple(self.values[name].shape) == shape, name
        exact = len(shape) == 1 or "ffn_gate_inp" in name or "conv1d" in name
        assert self.types[name] == TYPES["f32"] or not exact, name
        return self.values[name]

    def changed(self, values=None, numbers=None):
        """The same file with other tensors or numbers in it."""
        other = copy.copy(self)
        other.values, other.numbers = {**self.values, **(values or {})}, {**self.numbers, **(numbers or {})}
        return other


def decoded(tensor):
    """Values of a stored tensor in float64."""
    shape = [int(size) for size in reversed(tensor.shape)]
    if int(tensor.tensor_type) != Q2_0:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float64)).reshape(shape)
    blocks = np.asarray(tensor.data).reshape(-1, 18)
    d = blocks[:, :2].copy().view("<f2").astype(np.float64)
    codes = np.zeros((len(blocks), 64))
    for weight in range(64):
        codes[:, weight] = (blocks[:, 2 + weight // 4] >> (2 * (weight % 4))) & 3
    return torch.from_numpy((codes - 1) * d).reshape(shape)


# llama.cpp's graphs.


def file_logits(file, ids):
    """Logits `[T, vocabulary]` of one sequence, from a file alone."""
    width, vocabulary, eps = file.number("embedding_length"), file.tokens, eps_of(file)
    second_norm = "post_attention_norm" if file.architecture == "qwen3next" else "ffn_norm"
    x = file.tensor("token_embd.weight", vocabulary, width)[ids]
    for layer in range(file.number("block_count")):

        def weight(name, *shape, blk=f"blk.{layer}."):
            return file.tensor(blk + name, *shape)

        recurrent = file.architecture == "qwen3next" and (layer + 1) % file.number("full_attention_interval", 4) != 0
        mix = delta_net if recurrent else attention
        x = x + mix(file, weight, rms_norm(x, weight("attn_norm.weight", width), eps))
        feed = experts if file.architecture in ("qwen3moe", "qwen3next") else dense
        x = x + feed(file, weight, rms_norm(x, weight(f"{second_norm}.weight", width), eps))
    x = rms_norm(x, file.tensor("output_norm.weight", width), eps)
    head = "output.weight" if "output.weight" in file.values else "token_embd.weight"
    return x @ file.tensor(head, vocabulary, width).T


def eps_of(file):
    return file.number("attention.layer_norm_rms_epsilon")


def rms_norm(x, factors, eps):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * factors


def silu(x):
    return x * x.sigmoid()


def attention(file, weight, x):
    """Causal attention with grouped keys and values; qwen3next's q holds, head by head, a query and a gate."""
    width, heads, groups = x.shape[-1], file.number("attention.head_count"), file.number("attention.head_count_kv")
    size = file.number("attention.key_length", width // heads)
    assert file.number("attention.value_length", width // heads) == size
    gated = file.architecture == "qwen3next"
    parts = 2 if gated else 1
    q = (x @ weight("attn_q.weight", heads * size * parts, width).T).reshape(-1, heads, size * parts)
    k = (x @ weight("attn_k.weight", groups * size, width).T).reshape(-1, groups, size)
    v = (x @ weight("attn_v.weight", groups * size, width).T).reshape(-1, groups, size)
    q, gate = q[..., :size], q[..., size:]
    if file.architecture != "llama":
        q = rms_norm(q, weight("attn_q_norm.weight", size), eps_of(file))
        k = rms_norm(k, weight("attn_k_norm.weight", size), eps_of(file))
    q, k = rope(file, q), rope(file, k)
    mixed = torch.empty_like(q)
    for head in range(heads):
        group = head // (heads // groups)
        scores = q[:, head] @ k[:, group].T / math.sqrt(size)
        future = torch.ones_like(scores).triu(1).bool()
        mixed[:, head] = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v[:, group]
    if gated:
        mixed = mixed * gate.sigmoid()
    return mixed.reshape(len(x), -1) @ weight("attn_output.weight", width, heads * size).T


def rope(file, x):
    """Rotated `[T, H, D]`: neighbours are a pair in llama (NORM), i and i + n/2 in the others (NEOX)."""
    size = x.shape[-1]
    count = file.number("rope.dimension_count", size)
    assert count == size or (file.architecture == "qwen3next" and count % 2 == 0)
    base = file.number("rope.freq_base", 10000.0)
    kind, factor = file.number("rope.scaling.type", "none"), file.number("rope.scaling.factor", 1.0)
    scale = 1.0
    if kind == "yarn":
        scale = (1 + 0.1 * math.log(factor)) * file.number("rope.scaling.attn_factor", 1.0)
        trained = file.number("rope.scaling.original_context_length", file.number("context_length"))
        turns = file.number("rope.scaling.yarn_beta_fast", 32.0), file.number("rope.scaling.yarn_beta_slow", 1.0)
        fast, slow = (count * math.log(trained / (turn * 2 * math.pi)) / (2 * math.log(base)) for turn in turns)
        low, high = max(0, math.floor(fast)), min(count - 1, math.ceil(slow))
    result = x.clone()
    for pair in range(count // 2):
        plain = torch.arange(len(x), dtype=torch.float64)[:, None] * base ** (-2 * pair / count)
        if kind == "yarn":
            kept = 1 - min(1, max(0, (pair - low) / max(0.001, high - low)))
            angle = plain / factor * (1 - kept) + plain * kept
        else:
            angle = plain / factor if kind == "linear" else plain
        one, two = (2 * pair, 2 * pair + 1) if file.architecture == "llama" else (pair, pair + count // 2)
        result[..., one] = (x[..., one] * angle.cos() - x[..., two] * angle.sin()) * scale
        result[..., two] = (x[..., one] * angle.sin() + x[..., two] * angle.cos()) * scale
    return result


def delta_net(file, weight, x):
    """Gated delta rule, one token after the other; a key head serves the value heads that stand next to each other."""
    width, size = x.shape[-1], file.number("ssm.state_size")
    keys, heads, kernel = (file.number(f"ssm.{key}") for key in ("group_count", "time_step_rank", "conv_kernel"))
    assert file.number("ssm.inner_size") == heads * size
    channels = (2 * keys + heads) * size
    mixed = x @ weight("attn_qkv.weight", channels, width).T
    z = (x @ weight("attn_gate.weight", heads * size, width).T).reshape(-1, heads, size)
    ba = (x @ weight("ssm_ba.weight", 2 * heads, width).T).reshape(-1, keys, 2, heads // keys)
    beta = ba[:, :, 0].reshape(-1, heads).sigmoid()
    alpha = ba[:, :, 1].reshape(-1, heads) + weight("ssm_dt.bias", heads)
    decay = (weight("ssm_a", heads) * alpha.exp().log1p()).exp()
    convolution = weight("ssm_conv1d.weight", channels, kernel)
    padded = torch.cat([mixed.new_zeros(kernel - 1, channels), mixed])
    mixed = silu(sum(padded[step : step + len(x)] * convolution[:, step] for step in range(kernel)))
    q, k, v = (part.reshape(len(x), -1, size) for part in mixed.split([keys * size, keys * size, heads * size], dim=1))
    q, k = (part / part.norm(dim=-1, keepdim=True).clamp_min(eps_of(file)) for part in (q, k))
    q, k = (part.repeat_interleave(heads // keys, dim=1) for part in (q, k))
    out, state = torch.empty_like(v), x.new_zeros(heads, size, size)  # from keys to values
    for t in range(len(x)):
        state = state * decay[t, :, None, None]
        known = (k[t, :, :, None] * state).sum(dim=1)
        state = state + k[t, :, :, None] * ((v[t] - known) * beta[t, :, None])[:, None, :]
        out[t] = (q[t, :, :, None] * state).sum(dim=1) / math.sqrt(size)
    out = rms_norm(out, weight("ssm_norm.weight", size), eps_of(file)) * silu(z)
    return out.reshape(len(x), -1) @ weight("ssm_out.weight", width, heads * size).T


def dense(file, weight, x):
    return gated_layer(weight, x, "", file.number("feed_forward_length"))


def gated_layer(weight, x, suffix, inner):
    width = x.shape[-1]
    gate = x @ weight(f"ffn_gate{suffix}.weight", inner, width).T
    up = x @ weight(f"ffn_up{suffix}.weight", inner, width).T
    return (silu(gate) * up) @ weight(f"ffn_down{suffix}.weight", width, inner).T


def experts(file, weight, x):
    """The best experts by a softmax over all, their weights summing to 1; qwen3next adds a shared one with a gate."""
    width, inner = x.shape[-1], file.number("expert_feed_forward_length")
    count, used = file.number("expert_count"), file.number("expert_used_count")
    gates, ups = (weight(f"ffn_{part}_exps.weight", count, inner, width) for part in ("gate", "up"))
    downs = weight("ffn_down_exps.weight", count, width, inner)
    result = torch.zeros_like(x)
    for t, chances in enumerate((x @ weight("ffn_gate_inp.weight", count, width).T).softmax(dim=-1)):
        chosen = chances.argsort(descending=True)[:used]
        for expert in chosen:
            inside = silu(gates[expert] @ x[t]) * (ups[expert] @ x[t])
            result[t] += downs[expert] @ inside * chances[expert] / chances[chosen].sum()
    if file.architecture == "qwen3next":
        shared = gated_layer(weight, x, "_shexp", file.number("expert_shared_feed_forward_length"))
        result += shared * (x @ weight("ffn_gate_inp_shexp.weight", width)).sigmoid()[:, None]
    return result


# Models whose every part shows in the logits.


def lively_model(seed, **settings):
    """A random model with large and uneven weights, all of them exact in float16."""
    model = tiny_model(seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name.endswith("norm.weight"):
                around = 0.0 if settings["model_type"] == "qwen3_next" and "linear_attn" not in name else 1.0
                low, high = (-1.5, 1.0) if name.endswith(("A_log", "dt_bias")) else (around - 0.5, around + 0.5)
                value = torch.rand(p.shape, generator=generator) * (high - low) + low
            else:
                inputs = 1 if "embed_tokens" in name else p.shape[-1]
                value = torch.randn(p.shape, generator=generator) * (2.0 / inputs**0.5)
                rows = torch.rand(*p.shape[:-1], 1, generator=generator) + 0.5
                value = value * rows * torch.linspace(0.6, 1.4, p.shape[-1])  # scales differ by row and group
            p.copy_(value.half().float())
    return model


def exported_folder(root, settings, ternary):
    """A folder with its model's logits in transformers, read back from disk."""
    model = lively_model(3, **settings)
    if ternary:
        make_ternary(model, TernaryConfig(group_size=256, activation_bits=None))
    folder = save_model(model, root / "final")
    with torch.no_grad():
        loaded = load_causal_lm(str(folder), dtype="float32").eval()
        logits = loaded(input_ids=IDS[None], use_cache=False).logits[0]
    return SimpleNamespace(path=folder, config=loaded.config, logits=logits.double())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A case's folder and its file; a folder is made once, and a file once a type (None: of the dense model)."""
    folders, files = {}, {}

    def find(case, kind=None):
        ternary = kind is not None
        if (case, ternary) not in folders:
            settings = (TERNARY_CASES if ternary else CASES)[case]
            folders[case, ternary] = exported_folder(tmp_path_factory.mktemp(case), settings, ternary)
        folder = folders[case, ternary]
        if (case, kind) not in files:
            path = folder.path.parent / f"{kind}.gguf"
            assert GGUFExport(folder.path, kind or "auto", "f16").write(path)["type"] == (kind or "f16")
            files[case, kind] = File(path)
        return folder, files[case, kind]

    return find


def distance(found, wanted):
    """The largest difference, in standard deviations of what was wanted."""
    return float((found - wanted).abs().max() / wanted.std())


# What is held.


@pytest.mark.parametrize("case", CASES)
def test_a_dense_file_alone_gives_the_models_logits(exported, case):
    folder, file = exported(case)
    assert distance(file_logits(file, IDS), folder.logits) < TOLERANCE
    assert file.asked == set(file.values), "tensors that the architecture does not read"
    assert ("output.weight" in file.values) == (not folder.config.tie_word_embeddings)


@pytest.mark.parametrize(("case", "kind"), TERNARY_FILES, ids=["-".join(case) for case in TERNARY_FILES])
def test_the_file_alone_gives_the_models_logits(exported, case, kind):
    folder, file = exported(case, kind)
    assert distance(file_logits(file, IDS), folder.logits) < TOLERANCE
    assert file.asked == set(file.values), "tensors that the architecture does not read"
    assert file.file_type == FILE_TYPES[kind]
    assert {TYPES["f32"], TYPES["f16"], TYPES[kind]} == set(file.types.values())
    mixers = {"attn_q", "attn_k", "attn_v", "attn_output"}
    if case == "qwen3next":
        mixers |= {"attn_qkv", "attn_gate", "ssm_ba", "ssm_out", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
    suffix = "_exps" if case in ("qwen3moe", "qwen3next") else ""
    wanted = mixers | {f"ffn_{part}{suffix}" for part in ("gate", "up", "down")}
    if kind != "f16":
        in_blocks = {name.split(".")[2] for name, number in file.types.items() if number == TYPES[kind]}
        assert in_blocks == wanted


def test_an_embedding_in_q8_0_is_the_models_to_its_rounding(exported, tmp_path):
    folder, file = exported("qwen3-yarn")
    GGUFExport(folder.path, "auto", "q8_0").write(tmp_path / "m.gguf")
    small = File(tmp_path / "m.gguf")
    ends = ("token_embd.weight", "output.weight")
    for name in ends:
        assert small.types[name] == TYPES["q8_0"]
        groups = file.values[name].reshape(-1, 32)
        wrong = (small.values[name].reshape(-1, 32) - groups).abs()
        step = groups.abs().amax(dim=1, keepdim=True) / 127
        assert bool((wrong <= step * 0.57).all()), "half a step, and float16's rounding of 127 steps"
    mixed = file.changed({name: small.values[name] for name in ends})
    assert torch.equal(file_logits(small, IDS), file_logits(mixed, IDS))


@pytest.mark.parametrize("case", ["llama", "qwen3", "qwen3moe", "qwen3next"])
def test_every_tensor_and_number_shows_in_the_logits(exported, case):
    folder, file = exported(case)
    changes = [{"values": {name: values.roll(1, dims=0)}} for name, values in file.values.items()]
    changes += [{"numbers": {"rope.freq_base": 10000.0}}, {"numbers": {"attention.layer_norm_rms_epsilon": 0.02}}]
    if "expert_used_count" in file.numbers:
        changes.append({"numbers": {"expert_used_count": 3}})
    if case == "qwen3next":
        changes.append({"numbers": {"rope.dimension_count": 40}})
    for change in changes:
        assert distance(file_logits(file.changed(**change), IDS), folder.logits) > 30 * TOLERANCE, change


@pytest.mark.parametrize("case", CASES)
def test_the_files_numbers_are_the_configs(exported, case):
    folder, file = exported(case)
    config = folder.config
    width = 16 if case == "llama-linear" else 40
    wanted = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps, rel=1e-6),
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": width,
    }
    if case == "llama-linear":
        wanted |= {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}
    if case == "qwen3-yarn":
        wanted |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 80,
            "rope.scaling.attn_factor": pytest.approx(1.0), "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        }  # fmt: skip
    if case == "llama-yarn":
        wanted |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": pytest.approx(1.5 / (1 + 0.1 * math.log(4.0))),
            "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0,
        }  # fmt: skip
    if "moe" in case or "next" in case:
        wanted |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if "next" in case:
        wanted |= {
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
            "rope.dimension_count": 16,  # 0.4 of heads of 40
            "full_attention_interval": 2,
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        }
    assert file.numbers == wanted
    assert file.architecture == case.split("-")[0]
    assert file.file_type == FILE_TYPES["f16"]
    assert file.tokens == config.vocab_size


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen3next", {"linear_value_head_dim": 32}, "linear_key_head_dim is 28 and linear_value_head_dim 32"),
        ("qwen3next", {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.38}},
         "rotates 15 of 40 dimensions"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "dense layers between"),
        ("qwen3-yarn", {"rope_parameters": {**YARN, "truncate": False}}, "truncate: false"),
    ],
)  # fmt: skip
def test_what_the_graphs_cannot_compute_is_refused(tmp_path, case, changes, message):
    folder = save_model(tiny_model(**{**CASES[case], **changes}), tmp_path / "m")
    with pytest.raises(LimbeckError, match=message):
        GGUFExport(folder).write(tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))
