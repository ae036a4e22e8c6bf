"""What is asked of a model before it is trusted: whole weights, documents kept apart, known logits."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import limbeck, save_model, tiny_model
from limbeck import DistillationTrainer, LocalTeacher
from limbeck.errors import ConfigError, LimbeckError
from limbeck.models import OutputHead, keeps_documents_apart, load_causal_lm, verified_transform
from limbeck.targets.spec import TargetSpec
from test_optim import EXPERTS
from test_trainer import arguments

SMALL = {"vocab_size": 300}
LEAKING = {
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "jamba": {
        "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
        "head_dim": 16,
    },
    "mamba": {"state_size": 8, "intermediate_size": 64},
}  # fmt: skip
ISOLATING = {"llama": {}, "qwen3_moe": EXPERTS, "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*LEAKING, *ISOLATING])
def test_the_first_document_must_not_move_the_second(kind, dtype):
    """Layers that carry a state leak little before training, and up to a fifth of the logits after it."""
    model = tiny_model(**{**SMALL, "model_type": kind, **(LEAKING | ISOLATING)[kind]}).to(dtype)
    assert keeps_documents_apart(model) == (kind in ISOLATING)


def test_large_groups_of_experts_may_round():
    """The order of a float32 sum may depend on how many tokens an expert got; that is no leak."""
    sizes = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96, "head_dim": 32,
             "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8}  # fmt: skip
    model = tiny_model(**{**SMALL, **EXPERTS, **sizes})
    model.set_experts_implementation("eager")
    assert keeps_documents_apart(model)


def test_students_and_teachers_from_python_are_asked_too(packed, tmp_path):
    mamba = tiny_model(model_type="mamba", **LEAKING["mamba"])
    with pytest.raises(ConfigError, match=r'student \(MambaForCausalLM\) does not keep .* attention="packed"'):
        DistillationTrainer(mamba, arguments(tmp_path), train_dataset=packed)
    DistillationTrainer(mamba, arguments(tmp_path, attention="packed"), train_dataset=packed)
    with pytest.raises(ConfigError, match=r"teacher \(MambaForCausalLM\) does not keep"):
        LocalTeacher(mamba, top_k=4)
    teacher = LocalTeacher(mamba, top_k=4, attention="packed")
    with pytest.raises(ConfigError, match="does not keep"):
        teacher.with_spec(TargetSpec(4, (1.0,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(name) for name in list(t) if "up_proj" in name], r"1 tensors are missing \(.*up_proj.weight"),
        (lambda t: t.update({"model.layers.9.extra": torch.zeros(2)}), r"1 tensors are not of this model \(.*extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(5)}), "model.norm.weight"),
    ],
)
def test_weights_must_be_exactly_the_models(tmp_path, change, message):
    folder = save_model(tiny_model(), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LimbeckError, match=message):
        load_causal_lm(str(folder), dtype="float32")


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "opt"])
def test_constants_beside_the_weights_are_no_weights(tmp_path, kind):
    """Older checkpoints hold attention masks and version numbers, which models make for themselves."""
    sizes = {
        "gpt_neo": {"attention_types": [[["global"], 1]], "num_layers": 1, "num_heads": 2},
        "opt": {"word_embed_proj_dim": 32, "ffn_dim": 32},
        "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 1},
    }
    folder = save_model(tiny_model(**{**SMALL, "model_type": kind, **sizes[kind]}), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    tensors |= {
        "gpt2": {"transformer.h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)},
        "gpt_neo": {
            "transformer.h.0.attn.attention.bias": mask,
            "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
        },
        "opt": {"decoder.version": torch.zeros(1)},
    }[kind]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_causal_lm(str(folder), dtype="float32")


def test_a_missing_experts_matrix_is_named(tmp_path):
    folder = save_model(tiny_model(**EXPERTS), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "experts" in name and "up" in name)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LimbeckError, match="experts"):
        load_causal_lm(str(folder), dtype="float32")


def test_a_teacher_without_its_up_projections_ends_the_command(tmp_path, recipe_tree, recipe_file):
    folder = save_model(tiny_model(seed=7), tmp_path / "teacher")
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "up_proj" not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = limbeck("run", recipe_file, "--teacher-model", folder, check=False)
    assert done.returncode == 1
    assert "tensors are missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_checkpoints_with_missing_tensors_are_not_resumed(packed, tmp_path):
    trainer = DistillationTrainer(
        tiny_model(), arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), train_dataset=packed
    )
    trainer.train()
    path = tmp_path / "step_1" / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "up_proj" not in k}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LimbeckError, match="1 tensors are missing"):
        trainer._load_weights(str(path.parent))


@pytest.mark.parametrize(
    ("kind", "changes", "cap"),
    [
        ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 4.0,
                             "block_types": ["recurrent", "recurrent", "attention"]}, 4.0),
        ("xlstm", {"num_heads": 2, "embedding_dim": 32, "output_logit_soft_cap": 6.0}, 6.0),
    ],
)  # fmt: skip
def test_soft_caps_of_any_spelling_are_known(kind, changes, cap):
    model = tiny_model(**{**SMALL, "model_type": kind, "head_dim": 16, **changes})
    assert verified_transform(model).softcap == cap


def test_a_change_of_large_logits_alone_is_noticed():
    """Freshly made models have logits near 0, where a soft-cap of any spelling is the identity."""
    model = tiny_model(**SMALL)
    plain = model.forward

    def capped(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        outputs.logits = 30.0 * torch.tanh(outputs.logits / 30.0)
        return outputs

    assert verified_transform(model).softcap is None
    model.forward = capped
    with pytest.raises(LimbeckError, match="changes its logits after lm_head"):
        verified_transform(model)


def test_padding_of_a_wider_teacher_gets_no_probability(packed):
    """Ids that the tokenizer has no token for are no tail: the targets are those of the sliced logits."""
    wide = tiny_model(vocab_size=4160, seed=3)
    with torch.no_grad():
        wide.get_input_embeddings().weight[4096:] = 5.0 * wide.get_input_embeddings().weight[:64]
    rows = packed.rows([0, 1])
    targets = LocalTeacher(wide, top_k=6, vocab_size=4096).targets(rows)
    with torch.no_grad():
        logits = wide(**rows.model_inputs("per_document")).logits[..., :4096].double()
    expected, ids = logits.log_softmax(-1).topk(6)
    assert targets.vocab_size == 4096
    assert torch.equal(targets.token_ids.long(), ids)
    torch.testing.assert_close(targets.logprobs.double(), expected, atol=1e-5, rtol=0)
    assert OutputHead(wide, 4096).vocab_size == 4096


def test_a_config_that_cuts_pretrained_layers_is_refused(tmp_path):
    folder = save_model(tiny_model(num_hidden_layers=2), tmp_path / "m")
    with pytest.raises(LimbeckError, match="not of this model"):
        load_causal_lm(str(folder), num_hidden_layers=1)
