"""Checkpoints on disks that are full, nearly full, or fail in the middle; the pointer; best; changed settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import limbeck, tiny_model
from limbeck import DistillationTrainer
from limbeck.errors import ConfigError, CorruptError, LimbeckError
from limbeck.training import checkpoints
from limbeck.training.phases import train_recipe
from test_trainer import arguments, weights, with_changes


def saving(packed, folder, steps=4, every=1, **changes):
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": every, **changes}
    return DistillationTrainer(tiny_model(), arguments(folder, **settings), train_dataset=packed)


def test_names_pointer_sizes_and_tokenizer(recipe_tree, packed, tmp_path, caplog):
    caplog.set_level("INFO", "limbeck")
    training = {**recipe_tree["training"], "mode": "ce", "save_steps": 2, "eval_steps": 2}
    train_recipe(with_changes(recipe_tree, training=training), tmp_path / "student")
    folder = tmp_path / "student"
    assert checkpoints.steps(folder) == [2, 4]
    assert (folder / "latest").read_text() == "step_4\n"
    manifest = json.loads((folder / "step_4" / "manifest.json").read_text())
    assert manifest["bytes"] == sum(
        p.stat().st_size for p in (folder / "step_4").iterdir() if p.name != "manifest.json"
    )
    assert f"saved {folder / 'step_4'} ({manifest['bytes'] / 1e6:.1f} MB" in caplog.text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("step_4", "best", "final"):
        AutoModelForCausalLM.from_pretrained(folder / name)
        assert AutoTokenizer.from_pretrained(folder / name)("def")["input_ids"]
    assert not list(folder.rglob("*.bin")) + list(folder.rglob(".*.tmp"))
    best = folder / "best" / "model.safetensors"
    assert best.samefile(folder / f"step_{json.loads((folder / 'manifest.json').read_text())['best_step']}" / best.name)


def test_the_pointer_is_followed_and_survives_its_loss(packed, tmp_path):
    saving(packed, tmp_path).train()
    (tmp_path / "latest").write_text("step_2\n")
    assert checkpoints.newest(tmp_path).name == "step_2"
    (tmp_path / "latest").write_text("step_99\n")
    assert checkpoints.newest(tmp_path).name == "step_4"
    (tmp_path / "latest").write_text("../..\n")
    with pytest.raises(CorruptError, match="outside that folder"):
        checkpoints.newest(tmp_path)
    (tmp_path / "latest").unlink()
    trainer = saving(packed, tmp_path, steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5


class Usage:
    def __init__(self, used, free):
        self.used, self.free, self.total = used, free, used + free


def test_warning_at_ninety_per_cent_and_refusal_without_room(packed, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "limbeck")
    room = {"free": 9 * 10**9}
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: Usage(91 * 10**9, room["free"]))
    saving(packed, tmp_path, steps=1).train()
    assert f"WARNING: Disk 91% full (9.00 GB free at {tmp_path}, a checkpoint takes 0.00 GB)" in caplog.text
    assert checkpoints.steps(tmp_path) == [1]
    room["free"] = 1000
    trainer = saving(packed, tmp_path, steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert "no room for a checkpoint" in caplog.text
    assert "step_3 is not saved" in caplog.text
    assert trainer.state.global_step == 3
    assert checkpoints.steps(tmp_path) == [1]
    checkpoints.verify(tmp_path / "step_1")


FAILING = """
import resource, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from transformers import TrainerCallback
from limbeck.console import set_up_logging
from limbeck.data.dataset import PackedDataset
from test_checkpoints import saving
set_up_logging()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
class Limit(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        # During step 3 no file may grow beyond 100 kB: the weights fail, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if state.global_step == 2 else soft, hard))
trainer = saving(PackedDataset(sys.argv[1]), sys.argv[2], steps=4, save_total_limit=1)
trainer.add_callback(Limit())
trainer.train()
"""


def test_a_save_that_fails_leaves_the_one_before_and_the_run_goes_on(packed, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), str(packed.folder), str(out), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint step_3 could not be written" in done.stderr
    assert f"{out / 'step_2'} is whole" in done.stderr
    assert checkpoints.steps(out) == [4]
    assert not list(out.glob(".step_*"))
    whole = saving(packed, tmp_path / "whole")
    whole.train()
    assert torch.equal(
        load_file(out / "step_4" / "model.safetensors")["model.norm.weight"], whole.model.model.norm.weight.detach()
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system(recipe_tree, packed, tmp_path):
    """A real tmpfs that holds two checkpoints and not three: nothing breaks, and with room the run ends well."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        training = {**recipe_tree["training"], "mode": "ce", "save_steps": 1, "save_total_limit": 3,
                    "report_to": ["tensorboard"], "output_dir": str(disk / "student")}  # fmt: skip
        path = tmp_path / "disk.yaml"
        path.write_text(json.dumps({**recipe_tree, "training": training}))
        first = limbeck("train", path, check=False)
        assert first.returncode == 1
        assert "no room for a checkpoint" in first.stderr or "could not be written" in first.stderr
        assert "could not be written to" in first.stderr.splitlines()[-1]
        assert "Traceback" not in first.stderr
        kept = checkpoints.steps(disk / "student")
        assert kept
        for step in kept:
            checkpoints.verify(disk / "student" / f"step_{step}")
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        again = limbeck("train", path)
        assert f"continuing from {disk / 'student' / f'step_{kept[-1]}'}" in again.stderr
        final = load_file(disk / "student" / "final" / "model.safetensors")
        found = {name: value.clone() for name, value in final.items()}
        del final  # it maps the file
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    whole = with_changes(recipe_tree, training={**recipe_tree["training"], "mode": "ce"})
    train_recipe(whole, tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_final_that_cannot_be_written_is_one_clear_error(packed, tmp_path, monkeypatch):
    trainer = saving(packed, tmp_path, steps=1)
    trainer.train()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_model", full)
    with pytest.raises(LimbeckError, match="No space left on device.*the same command goes on from .*step_1"):
        trainer.save_final(tmp_path / ".final.tmp")
    assert not (tmp_path / ".final.tmp").exists()


def test_changed_settings_hold_after_resuming_from(recipe_tree, packed, tmp_path):
    """The saved optimizer brings its moments; rates, decays and the schedule are the new recipe's."""
    base = {**recipe_tree["training"], "mode": "ce", "save_steps": 1, "save_total_limit": None,
            "lr_scheduler_type": "constant"}  # fmt: skip
    train_recipe(with_changes(recipe_tree, training={**base, "max_steps": 2}), tmp_path / "first")
    start = load_file(tmp_path / "first" / "step_2" / "model.safetensors")["model.norm.weight"]
    moved = {}
    for rate in (1e-4, 1e-2):
        changed = {**base, "max_steps": 3, "learning_rate": rate, "weight_decay": 0.25,
                   "resume_from": str(tmp_path / "first")}  # fmt: skip
        folder = tmp_path / f"at{rate}"
        train_recipe(with_changes(recipe_tree, training=changed), folder)
        found = load_file(folder / "final" / "model.safetensors")["model.norm.weight"]
        moved[rate] = float((found - start).abs().mean())
        state = json.loads((folder / "step_3" / "trainer_state.json").read_text())
        assert state["log_history"][-1]["step"] <= 3
        groups = torch.load(folder / "step_3" / "optimizer.pt", weights_only=True)["param_groups"]
        assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
        assert {group["lr"] for group in groups} == {rate}
    assert moved[1e-2] == pytest.approx(100 * moved[1e-4], rel=0.01)


def test_other_groups_are_refused_by_name(recipe_tree, packed, tmp_path):
    base = {**recipe_tree["training"], "mode": "ce", "max_steps": 2}
    train_recipe(with_changes(recipe_tree, training=base), tmp_path / "first")
    changed = {**base, "max_steps": 3, "resume_from": str(tmp_path / "first")}
    for changes in ({"optimizer": {"name": "lion"}},
                    {"parameter_lr_multipliers": [{"pattern": "mlp", "lr_multiplier": 0.5}]}):  # fmt: skip
        recipe = with_changes(recipe_tree, training=changed, **changes)
        with pytest.raises(ConfigError, match=r"optimizer groups.*student\.model"):
            train_recipe(recipe, tmp_path / "second")


def test_unlogged_sums_survive_a_resume(packed, tmp_path):
    """Saved at step 2, logged at step 4: the line of the resumed run is that of the undisturbed one."""
    whole = saving(packed, tmp_path, every=2, logging_steps=4)
    whole.train()
    resumed = saving(packed, tmp_path, every=2, logging_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "step_2"))
    timed = {"tokens_per_second", "data_wait_share", "memory_gb"}
    lines = [
        {k: v for k, v in next(e for e in t.state.log_history if "loss" in e).items() if k not in timed}
        for t in (whole, resumed)
    ]
    assert lines[0] == lines[1]
    assert lines[0]["step"] == 4
    assert torch.equal(weights(whole.model)["model.norm.weight"], weights(resumed.model)["model.norm.weight"])


