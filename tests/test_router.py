"""Router losses beside transformers' own, in the trainer, and the dense loss beside the fused one."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from conftest import tiny_model
from limbeck import DistillationTrainer, LocalTeacher, SparseTargets, fused_distillation_loss
from limbeck.errors import ConfigError
from limbeck.losses.dense import dense_distillation_loss
from limbeck.losses.router import router_losses
from test_optim import EXPERTS
from test_trainer import arguments, largest_difference, weights


def test_load_balance_is_transformers_over_top_k():
    torch.manual_seed(0)
    logits = torch.randn(50, 8)
    ours = router_losses([logits], None, top_k=2)
    theirs = load_balancing_loss_func((logits,), 8, 2)
    torch.testing.assert_close(ours.load_balance * 2, theirs)
    torch.testing.assert_close(ours.aux, logits.logsumexp(-1).square().mean())
    assert float(ours.load.sum()) == pytest.approx(1.0)


def test_perfect_balance_is_one_and_padding_does_not_count():
    logits = 20.0 * torch.eye(4).repeat(2, 1)
    assert float(router_losses([logits], None, top_k=1).load_balance) == pytest.approx(1.0, abs=1e-4)
    padded = torch.cat([logits, torch.full((5, 4), 7.0)])
    mask = torch.arange(13) < 8
    whole, masked = router_losses([logits], None, 1), router_losses([padded], mask, 1)
    torch.testing.assert_close(whole.load_balance, masked.load_balance)
    torch.testing.assert_close(whole.aux, masked.aux)
    entropy = router_losses([logits], None, 1, "entropy").aux
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).mean(), atol=1e-6, rtol=1e-4)
    with pytest.raises(ConfigError, match="choose z or entropy"):
        router_losses([logits], None, 1, "other")


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


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skewed_kl", "tvd"])
@pytest.mark.parametrize("top_k", [5, None])
def test_dense_loss_is_the_fused_one(divergence, top_k):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 6, 16), torch.randn(40, 16)
    labels = torch.randint(0, 40, (2, 6))
    labels[0, 3] = -100
    targets = SparseTargets.from_logits(torch.randn(2, 6, 40) * 2, top_k, (1.0, 2.0))
    settings = {"alpha": 0.7, "temperature": 2.0, "divergence": divergence}
    fused = fused_distillation_loss(hidden, weight, labels, targets, **settings).loss
    dense = dense_distillation_loss(hidden @ weight.T, labels, targets, **settings)
    torch.testing.assert_close(dense, fused, atol=1e-5, rtol=1e-5)
