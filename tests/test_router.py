"""Router losses beside transformers' own, in the trainer, and the dense loss beside the fused one."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from conftest import loss_request, tiny_model
from limbeck import DistillationTrainer, LocalTeacher, SparseTargets, fused_distillation_loss
from limbeck.data.dataset import PackedRows
from limbeck.errors import ConfigError
from limbeck.losses.dense import dense_distillation_loss
from limbeck.losses.divergences import JSD, TVD, ForwardKL, ReverseKL, SkewedKL
from limbeck.losses.router import RouterTap, Routing, _scores_by_sigmoid, router_losses
from limbeck.training.head import attach_objectives
from test_optim import EXPERTS
from test_trainer import arguments, largest_difference, weights


def by_logits(logits, top_k):
    return [Routing(logits, logits.topk(top_k, dim=-1).indices)]


def test_load_balance_is_transformers_over_top_k():
    torch.manual_seed(0)
    logits = torch.randn(50, 8)
    ours = router_losses(by_logits(logits, 2), None)
    theirs = load_balancing_loss_func((logits,), 8, 2)
    torch.testing.assert_close(ours.load_balance * 2, theirs)
    torch.testing.assert_close(ours.aux, logits.logsumexp(-1).square().mean())
    assert float(ours.load.sum()) == pytest.approx(1.0)


def test_perfect_balance_is_one_and_padding_does_not_count():
    logits = 20.0 * torch.eye(4).repeat(2, 1)
    assert float(router_losses(by_logits(logits, 1), None).load_balance) == pytest.approx(1.0, abs=1e-4)
    padded = torch.cat([logits, torch.full((5, 4), 7.0)])
    mask = torch.arange(13) < 8
    whole, masked = router_losses(by_logits(logits, 1), None), router_losses(by_logits(padded, 1), mask)
    torch.testing.assert_close(whole.load_balance, masked.load_balance)
    torch.testing.assert_close(whole.aux, masked.aux)
    entropy = router_losses(by_logits(logits, 1), None, "entropy").aux
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).mean(), atol=1e-6, rtol=1e-4)
    with pytest.raises(ConfigError, match="choose z or entropy"):
        router_losses(by_logits(logits, 1), None, "other")


DEEPSEEK = {
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 0, "num_key_value_heads": 2,
}  # fmt: skip
BIASED = {
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                    "v_head_dim": 16},
    "glm4_moe": {**DEEPSEEK, "head_dim": 16},
    "dots1": {**DEEPSEEK, "head_dim": 16, "n_shared_experts": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", BIASED)
def test_the_load_is_that_of_the_experts_really_chosen(kind):
    """A correction bias sends every token to experts 0 and 1, whatever their logits; scores are sigmoids."""
    model = tiny_model(vocab_size=300, model_type=kind, **BIASED[kind])
    gate = next(module for module in model.modules() if hasattr(module, "e_score_correction_bias"))
    gate.e_score_correction_bias[:2] += 10.0
    attach_objectives(model)
    ids = torch.arange(24).reshape(2, 12)
    rows = PackedRows(torch.arange(2), ids, torch.zeros_like(ids))
    seen = []
    gate.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    request = loss_request(rows.labels, load_balance=0.3)
    found = model(**rows.model_inputs("packed"), loss_request=request)
    load = (found.metrics["expert_load"] / request.batch.positions).float()
    torch.testing.assert_close(load, torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]))
    scores = seen[-1].double().sigmoid()[rows.labels.flatten() >= 0]
    share = (scores / scores.sum(-1, keepdim=True)).mean(0)
    balance = float(found.metrics["load_balance_loss"] / request.batch.positions)
    assert balance == pytest.approx(8 * 0.5 * float(share[0] + share[1]), rel=1e-5)


def test_a_router_inside_an_attention_layer_counts_once():
    sizes = {"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2, "num_attention_heads": 4}
    model = tiny_model(vocab_size=300, model_type="jetmoe", **sizes)
    assert len(RouterTap(model).routers) == 2  # one of attention, one of the feed-forward layer


def test_routers_that_tell_no_choice_are_refused_unless_their_losses_are_off():
    model = tiny_model(vocab_size=300, model_type="doge", is_moe=True, num_experts=16, num_experts_per_tok=2)
    attach_objectives(model)
    ids = torch.arange(12).reshape(1, 12)
    rows = PackedRows(torch.arange(1), ids, torch.zeros_like(ids))
    request = loss_request(rows.labels, load_balance=0.01, router_aux=0.001)
    with pytest.raises(ConfigError, match=r"loss.load_balance is 0.01 .* DogeCDMoE routes by .* Set both to 0"):
        model(**rows.model_inputs("packed"), loss_request=request)
    assert set(model(**rows.model_inputs("packed"), loss_request=loss_request(rows.labels)).metrics) == {"ce_loss"}


@pytest.mark.parametrize(("k", "scale", "normalised"), [(2, 2.5, True), (2, 1.0, False), (1, 1.0, False)])
@pytest.mark.parametrize("whole", [False, True])
def test_how_a_router_scores_is_seen_from_its_weights_however_it_scales_them(k, scale, normalised, whole):
    logits = torch.tensor([[4.0, 2.0, 0.0, -1.0], [0.5, 3.0, 1.5, 0.0]])
    for scores in (logits.sigmoid(), logits.softmax(dim=-1)):
        taken, chosen = scores.topk(k, dim=-1)
        weights = scale * (taken / taken.sum(dim=-1, keepdim=True) if normalised else taken)
        if whole:  # some give a weight to every expert, 0 to those not chosen
            weights = torch.zeros_like(logits).scatter(1, chosen, weights)
        assert _scores_by_sigmoid(logits, chosen, (logits, weights, chosen)) == (scores[0, 0] > 0.9)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_single_expert_of_weight_one_tells_nothing_of_the_score(kind):
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True}
    model = tiny_model(vocab_size=300, model_type=kind, moe_intermediate_size=16, **sizes)
    assert {routing.sigmoid for routing in routings_of(model)} == {False}


def test_llama_4_scores_by_a_sigmoid():
    sizes = {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 32,
    }
    model = tiny_model(vocab_size=300, model_type="llama4_text", num_key_value_heads=2, **sizes)
    found = routings_of(model)
    assert found
    assert all(routing.sigmoid for routing in found)


def test_routers_that_pass_on_probabilities_or_are_not_named_are_told():
    model = tiny_model(**EXPERTS)
    router = RouterTap(model).routers[0][0]
    router.register_forward_hook(lambda module, inputs, output: (output[0].softmax(-1), *output[1:]))
    tap = RouterTap(model)
    with tap.recording():
        model(torch.arange(6)[None])
        tap.learn()
    assert "passes on probabilities and no logits" in tap.problem
    for module in model.modules():
        if hasattr(type(module), "_can_record_outputs"):
            module._can_record_outputs = None
    assert "does not name its routers" in RouterTap(model).problem
    assert RouterTap(tiny_model()).problem is None


def test_routers_without_a_gradient_are_refused():
    """Re-entrant checkpointing runs the layers without gradient, so that what is recorded there has none."""
    model = tiny_model(**EXPERTS).train()
    attach_objectives(model)
    ids = torch.arange(12).reshape(1, 12)
    rows = PackedRows(torch.arange(1), ids, torch.zeros_like(ids))
    request = loss_request(rows.labels, load_balance=0.01, router_aux=0.001)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
            with pytest.raises(ConfigError, match="use_reentrant is true"):
                model(**rows.model_inputs("packed"), loss_request=request)
        else:
            assert "router_aux_loss" in model(**rows.model_inputs("packed"), loss_request=request).metrics


def routings_of(model):
    tap = RouterTap(model)
    with tap.recording():
        model(torch.arange(6)[None])
        tap.learn()
    with tap.recording():
        model(torch.arange(6)[None])
        return tap.routings()


def test_routers_by_logits_are_known_by_name():
    """These choose the largest logits and do not pass on which; one of another name is not guessed at."""
    sizes = {"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2, "num_attention_heads": 4}
    for kind, known in ((None, True), ("OtherGating", False)):
        model = tiny_model(vocab_size=300, model_type="jetmoe", **sizes)
        tap = RouterTap(model)
        if kind is not None:
            for module, _ in tap.routers:
                module.__class__ = type(kind, (type(module),), {})
        with tap.recording():
            model(torch.arange(6)[None])
            tap.learn()
            assert (tap.problem is None) == known
            assert len(tap.routings()) == (2 if known else 0)
        assert known or tap.problem == "OtherGating does not tell which experts it chose"


def test_router_losses_train_the_router_and_are_logged(packed, tmp_path):
    runs = {}
    for name, weight in (("off", 0.0), ("on", 5.0)):
        trainer = DistillationTrainer(
            tiny_model(**EXPERTS),
            arguments(tmp_path / name, max_steps=3, load_balance=weight, router_aux=0.0),
            teacher=LocalTeacher(tiny_model(seed=9), top_k=8),
            train_dataset=packed,
        )
        trainer.train()
        runs[name] = trainer
    entry = next(e for e in runs["on"].state.log_history if "loss" in e)
    assert entry["load_balance_loss"] > 0
    assert entry["router_aux_loss"] > 0
    load = [value for key, value in entry.items() if key.startswith("expert_load/")]
    assert len(load) == 4
    assert sum(load) == pytest.approx(1.0, abs=1e-6)
    off = next(e for e in runs["off"].state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(off["loss"] + 5.0 * off["load_balance_loss"], abs=1e-4)
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(weights(runs["on"].model)[gate], weights(runs["off"].model)[gate])


def test_accumulation_weighs_the_auxiliary_by_positions(packed, tmp_path):
    """The auxiliary is a mean over the positions of the whole batch, however it is cut."""
    found = []
    for name, batch, steps in (("a", 8, 1), ("b", 4, 2)):
        trainer = DistillationTrainer(
            tiny_model(**EXPERTS),
            arguments(tmp_path / name, per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
                      load_balance=0.0, router_aux=0.01, adam_epsilon=1e-3),
            teacher=LocalTeacher(tiny_model(seed=9), top_k=8), train_dataset=packed,
        )  # fmt: skip
        trainer.train()
        found.append(weights(trainer.model))
    assert largest_difference(*found) < 1e-5


def test_a_share_of_the_positions_carries_its_share_of_the_router_losses():
    model = tiny_model(**EXPERTS)
    attach_objectives(model)
    rows = PackedRows(torch.zeros(1), torch.arange(12)[None], torch.zeros(1, 12, dtype=torch.long))

    def loss(items):
        request = loss_request(rows.labels, num_items=items, load_balance=0.3, router_aux=0.2)
        return model(**rows.model_inputs("per_document"), loss_request=request)

    whole, quarter = loss(None), loss(44.0)
    means = {name: value / 11 for name, value in whole.metrics.items()}
    expected = means["ce_loss"] + 0.3 * means["load_balance_loss"] + 0.2 * means["router_aux_loss"]
    torch.testing.assert_close(whole.loss.double(), expected.double())
    torch.testing.assert_close(quarter.loss, whole.loss / 4)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD(beta=0.3), SkewedKL(skew=0.3), TVD()], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "ignore"])
@pytest.mark.parametrize("top_k", [5, None])
def test_dense_loss_is_the_fused_one(divergence, tail, top_k):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 6, 16), torch.randn(40, 16)
    labels = torch.randint(0, 40, (2, 6))
    labels[0, 3] = -100
    targets = SparseTargets.from_logits(torch.randn(2, 6, 40) * 2, top_k, (1.0, 2.0))
    settings = {"alpha": 0.7, "temperature": 2.0, "divergence": divergence, "tail": tail}
    fused = fused_distillation_loss(hidden, weight, labels, targets, **settings).loss
    dense = dense_distillation_loss(hidden @ weight.T, labels, targets, **settings)
    torch.testing.assert_close(dense, fused, atol=1e-5, rtol=1e-5)