def test_a_start_that_cannot_be_is_refused_before_anything_is_touched(recipe_tree, packed, tmp_path):
    base = {**recipe_tree["training"], "mode": "ce", "save_steps": 1, "save_total_limit": None, "eval_steps": 1}
    folder = tmp_path / "student"
    train_recipe(with_changes(recipe_tree, training=base), folder)
    before = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    changed = {**base, "resume_from": str(folder / "step_2")}
    for changes in ({"optimizer": {"name": "lion"}}, {"training": {**changed, "warmup_steps": 50}}):
        recipe = with_changes(recipe_tree, **{"training": changed, **changes})
        with pytest.raises(ConfigError):
            train_recipe(recipe, folder)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == before
    assert train_recipe(with_changes(recipe_tree, training=base), folder).steps == 4  # found done


@pytest.mark.parametrize("moment", ["forget_after", "save"])
def test_a_change_of_mode_survives_a_kill_anywhere(recipe_tree, packed, tmp_path, monkeypatch, moment):
    """Killed once the change is recorded, or after its first save: the same command ends with the same bytes."""
    base = {**recipe_tree["training"], "mode": "ce", "save_steps": 1, "save_total_limit": None, "max_steps": 4}
    kd = {**base, "mode": "distill", "max_steps": 6, "learning_rate": 5e-3}
    loss = {"alpha_initial": 0.1, "alpha_warmup_steps": 3, "alpha": 0.9}
    results = {}
    for name in ("whole", "cut"):
        folder = tmp_path / name
        train_recipe(with_changes(recipe_tree, training=base), folder)
        recipe = with_changes(
            recipe_tree, training={**kd, "resume_from": str(folder / "step_2")}, loss=loss,
            teacher={"use_cached_logits": False},
        )  # fmt: skip
        if name == "cut":
            with monkeypatch.context() as patch:
                if moment == "forget_after":
                    patch.setattr("limbeck.training.resume.forget_after", _interrupted)
                else:
                    patch.setattr(DistillationTrainer, "_save_checkpoint", _saves_and_dies)
                with pytest.raises(KeyboardInterrupt):
                    train_recipe(recipe, folder)
        manifest = train_recipe(recipe, folder)
        assert manifest.steps == 6
        logs = json.loads((folder / "step_6" / "trainer_state.json").read_text())["log_history"]
        results[name] = (
            [e["alpha"] for e in logs if "alpha" in e],
            (folder / "final" / "model.safetensors").read_bytes(),
        )
    assert results["cut"] == results["whole"]
    assert results["whole"][0] == pytest.approx([0.1 + 0.8 / 3, 0.9])  # steps 4 and 6: one and three after the change


