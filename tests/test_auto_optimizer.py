"""`optimizer.name: auto`: which algorithm and rates a student gets, and that it is said and recorded."""

import math

import pytest

from conftest import TINY, save_model, tiny_model, with_keys
from limbeck.config.training import OptimizerConfig
from limbeck.optim.auto import choose
from limbeck.training.phases import run_inputs, train_recipe
from limbeck.training.settle import optimizer_choice, settled

OPEN = {"learning_rate": None}


def test_a_new_student_gets_what_was_measured_best_and_a_pretrained_one_adamw(recipe, tmp_path):
    new = optimizer_choice(with_keys(recipe, training=OPEN, student={"config": {**TINY, "hidden_size": 256}}))
    assert (new.optimizer.name, new.learning_rate, new.optimizer.adamw.learning_rate) == ("muon_adamw", 0.02, 8e-3)
    folder = save_model(tiny_model(hidden_size=256), tmp_path / "m")
    held = optimizer_choice(with_keys(recipe, training=OPEN, student={"model": str(folder), "config": {}}))
    assert (held.optimizer.name, held.learning_rate) == ("adamw", 1e-3)
    assert "new and 256 wide" in new.why
    assert "pretrained and 256 wide" in held.why


@pytest.mark.parametrize("width", [64, 1024, 4096])
def test_rates_follow_the_width_by_the_stated_rule(width):
    found = choose(OptimizerConfig(), None, new=True, width=width)
    assert found.learning_rate == 0.02
    assert found.optimizer.adamw.learning_rate == pytest.approx(8e-3 * math.sqrt(256 / width), rel=0.05)
    assert choose(OptimizerConfig(), None, new=False, width=width).learning_rate == pytest.approx(
        1e-3 * 256 / width, rel=0.05
    )


def test_a_rate_that_is_given_is_adamws(recipe):
    choice = optimizer_choice(with_keys(recipe, training={"learning_rate": 1e-4}))
    assert (choice.optimizer.name, choice.learning_rate) == ("adamw", 1e-4)
    assert "as training.learning_rate is given (0.0001)" in choice.why
    own = choose(OptimizerConfig(adamw={"learning_rate": 1e-3}), None, new=True, width=256)
    assert own.optimizer.adamw.learning_rate == 1e-3


def test_a_named_optimizer_is_left_alone(recipe):
    named = with_keys(recipe, training=OPEN, optimizer={"name": "lion"})
    assert optimizer_choice(named) is None
    assert settled(named) is named


def test_the_width_is_that_of_any_architecture(recipe):
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2}
    own = recipe.model_copy(update={"student": recipe.student.model_copy(update={"config": gpt2})})
    assert "64 wide" in optimizer_choice(with_keys(own, training=OPEN)).why


def test_what_was_chosen_is_recorded_and_said(recipe, packed, caplog):
    own = with_keys(recipe, training={**OPEN, "max_steps": 2}, teacher={"use_cached_logits": False})
    inputs = run_inputs(own)
    assert inputs["optimizer"]["name"] == "muon_adamw"
    assert inputs["training"]["learning_rate"] == 0.02
    explicit = with_keys(own, training={"learning_rate": 0.02}, optimizer={
        "name": "muon_adamw", "adamw": {"learning_rate": inputs["optimizer"]["adamw"]["learning_rate"]}})  # fmt: skip
    assert run_inputs(explicit) == inputs, "auto is a short form and nothing else"
    caplog.set_level("INFO", "limbeck")
    train_recipe(own, recipe.student_dir)
    log = (recipe.student_dir / "training.log").read_text()
    assert "optimizer.name auto: Muon at 0.02 for hidden matrices" in log
