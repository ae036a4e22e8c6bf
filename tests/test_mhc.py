"""mHC-lite beside its definition: mixing matrices, the retrofit of trained models, their optimizer group, saving."""

import itertools
import math
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from conftest import tiny_model
from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher
from limbeck.config import MHCConfig, OptimizerConfig, StudentConfig, TernaryConfig
from limbeck.errors import ConfigError
from limbeck.models import SHIPPED, load_causal_lm
from limbeck.optim.groups import build_groups
from limbeck.registration import MHC_BASES
from limbeck.students.build import finish_student, make_ternary
from limbeck.students.mhc.connection import HyperConnection, connections, first_post_logits
from limbeck.students.mhc.models import add_streams
from limbeck.training.guard import DivergedError
from limbeck.training.streams import StreamWatch

N = pytest.mark.parametrize("streams", [1, 2, 3, 4])


def random_connection(streams, width=6, dynamic=True, std=1.0):
    torch.manual_seed(streams)
    made = HyperConnection(streams, width, 0, dynamic, 1e-6).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return made


@N
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_connection_is_the_definition(streams, dynamic):
    made = random_connection(streams, dynamic=dynamic)
    x = torch.randn(2, 3, streams, 6, dtype=torch.float64)
    scale, shift = torch.randn(2, 6, dtype=torch.float64)
    found = made(x, lambda u: scale * u.tanh() + shift)
    for row, place in itertools.product(range(2), range(3)):
        streams_here = x[row, place]
        logits = made.bias.clone()
        if dynamic:
            flat = streams_here.reshape(-1)
            flat = flat / (flat.pow(2).mean() + 1e-6).sqrt()
            for number in range(len(logits)):
                part = 0 if number < streams else 1 if number < 2 * streams else 2
                logits[number] = logits[number] + made.alpha[part] * (made.weight[number] @ flat)
        pre = 1 / (1 + (-logits[:streams]).exp())
        post = 2 / (1 + (-logits[streams : 2 * streams]).exp())
        shares = logits[2 * streams :].exp() / logits[2 * streams :].exp().sum()
        mixing = torch.zeros(streams, streams, dtype=torch.float64)
        for share, order in zip(shares, itertools.permutations(range(streams)), strict=True):
            for i, j in enumerate(order):
                mixing[i, j] += share
        out = scale * (pre @ streams_here).tanh() + shift
        wanted = mixing @ streams_here + post[:, None] * out
        torch.testing.assert_close(found[row, place], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("streams", [2, 4])
def test_pre_and_post_are_those_of_transformers_hyper_connection(streams):
    """mHC-lite and mHC differ in how logits become R alone."""
    width, made = 6, random_connection(streams).float()
    theirs = DeepseekV4HyperConnection(
        DeepseekV4Config(hidden_size=width, hc_mult=streams, hc_eps=0.0, rms_norm_eps=1e-6)
    )
    with torch.no_grad():
        theirs.fn.zero_()
        theirs.base.zero_()
        theirs.fn[: 2 * streams] = made.weight[: 2 * streams]
        theirs.base[: 2 * streams] = made.bias[: 2 * streams]
        theirs.scale.copy_(made.alpha)
        x = torch.randn(2, 5, streams, width)
        post, _, collapsed = theirs(x)
        pre, own_post, _ = made.coefficients(x)
    torch.testing.assert_close(own_post, post)
    torch.testing.assert_close((pre.unsqueeze(-1) * x).sum(-2), collapsed)


@N
def test_mixing_is_doubly_stochastic_whatever_the_logits(streams):
    made = random_connection(streams, std=4.0).float()
    _, _, mixing = made.coefficients(torch.randn(50, streams, 6) * 100)
    assert float((mixing.detach().sum(-1) - 1).abs().max()) < 1e-6
    assert float((mixing.detach().sum(-2) - 1).abs().max()) < 1e-6
    assert float(mixing.detach().min()) >= 0.0


def test_static_mixing_is_one_matrix_and_dynamic_one_a_token():
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    assert random_connection(3, dynamic=False).coefficients(x)[2].shape == (3, 3)
    mixing = random_connection(3).coefficients(x)[2]
    assert mixing.shape == (5, 3, 3)
    assert float((mixing[0] - mixing[1]).abs().max()) > 1e-3


@N
def test_first_shares_of_the_output_have_mean_one_and_differ(streams):
    for number in range(6):
        post = [2 / (1 + math.exp(-logit)) for logit in first_post_logits(streams, number)]
        assert sum(post) / streams == pytest.approx(1.0, abs=1e-12)
        assert len({round(p, 6) for p in post}) == min(streams, 3 if streams == 3 else 2)
    if streams > 1:  # the stream that takes most is another one in the next sublayer
        assert first_post_logits(streams, 0) != first_post_logits(streams, 1)


@pytest.mark.parametrize("form", ["dynamic", "static"])
@N
def test_the_shipped_teacher_computes_what_it_did(streams, form):
    """In float64; the model's own rounding in float32 is 1.4e-5 of logits up to 15, and what streams add is no more."""
    model = load_causal_lm("tiny-python", dtype="float64").eval()
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    seen = []
    with torch.no_grad():
        before = model(ids).logits
        add_streams(model, streams, form)
        layers = model.model.layers
        hook = layers[0].register_forward_hook(lambda module, given, out: seen.append(out))
        after = model(ids).logits
        hook.remove()
    assert float((after - before).abs().max()) < 1e-5
    with torch.no_grad():
        rounded = model.float()(ids).logits.double()
    assert float((rounded - before).abs().max()) < 2e-5
    parts = seen[0].unflatten(-1, (streams, -1))
    for one, other in itertools.combinations(range(min(streams, 2)), 2):
        assert float((parts[..., one, :] - parts[..., other, :]).abs().max()) > 0.1
    assert len(connections(model)) == 2 * len(layers)


def shape(base):
    keys = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    return {**keys, **(experts if "moe" in base else {})}


@pytest.mark.parametrize("base", MHC_BASES)
def test_every_architecture_keeps_its_function_is_saved_and_generates(base, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(base, **shape(base))).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(3, 64, (2, 12))
    with torch.no_grad():
        before = model(ids).logits
        add_streams(model, 4, "dynamic")
        assert float((model(ids).logits - before).abs().max()) < 1e-5 * float(before.abs().max())
        for connection in connections(model):  # and after training
            for parameter in connection.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        moved = model(ids).logits
    assert float((moved - before).abs().max()) > 1e-2
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert again.config.model_type == f"mhc_{base}"
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, moved)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(ids, **settings), again.generate(ids, use_cache=False, **settings))


