"""Saddle interventions: what is a stall and what is not, the proof, the move, and resuming in the middle."""

import json

import pytest
import torch

from conftest import tiny_model
from limbeck import DistillationTrainer, LocalTeacher
from limbeck.config import SaddleConfig
from limbeck.training.curvature import escape, measure_curvature
from limbeck.training.saddle import SaddleMonitor
from test_trainer import arguments, weights


def feed(monitor, values):
    return [step for step, (loss, norm) in enumerate(values, start=1) if monitor.observe(step, loss, norm)]


def test_a_stall_is_flat_high_and_quiet():
    config = SaddleConfig(patience_steps=10, gradient_norm=0.65)
    assert feed(SaddleMonitor(config), [(5.0, 0.1)] * 10) == [10]
    assert feed(SaddleMonitor(config), [(5.0 - 0.05 * i, 0.1) for i in range(20)]) == []  # improves
    assert feed(SaddleMonitor(config), [(5.0, 2.0)] * 20) == []  # gradients are large
    low = SaddleConfig(patience_steps=10, min_loss=6.0)
    assert feed(SaddleMonitor(low), [(5.0, 0.1)] * 20) == []  # good enough
    auto = SaddleConfig(patience_steps=10, gradient_norm="auto")
    early = [(9.0 - 0.2 * i, 5.0) for i in range(30)]
    assert feed(SaddleMonitor(auto), early) == []
    assert feed(SaddleMonitor(auto), early + [(3.0, 0.4)] * 25)[0] == 40
    assert feed(SaddleMonitor(auto), early + [(3.0, 0.6)] * 25) == []  # not below a tenth of the median


def test_rest_is_kept_and_state_travels():
    config = SaddleConfig(patience_steps=4)
    monitor = SaddleMonitor(config)
    feed(monitor, [(5.0, 0.1)] * 3)
    other = SaddleMonitor(config)
    other.restore(json.loads(json.dumps(monitor.state())))
    assert other.observe(4, 5.0, 0.1) is not None
    other.rest(20)
    assert next(step for step in range(5, 30) if other.observe(step, 5.0, 0.1)) == 20


def test_curvature_of_a_known_quadratic():
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    values = torch.linspace(-3, 9, 12, dtype=torch.float64)
    hessian = q @ torch.diag(values) @ q.T
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    found = measure_curvature([x], lambda: 0.5 * x @ hessian @ x, steps=12)
    assert found.smallest == pytest.approx(-3.0, abs=1e-6)
    assert found.largest == pytest.approx(9.0, abs=1e-6)
    assert abs(float(found.direction @ q[:, 0])) == pytest.approx(1.0, abs=1e-5)
    assert found.is_saddle


