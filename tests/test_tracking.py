"""Trackers: one curve a run, however often it is resumed; the recipe beside it; names that they can take."""

import json
import sys
import types

import pytest

from conftest import stopped_after, with_keys
from limbeck.config.training import TrackingConfig
from limbeck.errors import ConfigError
from limbeck.training.phases import train_recipe
from limbeck.training.tracking import Tracking


def tracked(recipe, **training):
    keys = {"report_to": ["tensorboard"], "logging_steps": 1, "save_steps": 2, "max_steps": 6, "eval_steps": 2}
    return with_keys(recipe, teacher={"use_cached_logits": False}, training={**keys, **training})


def scalars(folder):
    """Every point that TensorBoard finds, by tag: read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_resumed_run_continues_its_curves(recipe, packed, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_recipe(tracked(recipe), whole)
    with stopped_after(2):  # after step 4; killed later, it would say step 5 twice
        train_recipe(tracked(recipe), cut)
    (cut / "step_4" / "manifest.json").unlink()  # as if that save had not come through: it goes on from step 2
    train_recipe(tracked(recipe), cut)
    one, other = scalars(whole / "runs"), scalars(cut / "runs")
    assert [step for step, _ in other["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in other["eval/loss"]] == [2, 4, 6]
    assert other["train/loss"] == one["train/loss"]
    assert not any(" " in name for name in other), "no tag has a space"


def test_another_training_in_the_folder_has_curves_of_its_own(recipe, packed, tmp_path):
    folder = tmp_path / "s"
    train_recipe(tracked(recipe), folder)
    first = json.loads((folder / "tracking.json").read_text())
    train_recipe(tracked(recipe, max_steps=8, resume_from=str(folder / "step_4")), folder)
    second = json.loads((folder / "tracking.json").read_text())
    assert first["id"] != second["id"]
    assert [step for step, _ in scalars(folder / "runs" / second["id"])["train/loss"]] == [5, 6, 7, 8]


def test_a_run_that_starts_over_has_all_its_points(recipe, packed, tmp_path):
    folder = tmp_path / "s"
    with stopped_after(1):
        train_recipe(tracked(recipe, logging_steps=2), folder)
    train_recipe(tracked(recipe, resume=False), folder)
    made = json.loads((folder / "tracking.json").read_text())
    assert [step for step, _ in scalars(folder / "runs" / made["id"])["train/loss"]] == [1, 2, 3, 4, 5, 6]


class FakeWandb(types.ModuleType):
    """What of wandb is asked for, written down."""

    def __init__(self, fails: str | None = None) -> None:
        super().__init__("wandb")
        self.asked, self._fails, self.finished = {}, fails, 0

    def finish(self):
        self.finished += 1

    def init(self, **asked):
        if self._fails:
            raise RuntimeError(self._fails)
        self.asked = asked


@pytest.fixture
def wandb(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_told_project_name_tags_recipe_and_to_go_on(wandb, tmp_path):
    tree = {"name": "mine", "training": {"max_steps": 3}}
    section = TrackingConfig(tags="one, two")
    first = Tracking(section, tmp_path, "mine", "f", tree, main=True)
    first.start(["wandb"])
    assert wandb.asked == {"project": "limbeck", "name": "mine", "tags": ["one", "two"], "id": first.id,
                           "resume": "allow", "config": tree}  # fmt: skip
    again = Tracking(section, tmp_path, "mine", "f", tree, main=True)
    again.start(["wandb"])
    assert wandb.asked["id"] == first.id
    again.end(), again.end()
    assert wandb.finished == 1, "the next training is another run"
    named = TrackingConfig(project="other", name="called")
    Tracking(named, tmp_path, "mine", "f", tree, main=True).start(["wandb"])
    assert (wandb.asked["project"], wandb.asked["name"]) == ("other", "called")
    wandb.asked = {}
    Tracking(section, tmp_path, "mine", "f", tree, main=False).start(["wandb"])
    Tracking(section, tmp_path, "mine", "f", tree, main=True).start(["tensorboard"])
    assert wandb.asked == {}


def test_a_tracker_that_does_not_start_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("api_key not configured\nmore lines"))
    with pytest.raises(ConfigError, match="wandb, which does not start: api_key not configured. Log in"):
        Tracking(TrackingConfig(), tmp_path, "x", "f", {}, main=True).start(["wandb"])