def test_one_that_is_made_from_its_own_config_begins_as_a_retrofit():
    config = AutoConfig.for_model("mhc_llama", **shape("llama"), mhc_streams=3, mhc_form="static")
    model = AutoModelForCausalLM.from_config(config)
    assert [c.dynamic for c in connections(model)] == [False] * 6
    wanted = HyperConnection(3, 32, 2, False, 1e-6).bias
    assert torch.equal(connections(model)[2].bias, wanted)
    with pytest.raises(Exception, match="mhc_streams is 5"):
        AutoConfig.for_model("mhc_llama", **shape("llama"), mhc_streams=5)


def test_weights_without_streams_are_loaded_and_get_them_as_they_begin(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    keys = {**tiny_model().config.to_dict(), "model_type": "mhc_llama", "mhc_streams": 2}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=AutoConfig.for_model(**keys))
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert float((model.eval()(ids).logits - tiny_model()(ids).logits).abs().max()) < 1e-5


def test_what_cannot_have_streams_is_refused():
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="gpt2 is no decoder that takes streams"):
        add_streams(gpt2, 2, "dynamic")
    model = tiny_model()
    add_streams(model, 2, "dynamic")
    add_streams(model, 2, "dynamic")  # the stage after the one that added them
    assert len(connections(model)) == 2
    with pytest.raises(ConfigError, match="the weights have 2, dynamic"):
        add_streams(model, 4, "dynamic")


def test_streams_and_ternary_weights_together(tmp_path):
    model = tiny_model(hidden_size=64)
    section = StudentConfig(mhc=MHCConfig(streams=2), ternary=TernaryConfig(group_size=32))
    finish_student(model, section)
    names = model.config.quantization_config["weights"]
    assert names
    assert not any("mhc" in name for name in names)
    plain = tiny_model(hidden_size=64)
    make_ternary(plain, TernaryConfig(group_size=32))
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


# -- in training ----------------------------------------------------------------------------------------------------


def trained(model, packed, folder, **changes):
    arguments = DistillationArguments(**{
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        **changes,
    })  # fmt: skip
    teacher = LocalTeacher(tiny_model(seed=9), top_k=8)
    trainer = DistillationTrainer(model, arguments, teacher=teacher, train_dataset=packed, eval_dataset=packed)
    trainer.train()
    return trainer


