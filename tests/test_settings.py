"""Keys by their short names, keys that have no effect, and defaults that stand once."""

import inspect

import pytest
import yaml

from conftest import limbeck, with_keys
from limbeck import LocalTeacher, RemoteTeacher, fused_distillation_loss
from limbeck.cli.options import parse_flags
from limbeck.config import LossConfig, Recipe, TeacherConfig
from limbeck.config.teacher import CacheConfig, LocalTeacherConfig, RemoteTeacherConfig
from limbeck.config.unused import without_effect
from limbeck.errors import ConfigError
from limbeck.losses.dense import dense_distillation_loss
from limbeck.recipe import load_recipe
from limbeck.targets.spec import TargetSpec
from limbeck.teachers.http import TeacherClient

SHORT = {
    "timeout": ("remote", "timeout", 7.0),
    "endpoint": ("remote", "endpoint", ["http://a:1"]),
    "tail": ("remote", "tail", "approximate"),
    "dtype": ("local", "dtype", "float16"),
    "batch_size": ("local", "batch_size", 3),
    "splits": ("cache", "splits", ["train"]),
    "rows_per_shard": ("cache", "rows_per_shard", 9),
    "cache_dir": ("cache", "dir", "somewhere"),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_is_the_key_of_its_part(name, tmp_path):
    part, leaf, value = SHORT[name]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"teacher": {name: value}}))
    found = getattr(getattr(load_recipe(path).teacher, part), leaf)
    assert found == value or str(found) == value
    path.write_text(yaml.safe_dump({"teacher": {part: {leaf: value}}}))
    assert getattr(getattr(load_recipe(path).teacher, part), leaf) == found


def test_every_key_of_a_part_has_its_short_name():
    for part, section in (("local", LocalTeacherConfig), ("remote", RemoteTeacherConfig), ("cache", CacheConfig)):
        for leaf in section.model_fields:
            short = "cache_dir" if leaf == "dir" else leaf
            assert parse_flags([f"--teacher.{short}", "x"]) == {"teacher": {part: {leaf: "x"}}}, leaf


def test_a_key_by_both_names_with_two_values_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("teacher: {timeout: 5, remote: {timeout: 6}}")
    with pytest.raises(ConfigError, match=r"teacher.timeout is 5 and teacher.remote.timeout, its full name, is 6"):
        load_recipe(path)
    path.write_text("teacher: {timeout: 5, remote: {timeout: 5, retries: 3}}")
    assert load_recipe(path).teacher.remote.retries == 3


def test_flags_win_by_either_name(tmp_path):
    path = tmp_path / "r.yaml"
    for written in ("teacher: {timeout: 5}", "teacher: {remote: {timeout: 5}}"):
        path.write_text(written)
        for flag in ("--teacher.timeout", "--teacher.remote.timeout"):
            assert load_recipe(path, parse_flags([flag, "8"])).teacher.remote.timeout == 8


# -- keys without effect ------------------------------------------------------------------------------------

WITHOUT = [
    ({"teacher": {"timeout": 5.0}}, "teacher.remote.timeout has no effect: no teacher.endpoint is set"),
    (
        {"teacher": {"endpoint": "http://a:1", "dtype": "float16", "batch_size": 2}},
        "teacher.local.dtype, teacher.local.batch_size have no effect: the teacher is remote (teacher.endpoint)",
    ),
    ({"teacher": {"sampling": {"head": 2}, "top_k": 8}}, "teacher.top_k has no effect: teacher.sampling replaces it"),
    ({"teacher": {"revision": "v1"}}, "teacher.revision has no effect: no teacher.model is set"),
    ({"student": {"trust_remote_code": True}}, "student.trust_remote_code has no effect: no student.model is set"),
    (
        {"training": {"mode": "ce"}, "loss": {"alpha": 0.9, "load_balance": 0.5}},
        "loss.alpha has no effect: training.mode is ce",
    ),
    (
        {"teacher": {"use_cached_logits": False, "cache_dir": "x"}},
        "teacher.cache.dir has no effect: targets are not cached (teacher.use_cached_logits)",
    ),
    ({"dataset": {"config_name": "en"}}, "dataset.config_name has no effect: dataset.name is no dataset"),
    (
        {"training": {"max_steps": 5, "num_train_epochs": 3}},
        "training.num_train_epochs has no effect: training.max_steps decides",
    ),
    (
        {"training": {"decay_ratio": 0.5}},
        "training.decay_ratio has no effect: training.lr_scheduler_type is not warmup_stable_decay",
    ),
    ({"training": {"eval_rows": 5}}, "training.eval_rows has no effect: training.eval_steps is not set"),
]


@pytest.mark.parametrize(("tree", "told"), WITHOUT)
def test_a_key_that_means_nothing_is_told(tree, told):
    assert without_effect(Recipe.model_validate(tree)) == [told]


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"teacher": {"endpoint": "http://a:1", "timeout": 5.0}},
        {"teacher": {"model": "m", "revision": "v1", "dtype": "float16", "cache_dir": "x", "top_k": 8}},
        {"student": {"model": "m", "revision": "v1"}},
        {"loss": {"alpha": 0.9}, "training": {"num_train_epochs": 2, "eval_steps": 2, "eval_rows": 3}},
        {"dataset": {"name": "someone/texts", "config_name": "en", "streaming": False}},
        {"training": {"lr_scheduler_type": "warmup_stable_decay", "decay_ratio": 0.5}},
    ],
)
def test_a_key_that_counts_is_not_told(tree):
    assert without_effect(Recipe.model_validate(tree)) == []


def test_it_is_told_before_any_work(recipe, tmp_path):
    path = tmp_path / "r.yaml"
    changed = with_keys(recipe, teacher={"timeout": 5.0})
    path.write_text(yaml.safe_dump(changed.model_dump(mode="json", exclude_unset=True)))
    done = limbeck("run", path, "--dry-run")
    assert "WARNING: teacher.remote.timeout has no effect: no teacher.endpoint is set" in done.stderr


# -- defaults -----------------------------------------------------------------------------------------------


def test_functions_have_the_recipes_defaults():
    def defaults(function):
        return {name: one.default for name, one in inspect.signature(function).parameters.items()}

    loss, remote = LossConfig(), RemoteTeacherConfig()
    for function in (fused_distillation_loss, dense_distillation_loss):
        found = defaults(function)
        assert (found["alpha"], found["temperature"], found["tail"]) == (loss.alpha, loss.temperature, loss.tail)
    client = defaults(TeacherClient)
    for key in ("timeout", "retries", "max_concurrent"):
        assert client[key] == getattr(remote, key)
    for function in (LocalTeacher, RemoteTeacher.connect, TargetSpec):
        assert defaults(function)["top_k"] == TeacherConfig().top_k
        assert defaults(function)["temperatures"] == (1.0, loss.temperature)
