"""GGUF files against the models they came from, by forward passes that read nothing but the file.

The passes (`llama_graphs.py`) are llama.cpp's; the reference is transformers' own model, loaded from the folder that
was exported. `e2e/test_llama_cpp.py` holds the same files against llama.cpp itself.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from conftest import save_model, tiny_model
from limbeck.config import TernaryConfig
from limbeck.errors import LimbeckError
from limbeck.export.gguf import GGUFExport
from limbeck.export.verify import weights_equal
from limbeck.models import load_causal_lm
from limbeck.students.build import make_ternary
from llama_graphs import TYPES, File, file_logits

FILE_TYPES = {"f16": 1, "q4_0": 2, "tq1_0": 36, "tq2_0": 37, "q2_0": 41}
TOLERANCE = 3e-4  # of the logits' standard deviation; float32 in transformers differs from float64 here by less
IDS = torch.tensor([17, 901, 3, 2044, 3999, 512, 17, 260, 88, 1500, 3, 2718])

# Widths of the dense models differ, so that no tensor can stand in another's place; heads are not hidden_size / heads
# wide, but in llama-linear and where llama.cpp wants them so.
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
LINEAR = {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}
FILLED = {key: value for key, value in DENSE.items() if key != "head_dim"} | {"pad_token_id": None}
GEMMA3 = {
    **DENSE, "model_type": "gemma3_text", "num_hidden_layers": 3, "pad_token_id": None, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "query_pre_attn_scalar": 23,
    "rope_parameters": {
        "full_attention": LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
    },
}  # fmt: skip
PHI3 = {
    **FILLED, "model_type": "phi3", "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
SMOLLM3 = {**DENSE, "model_type": "smollm3", "num_hidden_layers": 5, "pad_token_id": None}
GRANITE = {
    **DENSE, "model_type": "granite", "embedding_multiplier": 1.5, "residual_multiplier": 0.75,
    "attention_multiplier": 0.1, "logits_scaling": 1.25,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 80}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
WIDE_EXPERTS = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 256}
CASES = {
    "llama": {**DENSE, "model_type": "llama", "tie_word_embeddings": False},
    "llama-linear": {
        **DENSE, "model_type": "llama", "head_dim": None,
        "rope_parameters": LINEAR,
    },
    "qwen3": {**DENSE, "model_type": "qwen3"},
    "qwen3-yarn": {**DENSE, "model_type": "qwen3", "tie_word_embeddings": False, "rope_parameters": YARN},
    "llama-yarn": {
        **DENSE, "model_type": "llama", "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "attention_factor": 1.5,
        },
    },
    "qwen3moe": {**DENSE, **EXPERTS, "model_type": "qwen3_moe", "tie_word_embeddings": False},
    "qwen3next": {**DENSE, **EXPERTS, **DELTA_NET, "tie_word_embeddings": False},
    "qwen2": {**FILLED, "model_type": "qwen2"},
    "llama-mistral": {**DENSE, "model_type": "mistral", "sliding_window": 320},
    "gemma3": {**GEMMA3, "final_logit_softcapping": 30.0},
    "gemma3-full": {**GEMMA3, "layer_types": ["full_attention"] * 3},
    "gemma3-27b": {**GEMMA3, "num_hidden_layers": 62, "layer_types": None},
    "phi3": PHI3,
    "smollm3": SMOLLM3,
    "smollm3-yarn": {**SMOLLM3, "tie_word_embeddings": False, "rope_parameters": YARN},
    "olmo2": {**FILLED, "model_type": "olmo2"},
    "olmo2-apart": {**FILLED, "model_type": "olmo2", "tie_word_embeddings": False},
    "granite": GRANITE,
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
for case in ("llama-mistral", "gemma3", "smollm3", "granite"):
    TERNARY_CASES[case] = {**CASES[case], **WIDE}
for case in ("qwen2", "phi3", "olmo2"):
    TERNARY_CASES[case] = {**CASES[case], **{key: value for key, value in WIDE.items() if key != "head_dim"}}
TERNARY_FILES = [(case, kind) for case in TERNARY_CASES for kind in ("tq2_0", "q2_0", "q4_0", "f16")]
TERNARY_FILES.append(("qwen3moe", "tq1_0"))


# Models whose every part shows in the logits.


def lively_model(seed, **settings):
    """A random model with large and uneven weights, all of them exact in float16."""
    model = tiny_model(seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name.endswith("norm.weight"):
                kind = settings["model_type"]
                around = 0.0 if kind == "gemma3_text" or (kind == "qwen3_next" and "linear_attn" not in name) else 1.0
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
            export = GGUFExport(folder.path, kind or "auto", "f16")
            assert export.write(path)["type"] == (kind or "f16")
            assert weights_equal(export, path) == []
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
    assert ("output.weight" in file.values) == (not folder.config.tie_word_embeddings or case == "olmo2")


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
    if case == "phi3":
        wanted = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}
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


OTHER_NUMBERS = {
    "gemma3": {
        "attention.sliding_window": 5, "attention.sliding_window_pattern": [True, True, False],
        "rope.freq_base_swa": 10000.0, "rope.scaling.factor": 4.0, "final_logit_softcapping": 40.0,
    },
    "phi3": {"rope.dimension_count": 16},
    "granite": {"embedding_scale": 1.0, "residual_scale": 1.0, "attention.scale": 0.0, "logit_scale": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if "-" not in case])
def test_every_tensor_and_number_shows_in_the_logits(exported, case):
    folder, file = exported(case)
    changes = [{"values": {name: values.roll(1, dims=0)}} for name, values in file.values.items()]
    changes += [{"numbers": {"rope.freq_base": 10000.0}}, {"numbers": {"attention.layer_norm_rms_epsilon": 0.3}}]
    if "expert_used_count" in file.numbers:
        changes.append({"numbers": {"expert_used_count": 3}})
    if case == "qwen3next":
        changes.append({"numbers": {"rope.dimension_count": 40}})
    changes += [{"numbers": {key: value}} for key, value in OTHER_NUMBERS.get(case, {}).items()]
    for change in changes:
        assert distance(file_logits(file.changed(**change), IDS), folder.logits) > 30 * TOLERANCE, change


MORE_NUMBERS = {
    "gemma3-27b": {
        "attention.sliding_window": 4, "rope.freq_base_swa": 90.0,
        "attention.sliding_window_pattern": [number % 6 != 0 for number in range(1, 63)],
    },
    "gemma3": {
        "attention.sliding_window": 4, "attention.sliding_window_pattern": [True, False, True],
        "rope.freq_base_swa": 90.0, "final_logit_softcapping": 30.0,
    },
    "phi3": {"attention.sliding_window": 0, "rope.dimension_count": 8},
    "granite": {
        "embedding_scale": 1.5, "residual_scale": 0.75, "attention.scale": pytest.approx(0.1), "logit_scale": 1.25,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_files_numbers_are_the_configs(exported, case):
    folder, file = exported(case)
    config = folder.config
    width = 40 if "head_dim" in CASES[case] and case != "llama-linear" else 16
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
        "rope.freq_base": 700.0,
        "rope.dimension_count": width,
    }
    if case == "llama-linear":
        wanted |= {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}
    if case in ("qwen3-yarn", "smollm3-yarn"):
        wanted |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 80,
            "rope.scaling.attn_factor": pytest.approx(1.0), "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        }  # fmt: skip
    if case == "llama-yarn":
        wanted |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": pytest.approx(1.5 / (1 + 0.1 * math.log(4.0))),
            "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
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
    wanted |= MORE_NUMBERS.get(case, {})
    if case.startswith("gemma3"):
        wanted |= {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}
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
        ("llama-yarn", {"rope_parameters": {**YARN, "beta_fast": 8.0}}, "beta_fast: 8.0 and llama.cpp runs llama with"),
        ("qwen3-yarn", {"rope_parameters": {**YARN, "beta_slow": 2.0}}, "beta_slow: 2.0 and llama.cpp runs qwen3 with"),
        ("llama-linear", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor is 0.5 and llama.cpp's llama rotates whole heads"),
        ("llama-mistral", {"sliding_window": 64}, "sliding_window is 64 and the context 320"),
        ("qwen2", {"head_dim": 40}, "6 heads of head_dim 40 are 240 wide and hidden_size is 96"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window is 64"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"),
        ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation is gelu"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"sliding_window": None}, "sliding_window is None"),
        ("gemma3", {"rope_parameters": {**GEMMA3["rope_parameters"], "full_attention": YARN}}, "RoPE is of type"),
        ("gemma3", {"rope_parameters": {**GEMMA3["rope_parameters"], "sliding_attention": {
            "rope_type": "linear", "rope_theta": 90.0, "factor": 2.0}}}, "'sliding': 'linear'"),
        ("phi3", {"head_dim": 40}, "6 heads of head_dim 40"),
        ("phi3", {"sliding_window": 64}, "llama.cpp's phi3 attends to everything"),
        ("phi3", {"rope_parameters": {**PHI3["rope_parameters"], "partial_rotary_factor": 0.2}}, "rotates 3 of 16"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 700.0, "partial_rotary_factor": 1.0,
                                      "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}, "RoPE of type longrope"),
        ("smollm3", {"no_rope_layers": [1] * 5}, r"no_rope_layers is \[1, 1, 1, 1, 1\]"),
        ("smollm3", {"no_rope_layer_interval": 2}, r"no_rope_layers is \[1, 0, 1, 0, 1\]"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias is True"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window is 64"),
        ("olmo2", {"head_dim": 40}, "6 heads of head_dim 40"),
        ("olmo2", {"attention_bias": True}, "attention_bias is True"),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier is 0"),
    ],
)  # fmt: skip
def test_what_the_graphs_cannot_compute_is_refused(tmp_path, case, changes, message):
    folder = save_model(tiny_model(**{**CASES[case], **changes}), tmp_path / "m")
    with pytest.raises(LimbeckError, match=message):
        GGUFExport(folder).write(tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))
