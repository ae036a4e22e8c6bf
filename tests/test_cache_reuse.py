"""A cache answers whatever it can: fewer ids, temperatures and rows, in another run; else it says what it lacks."""

import json

import pytest
import torch

from conftest import limbeck, with_keys
from limbeck.data.dataset import PackedDataset
from limbeck.errors import LimbeckError
from limbeck.models import load_causal_lm
from limbeck.pipeline import run_pipeline
from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.base import Teacher
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.reuse import lacks
from limbeck.teachers.sources import training_source

WIDE = {"top_k": 16, "temperatures": [1.0, 2.0, 4.0]}


def opened(recipe) -> Teacher:
    """The teacher that trains the recipe, over its training rows."""
    from limbeck.data.tokenizer import recipe_tokenizer

    rows = PackedDataset(recipe.packed_dir, "train", recipe.dataset.train_rows)
    return training_source(recipe).open(recipe_tokenizer(recipe), rows)


def test_fewer_ids_are_the_likeliest_with_their_own_normalisers():
    logits = torch.randn(3, 5, 50, dtype=torch.float64)
    wide = SparseTargets.from_logits(logits, 20, (1.0, 2.0, 4.0))
    few = SparseTargets.from_logits(logits, 6, (1.0, 4.0))
    shuffled = torch.randperm(20)
    mixed = wide.with_tensors(
        {**wide.tensors(), "token_ids": wide.token_ids[..., shuffled], "logprobs": wide.logprobs[..., shuffled]}
    )
    found = mixed.narrowed(6, (1.0, 4.0))
    assert torch.equal(found.token_ids, few.token_ids)
    for temperature in (1.0, 4.0):
        for one, other in zip(found.at_temperature(temperature), few.at_temperature(temperature), strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(LimbeckError, match="temperature 3.0 is not declared"):
        wide.narrowed(None, (3.0,))


@pytest.fixture
def made(recipe):
    """A recipe whose cache is there, with more in it than the recipe wants."""
    wide = with_keys(recipe, teacher=WIDE)
    run_pipeline(wide, "cache")
    return recipe


@pytest.mark.parametrize("narrow", [
    {"teacher": {"top_k": 5}},
    pytest.param({"teacher": {"temperatures": [1.0, 2.0]}}, marks=pytest.mark.slow),
    pytest.param({"dataset": {"train_rows": 6}}, marks=pytest.mark.slow),
    pytest.param({"teacher": {"rows_per_shard": 4, "splits": ["train"]}}, marks=pytest.mark.slow),
    {"teacher": {"top_k": 3, "temperatures": [1.0, 2.0]}, "dataset": {"train_rows": 9}},
])  # fmt: skip
def test_a_wider_cache_trains_as_the_teacher_itself(made, narrow):
    own = with_keys(made, teacher=WIDE)
    own = with_keys(own, **narrow)
    before = (made.cache_dir / "inputs.json").read_bytes()
    report = run_pipeline(own, "train")
    assert {stage.name: stage.state for stage in report.stages}["cache"] == "skipped"
    assert (made.cache_dir / "inputs.json").read_bytes() == before
    rows = PackedDataset(own.packed_dir, "train", own.dataset.train_rows)
    batch = rows.rows(range(len(rows)))
    targets = opened(own).targets(batch)
    model = load_causal_lm(own.teacher.model, dtype="float32")
    direct = LocalTeacher(model, top_k=own.teacher.top_k, temperatures=own.temperatures).targets(batch)
    assert targets.temperatures == own.temperatures
    assert targets.top_k == own.teacher.top_k
    shared = (targets.token_ids.unsqueeze(-1) == direct.token_ids.unsqueeze(-2)).any(-1).float().mean()
    assert shared > 0.95, "all but what the codec's rounding makes equal"
    for temperature in own.temperatures:
        one, other = targets.at_temperature(temperature)[1], direct.at_temperature(temperature)[1]
        torch.testing.assert_close(one.exp(), other.exp(), atol=5e-3, rtol=0.0)


def test_what_is_left_out_belongs_to_what_is_trained_from(made):
    from limbeck.data.tokenizer import recipe_tokenizer

    tokenizer = recipe_tokenizer(made)
    whole = training_source(with_keys(made, teacher=WIDE)).inputs(tokenizer)
    assert set(whole) == {"cache"}
    few = training_source(with_keys(made, teacher={**WIDE, "top_k": 4})).inputs(tokenizer)
    assert few == {**whole, "top_k": 4}


def test_a_cache_that_lacks_something_says_what_and_what_another_costs(made):
    named = with_keys(made, teacher={"cache_dir": str(made.cache_dir)})
    positions = len(PackedDataset(made.packed_dir)) + len(PackedDataset(made.packed_dir, "validation"))
    cost = f"the teacher runs over {positions} rows of 32 tokens, about "
    for keys, why in (
        ({"top_k": 32}, "it keeps 16 ids a position and teacher.top_k is 32"),
        ({"temperatures": [1.0, 2.0, 8.0]}, r"it has no normaliser at temperature 8 \(it has 1, 2, 4\)"),
        ({"dtype": "bfloat16"}, "it is of teacher.dtype auto and this run has bfloat16"),
    ):
        with pytest.raises(LimbeckError, match=why) as found:
            run_pipeline(with_keys(named, teacher={**WIDE, **keys}), "cache")
        assert cost in str(found.value)
        assert "--cache-dir" in str(found.value)
    run_pipeline(with_keys(made, teacher={**WIDE, "top_k": 32}), "cache")  # its own: moved away, and made again
    assert len(list((made.root / "previous").glob("cache-*"))) == 1


def test_an_earlier_cache_that_answers_is_put_back(made):
    run_pipeline(with_keys(made, teacher={**WIDE, "temperatures": [1.0, 2.0, 8.0]}), "cache")
    report = run_pipeline(with_keys(made, teacher={"temperatures": [1.0, 4.0], "top_k": 7},
                                    loss={"temperature": 4.0}), "cache")  # fmt: skip
    assert report.stages[-1].state == "skipped"
    assert json.loads((made.cache_dir / "manifest.json").read_text())["codec"]["temperatures"] == [1.0, 2.0, 4.0]


def test_another_runs_cache_is_pointed_at_and_used(recipe_tree, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**recipe_tree, "teacher": {**recipe_tree["teacher"], **WIDE}}))
    limbeck("teacher", "cache", path)
    told = limbeck("teacher", "cache", path, "--output_dir", tmp_path / "two").stderr
    assert f"{tmp_path / 'run' / 'cache'} holds these targets: with --cache-dir" in told
    used = limbeck(
        "train", path, "--name", "three", "--output_dir", tmp_path / "three", "--cache-dir", tmp_path / "run" / "cache",
        "--top-k", "8", "--json",
    )  # fmt: skip
    assert {s["name"]: s["state"] for s in json.loads(used.stdout)["stages"]}["cache"] == "skipped"