def _interrupted(*args):
    raise KeyboardInterrupt


_SAVE = DistillationTrainer._save_checkpoint


def _saves_and_dies(*args):
    _SAVE(*args)
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["refused", "failed"])
def test_best_is_a_step_that_was_saved(packed, tmp_path, monkeypatch, how):
    """Held-out losses 5, 4, 4.5, the second not saved: the best that is there is the first, then the third."""
    losses = {1: 5.0, 2: 4.0, 3: 4.5}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss",
                "greater_is_better": False, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    trainer = DistillationTrainer(
        tiny_model(), arguments(tmp_path, **settings), train_dataset=packed, eval_dataset=packed
    )
    monkeypatch.setattr(trainer, "evaluate", lambda **kwargs: {"eval_loss": losses[trainer.state.global_step]})
    if how == "refused":
        monkeypatch.setattr(trainer, "_refused", lambda folder: trainer.state.global_step == 2)
    else:
        written = trainer._write
        second = "No space left on device"
        monkeypatch.setattr(trainer, "_write", lambda folder, step: second if step == 2 else written(folder, step))
    seen = []
    original = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args: (original(*args), seen.append(trainer.state.best_global_step))
    trainer.train()
    assert seen[:3] == [1, 1, 3]
    assert trainer.state.best_metric == 4.5
    best = load_file(tmp_path / "best" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(best, load_file(tmp_path / "step_3" / "model.safetensors")["model.norm.weight"])


def test_a_disk_that_fills_up_at_the_rename(packed, tmp_path, monkeypatch, caplog):
    import limbeck.training.checkpointing as checkpointing

    original, calls = checkpointing.commit, []

    def fails(folder, step):
        calls.append(step)
        if step == 2:
            raise OSError(28, "No space left on device")
        return original(folder, step)

    monkeypatch.setattr(checkpointing, "commit", fails)
    trainer = saving(packed, tmp_path, steps=3)
    trainer.train()
    assert checkpoints.steps(tmp_path) == [1, 3]
    assert "checkpoint step_2 could not be written ([Errno 28] No space left on device)" in caplog.text


def test_a_checkpoint_that_is_named_is_verified(packed, tmp_path):
    saving(packed, tmp_path, steps=1).train()
    (tmp_path / "step_1" / "config.json").write_text("{}")
    with pytest.raises(CorruptError, match="config.json is missing or damaged"):
        checkpoints.resolve_resume(tmp_path / "step_1")


def test_a_tokenizers_failed_write_is_a_failed_write():
    def broken():
        raise Exception("No space left on device (os error 28)")

    assert checkpoints.first_failure([broken]) == "No space left on device (os error 28)"
    with pytest.raises(RuntimeError, match="something else"):
        checkpoints.first_failure([lambda: (_ for _ in ()).throw(RuntimeError("something else"))])
