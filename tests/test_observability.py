"""What a run says: the guard's last words, the panel, the advice, the rates and waits it logs."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from conftest import limbeck, rules, tiny_model
from limbeck import DistillationTrainer, LocalTeacher
from limbeck.config import Recipe
from limbeck.training import checkpoints
from limbeck.training.advice import advise
from limbeck.training.dashboard import Dashboard, sparkline, wants_dashboard
from limbeck.training.guard import DivergedError, StepGuard
from test_optim import EXPERTS
from test_trainer import arguments


def test_a_rate_that_explodes_ends_the_run_before_anything_is_saved_over(recipe_tree, tmp_path):
    training = {**recipe_tree["training"], "mode": "ce", "max_steps": 30, "save_steps": 1, "max_grad_norm": 0,
                "save_total_limit": 1, "learning_rate": 1e25, "lr_scheduler_type": "constant"}  # fmt: skip
    path = tmp_path / "hot.yaml"
    path.write_text(json.dumps({**recipe_tree, "training": training}))
    done = limbeck("train", path, "--json", check=False)
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert "Traceback" not in done.stderr
    step = int(error.split()[1].rstrip(":"))
    assert "so training stops before anything is updated or saved over" in error
    assert "learning_rate is 1e+25" in error
    assert "max_grad_norm is 0" in error
    assert "Packed rows of this rank's batch: [" in error
    folder = tmp_path / "run" / "student"
    assert checkpoints.steps(folder) == [step - 1]
    saved = load_file(folder / f"step_{step - 1}" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in saved.values())
    assert not (folder / "final").exists()


def test_weights_that_are_not_numbers_are_never_saved(packed, tmp_path):
    """The last update of a run may be the one that ruins it: no checkpoint, no final/, the one before stays."""
    trainer = DistillationTrainer(
        tiny_model(), arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1),
        train_dataset=packed,
    )  # fmt: skip
    step = trainer._save_checkpoint

    def ruins(model, trial):
        if trainer.state.global_step == 2:
            trainer.model.model.norm.weight.data[0] = math.nan
        step(model, trial)

    trainer._save_checkpoint = ruins
    with pytest.raises(DivergedError, match="after step 2 the weights are not finite"):
        trainer.train()
    with pytest.raises(DivergedError):
        trainer.save_final(tmp_path / "final")
    assert checkpoints.steps(tmp_path) == [1]
    again = DistillationTrainer(tiny_model(), arguments(tmp_path, max_steps=2), train_dataset=packed)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_causes_are_what_the_run_shows(tmp_path):
    model, args = tiny_model(), arguments(tmp_path, max_grad_norm=1.0)
    guard = StepGuard()
    for norm in (1.0, 2.0, 30.0):
        guard.saw(torch.tensor([1]), torch.tensor(2.0), None)
        guard.check(1, norm, model, args, scaled=False)
    guard.saw(torch.tensor([3, 4]), torch.tensor(2.0), None)
    guard.saw(torch.tensor([5, 6]), torch.tensor(math.nan), None)
    with pytest.raises(DivergedError) as stopped:
        guard.check(7, math.nan, model, args, scaled=False)
    text = str(stopped.value)
    assert text.startswith("step 7: the loss is nan")
    assert "rows of this rank's batch: [5, 6]" in text
    assert "gradient norm went from 1 to 30 in the last 3 steps" in text
    targets = LocalTeacher(tiny_model(), top_k=4).template()
    from dataclasses import replace

    bad = replace(targets, token_ids=torch.zeros(1, 1, dtype=torch.int32), logprobs=torch.full((1, 1), math.nan),
                  log_z=torch.zeros(1, 2))  # fmt: skip
    fresh = StepGuard()
    fresh.saw(torch.tensor([9]), torch.tensor(math.inf), bad)
    with pytest.raises(DivergedError, match="the teacher's targets of these rows are not finite"):
        fresh.check(1, math.nan, model, args, scaled=True)
    scaled = StepGuard()
    scaled.saw(torch.tensor([9]), torch.tensor(1.0), None)
    scaled.check(1, math.inf, model, args, scaled=True)  # float16's overflow is its scaler's business
    finite = StepGuard()
    finite.saw(torch.tensor([9]), torch.tensor(1.0), None)
    with pytest.raises(DivergedError, match="the loss is finite and its gradient is not"):
        finite.check(1, math.inf, model, args, scaled=False)


def test_what_is_logged(packed, tmp_path):
    trainer = DistillationTrainer(
        tiny_model(**EXPERTS),
        arguments(tmp_path, optimizer={"name": "muon_lion"}, parameter_lr_multipliers=rules(("experts", 0.5)),
                  learning_rate=0.02),
        teacher=LocalTeacher(tiny_model(seed=9), top_k=8), train_dataset=packed,
    )  # fmt: skip
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["learning_rate"] == entry["lr/all_others.muon"] == pytest.approx(0.02)
    assert entry["lr/experts.muon"] == pytest.approx(0.01)
    assert entry["lr/all_others.lion.no_decay"] == pytest.approx(1e-4)
    assert 0 < entry["teacher_wait_share"] < 1
    assert 0 <= entry["data_wait_share"] < 1
    assert entry["memory_gb"] > 0.05
    assert 0 < entry["teacher_mass"] <= 1
    assert 0 < entry["student_mass"] <= 1
    assert entry["grad_norm"] > 0
    assert (entry["alpha"], entry["temperature"]) == (0.5, 2.0)
    assert " load_balance=" in (tmp_path / "training.log").read_text()


def test_the_panel_shows_what_is_logged(packed, tmp_path):
    out = io.StringIO()
    trainer = DistillationTrainer(
        tiny_model(**EXPERTS), arguments(tmp_path), teacher=LocalTeacher(tiny_model(seed=9), top_k=8),
        train_dataset=packed,
    )  # fmt: skip
    trainer.add_callback(Dashboard(Console(file=out, force_terminal=True, width=140, height=40)))
    trainer.train()
    shown = out.getvalue()
    entry = [e for e in trainer.state.log_history if "loss" in e][-1]
    for text in ("step 2 of 2", f"{entry['loss']:.4f}", f"KL {entry['kl_loss']:.4f}", "expert load", "gradient norm",
                 "teacher mass", "waiting: data"):  # fmt: skip
        assert text in shown, text


def test_the_panel_is_for_terminals():
    assert wants_dashboard("on")
    assert not wants_dashboard("off")
    assert not wants_dashboard("auto")  # stderr is captured here
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([]) == ""


def test_the_panel_runs_on_a_real_terminal(recipe_file, tmp_path):
    """A pseudo-terminal as stderr: the panel appears, plain lines go to training.log alone, stdout stays JSON."""
    import os
    import pty
    import subprocess
    import sys
    import threading

    main, side = pty.openpty()
    seen = bytearray()

    def read():
        try:
            while piece := os.read(main, 65536):
                seen.extend(piece)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", "train", str(recipe_file), "--json"],
        stdout=subprocess.PIPE, stderr=side, env=env, timeout=300, text=True,
    )  # fmt: skip
    os.close(side)
    reader.join(timeout=10)
    assert done.returncode == 0, seen.decode(errors="replace")
    json.loads(done.stdout)
    shown = seen.decode(errors="replace")
    assert "step 4 of 4" in shown
    assert "╭" in shown
    assert "elapsed=" not in shown
    assert "elapsed=" in (tmp_path / "run" / "student" / "training.log").read_text()


def curves(count=20, **keys):
    return [{key: value(i) if callable(value) else value for key, value in keys.items()} for i in range(count)]


@pytest.mark.parametrize(("logs", "recipe", "expected"), [
    (curves(loss=lambda i: 5 - 0.02 * i, ce_loss=4.0, kl_loss=0.3), {}, "raise alpha (now 0.5)"),
    (curves(loss=lambda i: 5 - 0.02 * i, ce_loss=2.0, kl_loss=3.0), {}, "raise temperature (now 2), lower alpha"),
    (curves(loss=lambda i: 5 - 0.1 * i), {}, "train longer"),
    (curves(loss=3.0), {}, "nothing was learnt"),
    (curves(loss=lambda i: 5.0 if i < 4 else 3.0), {}, "flat near 3.000"),
    (curves(loss=lambda i: 5 - 0.02 * i, grad_norm=4.0), {"training": {"max_grad_norm": 1.0}}, "in 100% of the log"),
    (curves(loss=lambda i: 5 - 0.02 * i, teacher_wait_share=0.6),
     {"teacher": {"use_cached_logits": False}}, "60% of the time went into waiting for the teacher: cache"),
    (curves(loss=lambda i: 5 - 0.02 * i, teacher_mass=0.5), {}, "hold 50% of the teacher's mass"),
    (curves(loss=lambda i: 5 - 0.02 * i, **{f"expert_load/{e:03d}": 0.45 if e == 0 else 0.55 / 7 for e in range(8)}),
     {}, "raise loss.load_balance (now 0.01)"),
    ([*curves(loss=lambda i: 5 - 0.1 * i), *curves(4, eval_loss=lambda i: 3 + 0.1 * i)], {}, "use best/"),
    (curves(4, loss=lambda i: 5 - 0.1 * i), {}, "the curves show nothing to change"),
])  # fmt: skip
def test_advice_follows_from_the_curves(logs, recipe, expected):
    text = advise(logs, Recipe.model_validate(recipe))
    assert expected in text
    assert "\n" not in text
    assert text.count(";") <= 8


def test_a_run_ends_with_its_advice(recipe_file, tmp_path):
    done = limbeck("train", recipe_file)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("advice: ")]
    manifest = json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())
    assert line == f"advice: {manifest['advice']}"