def test_drawn_targets_answer_only_the_same_draws(recipe):
    rows = None
    held = {"packed": "a", "sampling": {"head": 4}, "splits": ["train"], "temperatures": [1.0], "top_k": 64,
            "train_rows": None}  # fmt: skip
    assert lacks(held, held, rows) == []
    other = {**held, "sampling": {"head": 8}}
    assert "teacher.sampling" in lacks(held, other, rows)[0]


def test_a_cache_made_again_is_recorded_as_what_it_is(made):
    """Made by force for fewer ids, it must not stand for the wider one that answered before."""
    few = with_keys(made, teacher={**WIDE, "top_k": 4})
    assert run_pipeline(few, "cache").stages[-1].state == "skipped"
    run_pipeline(few, "cache", force=True)
    manifest, inputs = (json.loads((made.cache_dir / name).read_text()) for name in ("manifest.json", "inputs.json"))
    assert (manifest["codec"]["top_k"], inputs["inputs"]["top_k"]) == (4, 4)
    again = run_pipeline(with_keys(made, teacher=WIDE), "cache")  # the wide one is put back
    assert again.stages[-1].state == "skipped"
    assert json.loads((made.cache_dir / "manifest.json").read_text())["codec"]["top_k"] == 16


def test_a_stages_cache_in_previous_is_not_the_runs(made):
    earlier = made.root / "previous" / "cache-kd-0123456789ab"
    earlier.parent.mkdir()
    made.cache_dir.rename(earlier)
    report = run_pipeline(with_keys(made, teacher={"top_k": 5}), "cache")
    assert report.stages[-1].state == "done"
    assert json.loads((made.cache_dir / "manifest.json").read_text())["codec"]["top_k"] == 5