def deep_linear_net():
    """f(x) = W2 W1 x at zero: gradient 0, and plain descent never leaves."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 4)
    outputs = inputs @ torch.randn(4, 4).T
    first, second = torch.zeros(4, 4, requires_grad=True), torch.zeros(4, 4, requires_grad=True)
    return [first, second], lambda: ((inputs @ first.T @ second.T - outputs) ** 2).mean()


def descend(parameters, loss_fn, steps):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    return float(loss_fn())


def test_one_escape_frees_the_deep_linear_net():
    parameters, loss_fn = deep_linear_net()
    start = float(loss_fn())
    assert descend(parameters, loss_fn, 500) == start
    found = escape(parameters, loss_fn, steps=14)
    assert found.kind == "move"
    assert found.after < found.before == start
    assert descend(parameters, loss_fn, 3000) < 1e-3 * start


def test_no_proof_no_move_and_noise_when_the_line_search_finds_nothing():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    bowl = escape([x], lambda: (x**2).sum(), steps=2)
    assert bowl.kind == "none"
    assert x.tolist() == [1.0, 2.0]
    # −x² near 0 with walls closer than the smallest move: curvature is negative, and no move pays
    y = torch.zeros(1, requires_grad=True)
    walled = escape([y], lambda: (-(y**2) + 1e9 * y**4).sum(), steps=1)
    assert walled.kind == "noise"
    assert float(y) != 0.0


def test_curvature_at_initialisation_is_negative_and_nothing_triggers(packed, tmp_path):
    saddle = {"enabled": True, "curvature": True, "patience_steps": 4, "probe_rows": 2}
    trainer = DistillationTrainer(
        tiny_model(), arguments(tmp_path, max_steps=8, saddle=saddle, learning_rate=5e-3),
        teacher=LocalTeacher(tiny_model(seed=9), top_k=8), train_dataset=packed,
    )  # fmt: skip
    parameters = list(trainer.model.parameters())
    assert measure_curvature(parameters, lambda: trainer.probe_loss(2), steps=14).is_saddle
    trainer.train()
    assert not (tmp_path / "saddle.jsonl").exists()


STALLED = {
    "enabled": True, "patience_steps": 4, "gradient_norm": 1e9, "min_improvement": 1.0, "boost_steps": 3,
    "cooldown_steps": 2,
}  # fmt: skip


def test_boosts_rise_end_rest_and_are_logged(packed, tmp_path):
    """With a threshold that everything passes, interventions come as the settings say."""
    seen = []
    trainer = DistillationTrainer(
        tiny_model(), arguments(tmp_path, max_steps=24, saddle=STALLED, learning_rate=1e-4), train_dataset=packed
    )
    optimizer = trainer.create_optimizer()
    step = optimizer.step
    optimizer.step = lambda *a, **k: (seen.append(optimizer.param_groups[0]["lr"]), step(*a, **k))[1]
    trainer.train()
    factors = [round(rate / 1e-4, 3) for rate in seen]
    # stall seen after step 4; three steps at 1.5; two of rest while four new ones fill the window
    assert factors[:7] == [1.0] * 4 + [1.5] * 3
    assert 2.0 in factors
    assert factors.index(2.0) >= 7 + 2
    lines = [json.loads(line) for line in (tmp_path / "saddle.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines[:3]] == ["boost", "boost ended", "boost"]
    assert lines[1]["loss_after"] is not None
    assert lines[0]["factor"] == 1.5


def test_resume_inside_a_boost_changes_nothing(packed, tmp_path):
    settings = {"max_steps": 12, "saddle": STALLED, "save_strategy": "steps", "save_steps": 3}
    whole = DistillationTrainer(tiny_model(), arguments(tmp_path / "a", **settings), train_dataset=packed)
    whole.train()
    lines = (tmp_path / "a" / "saddle.jsonl").read_text()
    again = DistillationTrainer(tiny_model(seed=4), arguments(tmp_path / "a", **settings), train_dataset=packed)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "step_6"))
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name
    assert (tmp_path / "a" / "saddle.jsonl").read_text() == lines


def test_a_proof_in_the_middle_of_a_run_is_logged(packed, tmp_path):
    saddle = {**STALLED, "curvature": True, "probe_rows": 2, "lanczos_steps": 6}
    trainer = DistillationTrainer(
        tiny_model(), arguments(tmp_path, max_steps=6, saddle=saddle),
        teacher=LocalTeacher(tiny_model(seed=9), top_k=8), train_dataset=packed,
    )  # fmt: skip
    trainer.train()
    (line,) = [json.loads(line) for line in (tmp_path / "saddle.jsonl").read_text().splitlines()]
    assert line["event"] in ("moved along it", "no negative curvature", "a ball of noise")
    assert line["smallest_curvature"] < line["largest_curvature"]
    if line["event"] == "moved along it":
        assert line["loss_after"] < line["loss_before"]


def test_a_line_cut_short_by_a_kill_is_no_obstacle(packed, tmp_path):
    settings = {"max_steps": 6, "saddle": STALLED, "save_strategy": "steps", "save_steps": 3}
    DistillationTrainer(tiny_model(), arguments(tmp_path, **settings), train_dataset=packed).train()
    path = tmp_path / "saddle.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 5, "ev')
    again = DistillationTrainer(tiny_model(), arguments(tmp_path, **settings), train_dataset=packed)
    again.train(resume_from_checkpoint=str(tmp_path / "step_3"))
    assert path.read_text() == whole
    line = next(e for e in again.state.log_history if "lr_boost" in e)
    assert line["lr_boost"] >= 1.0