@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_after_training_mixing_is_still_exact_and_everything_has_moved(packed, tmp_path, form):
    model = tiny_model(num_hidden_layers=2)
    add_streams(model, 3, form)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = OptimizerConfig(name="muon_adamw", mhc={"learning_rate": 0.3})
    trainer = trained(model, packed, tmp_path, optimizer=optimizer)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    x = torch.randn(4, 7, 3, 32)
    for connection in connections(model):
        mixing = connection.coefficients(x)[2]
        assert float((mixing.detach().sum(-1) - 1).abs().max()) < 1e-6
        assert float((mixing.detach().sum(-2) - 1).abs().max()) < 1e-6
    scores = trainer.evaluate()
    assert scores["eval_composite_gain"] == pytest.approx(1.0, abs=1e-5)
    assert 0.0 <= scores["eval_mixing_error"] < 1e-6
    assert all(connection.recorded is None for connection in connections(model))


def test_a_matrix_that_is_not_doubly_stochastic_is_found():
    model = tiny_model(num_hidden_layers=2)
    add_streams(model, 3, "static")
    watch = StreamWatch(model)
    with watch.recording(), torch.no_grad():
        model(torch.arange(5).unsqueeze(0))
    assert watch.measure("eval")["eval_composite_gain"] == pytest.approx(1.0, abs=1e-6)
    assert watch.measure("eval") == {}  # nothing is kept
    connections(model)[2].permutations *= 1.5
    with watch.recording(), torch.no_grad():
        model(torch.arange(5).unsqueeze(0))
    with pytest.raises(DivergedError, match="differs from 1 by 0.5"):
        watch.measure("eval")


def test_autocast_rounds_neither_mixing_nor_streams():
    made = random_connection(4, width=8).float()
    x = 100.0 + torch.randn(3, 4, 8)
    plain = made(x, torch.zeros_like)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(x, torch.zeros_like)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)
    assert float((found.mean(-2) - x.mean(-2)).detach().abs().max()) < 1e-4


def test_hidden_states_attentions_and_routers_are_recorded_as_before():
    model = tiny_model(num_hidden_layers=2)
    model.set_attn_implementation("eager")
    add_streams(model, 2, "dynamic")
    out = model(torch.arange(6).unsqueeze(0), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(1, 6, 32), (1, 6, 64), (1, 6, 32)]
    assert len(out.attentions) == 2
    torch.manual_seed(0)
    routed = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **shape("qwen3_moe")))
    add_streams(routed, 2, "dynamic")
    ids = torch.randint(3, 64, (2, 6))
    assert float(routed(ids, labels=ids, output_router_logits=True).aux_loss) > 0.0


class _Louder(LlamaForCausalLM):
    """Code of somebody's own."""


def test_code_of_somebodys_own_is_not_left_out():
    with pytest.raises(ConfigError, match="_Louder"):
        add_streams(_Louder(tiny_model().config), 2, "dynamic")


def test_configs_can_be_pickled():
    model = tiny_model()
    add_streams(model, 3, "static")
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()


def test_logits_that_are_no_numbers_end_the_evaluation(packed, tmp_path):
    model = tiny_model()
    add_streams(model, 2, "dynamic")
    trainer = trained(model, packed, tmp_path)
    with torch.no_grad():
        connections(model)[0].bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match="--mhc-lr"):
        trainer.evaluate()


def test_mixing_has_a_group_and_a_rate_of_its_own():
    model = tiny_model()
    add_streams(model, 2, "dynamic")
    optimizer = OptimizerConfig(name="muon_lion", mhc={"learning_rate": 7e-3})
    groups = {group["name"]: group for group in build_groups(model, optimizer, 0.02, 0.1)}
    own = groups["mhc · lion · no decay"]
    wanted = {id(p) for connection in connections(model) for p in connection.parameters()}
    assert {id(p) for p in own["params"]} == wanted
    assert own["lr"] == 7e-3
    assert own["weight_decay"] == 0.0
    default = {g["name"]: g for g in build_groups(model, OptimizerConfig(name="muon_lion"), 0.02, 0.1)}
    assert default["mhc · lion · no decay"]["lr"] == default["all · lion"]["lr"]


def test_the_shipped_folder_is_untouched():
    assert "mhc" not in (SHIPPED["tiny-python"] / "config.json").read_text()
