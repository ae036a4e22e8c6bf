"""Local and cached teachers: the same targets, the same loss, and refusals before any harm."""

import pytest
import torch

from conftest import digest, loss_request, save_model, tiny_model, with_keys
from limbeck import LocalTeacher, TeacherCache
from limbeck.config import SamplingConfig
from limbeck.errors import ConfigError, CorruptError, MismatchError
from limbeck.losses.fused import fused_distillation_loss
from limbeck.models import LogitTransform, keeps_documents_apart, load_causal_lm
from limbeck.teachers.base import Teacher
from limbeck.teachers.build_cache import build_cache
from limbeck.training.head import attach_objectives

TAUS = (1.0, 2.0)


def settings(tau, **changes):
    return {"alpha": 1.0, "temperature": tau, **changes}


def loss_of(model, rows, targets, tau):
    """The objectives' metrics, as means over the positions."""
    request = loss_request(rows.labels, targets, **settings(tau))
    with torch.no_grad():
        found = model(**rows.model_inputs("per_document"), loss_request=request)
    count = int((rows.labels >= 0).sum())
    return {name: float(value) / count for name, value in found.metrics.items()} | {"loss": float(found.loss)}


def test_local_targets_are_the_models_own_distribution(teacher_folder, packed):
    from limbeck.models import load_causal_lm

    model = load_causal_lm(str(teacher_folder), dtype="float32").eval()
    rows = packed.rows([0, 3, 5])
    with torch.no_grad():
        logits = model(**rows.model_inputs("per_document")).logits
    teacher = LocalTeacher(model, top_k=9, temperatures=TAUS, max_batch_tokens=40)
    assert isinstance(teacher, Teacher)
    targets = teacher.targets(rows)
    assert targets.token_ids.shape == (3, 32, 9)
    expected, ids = (logits / 2).log_softmax(-1).topk(9)
    log_p, _ = targets.at_temperature(2.0)
    torch.testing.assert_close(log_p, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(targets.token_ids.long(), ids)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", [16, None])
def test_a_model_distilled_from_itself_has_no_divergence(teacher_folder, packed, tau, k):
    """The alignment test: off by one, this would be several nats."""
    from limbeck.models import load_causal_lm

    model = load_causal_lm(str(teacher_folder), dtype="float32").eval()
    attach_objectives(model)
    rows = packed.rows(range(8))
    teacher = LocalTeacher(load_causal_lm(str(teacher_folder), dtype="float32"), top_k=k, temperatures=TAUS)
    parts = loss_of(model, rows, teacher.targets(rows), tau)
    assert abs(parts["kl_loss"]) < 1e-6
    assert parts["top1_agreement"] == 1.0
    assert int((rows.labels >= 0).sum()) > 100


@pytest.mark.parametrize("tau", TAUS)
def test_cached_loss_is_the_local_loss_within_the_codecs_bound(recipe, packed, teacher_folder, tau):
    from limbeck.models import load_causal_lm

    manifest = build_cache(recipe, recipe.cache_dir)
    cache = TeacherCache(recipe.cache_dir)
    local = LocalTeacher(load_causal_lm(str(teacher_folder), dtype="float32"), top_k=16, temperatures=TAUS)
    rows = packed.rows([2, 7, 1, 30])
    same = load_causal_lm(str(teacher_folder), dtype="float32").eval()
    attach_objectives(same)
    itself = loss_of(same, rows, cache.targets(rows), tau)
    assert 0.0 <= itself["kl_loss"] < max(manifest.roundtrip_kl * 2, 1e-6) < 1e-4
    student = tiny_model(seed=1)
    attach_objectives(student)
    losses = [loss_of(student, rows, source.targets(rows), tau)["loss"] for source in (local, cache)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_documents_of_a_row_do_not_see_each_other(packed):
    model = tiny_model()
    assert keeps_documents_apart(model)
    number = next(i for i in range(len(packed)) if len(packed[i]["doc_ids"].unique()) == 2)
    rows = packed.rows([number])
    owner = rows.doc_ids[0]
    border = int((owner != owner[0]).nonzero()[0])
    teacher = LocalTeacher(model, top_k=4)
    whole = teacher.targets(rows)
    second = rows.input_ids[:, border:]
    alone = teacher.targets(type(rows)(rows.row_ids, second, rows.doc_ids[:, border:]))
    torch.testing.assert_close(whole.logprobs[:, border:], alone.logprobs, rtol=1e-4, atol=1e-4)


def test_linear_attention_models_are_found_out():
    model = tiny_model(
        model_type="qwen3_next", num_hidden_layers=1, layer_types=["linear_attention"], head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    assert not keeps_documents_apart(model)


def test_soft_caps_and_scales_are_the_models_own(packed):
    gemma = tiny_model(model_type="gemma2", head_dim=16, final_logit_softcapping=5.0, query_pre_attn_scalar=16)
    granite = tiny_model(model_type="granite", logits_scaling=4.0)
    rows = packed.rows([0, 1])
    for model in (gemma, granite):
        transform = LogitTransform.of(model.config)
        assert transform != LogitTransform()
        with torch.no_grad():
            logits = model(**rows.model_inputs("per_document")).logits
            labels = rows.labels
            plain = torch.nn.functional.cross_entropy(logits.view(-1, 4096), labels.view(-1), ignore_index=-100)
            attach_objectives(model)
            ours = torch.tensor(loss_of(model, rows, None, 1.0)["loss"])
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_sampled_targets_do_not_depend_on_the_batch(packed):
    model = tiny_model(seed=3)
    teacher = LocalTeacher(model, temperatures=TAUS, sampling=SamplingConfig(head=4, draws=6), sampling_temperature=2.0)
    together, alone = teacher.targets(packed.rows([4, 9])), teacher.targets(packed.rows([9]))
    assert torch.equal(together.token_ids[1], alone.token_ids[0])


def test_sampled_targets_through_the_cache(recipe, packed):
    sampled = recipe.model_copy(
        update={"teacher": recipe.teacher.model_copy(update={"sampling": SamplingConfig(head=4, draws=8)})}
    )
    build_cache(sampled, sampled.cache_dir)
    cache = TeacherCache(sampled.cache_dir)
    targets = cache.read([0, 1])
    assert targets.weights is not None
    torch.testing.assert_close(targets.weights.sum(-1), torch.ones(2, 32), rtol=1e-2, atol=1e-2)
    out = fused_distillation_loss(
        torch.randn(2, 32, 8), torch.randn(4096, 8), packed.rows([0, 1]).labels, targets, temperature=2.0
    )
    assert torch.isfinite(out.loss)


def test_caches_are_whole_deterministic_and_continued(recipe, packed, tmp_path, monkeypatch):
    import limbeck.teachers.build_cache as module

    build_cache(recipe, tmp_path / "whole")
    original, made = module.write_shard, 0

    def stops(*arguments, **options):
        nonlocal made
        if made == 2:
            raise KeyboardInterrupt
        made += 1
        return original(*arguments, **options)

    monkeypatch.setattr(module, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        build_cache(recipe, tmp_path / "cut")
    monkeypatch.setattr(module, "write_shard", original)
    build_cache(recipe, tmp_path / "cut")
    whole = digest(tmp_path / "whole", "*.h5", "manifest.json")
    assert digest(tmp_path / "cut", "*.h5", "manifest.json") == whole
    assert len(whole) > 4


def test_ranks_share_a_cache(recipe, packed, tmp_path, monkeypatch):
    build_cache(recipe, tmp_path / "one")
    for rank in ("1", "0"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        build_cache(recipe, tmp_path / "two")
    assert digest(tmp_path / "one", "*.h5", "manifest.json") == digest(tmp_path / "two", "*.h5", "manifest.json")


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_caches_are_noticed(recipe, packed, damage):
    build_cache(recipe, recipe.cache_dir)
    shard = recipe.cache_dir / "train-00000.h5"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data if damage == "flip" else data[:-100])
    with pytest.raises(CorruptError, match="train-00000.h5 is damaged"):
        TeacherCache(recipe.cache_dir)


def test_caches_refuse_what_they_were_not_made_for(recipe, packed, corpus, tmp_path, monkeypatch):
    from limbeck.data.dataset import PackedDataset
    from limbeck.data.pack import pack
    from limbeck.data.tokenizer import recipe_tokenizer
    from limbeck.errors import LimbeckError
    from limbeck.training.check import check_teacher

    build_cache(recipe, recipe.cache_dir)
    cache = TeacherCache(recipe.cache_dir)
    cache.check(packed)
    with pytest.raises(ConfigError, match="attention is per_document and the student's packed"):
        check_teacher(cache, recipe.loss, "packed", packed)
    other = recipe.dataset.model_copy(update={"max_length": 16})
    pack(other, recipe_tokenizer(recipe), tmp_path / "short")
    with pytest.raises(MismatchError, match="rows of 32 tokens and this run has rows of 16"):
        cache.check(PackedDataset(tmp_path / "short"))
    with pytest.raises(ConfigError, match="3.0 is not declared"):
        cache.read([0]).at_temperature(3.0)
    with pytest.raises(LimbeckError, match="top_k: 16 -> 8"):
        build_cache(
            recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"top_k": 8})}), recipe.cache_dir
        )
    greedy = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"top_k": 5000})})
    with pytest.raises(ConfigError, match="5000 and the teacher's vocabulary has 4096"):
        build_cache(greedy, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("held", "wanted"), [(None, 7), (12, 6), (12, 12)])
def test_a_cache_serves_some_of_the_rows_it_was_made_for(recipe, packed, held, wanted):
    """By their places in the whole split, whatever numbers they go by."""
    from limbeck.data.dataset import PackedDataset

    made = with_keys(recipe, dataset={"train_rows": held}) if held else recipe
    build_cache(made, recipe.cache_dir)
    rows = PackedDataset(recipe.packed_dir, max_rows=wanted)
    found = TeacherCache(recipe.cache_dir).for_rows(rows)
    found.check(rows)
    batch = rows.rows(range(wanted))
    teacher = LocalTeacher(load_causal_lm(recipe.teacher.model, dtype="float32"), top_k=16)
    exact = teacher.targets(batch)
    assert torch.equal(found.targets(batch).token_ids.sort(-1).values, exact.token_ids.sort(-1).values)


def test_a_cache_of_too_few_rows_names_how_many_are_missing(recipe, packed):
    from limbeck.data.dataset import PackedDataset

    build_cache(with_keys(recipe, dataset={"train_rows": 12}), recipe.cache_dir)
    with pytest.raises(MismatchError, match=r"holds 12 evenly spaced rows .* of the 7 rows of this run are not among"):
        TeacherCache(recipe.cache_dir).for_rows(PackedDataset(recipe.packed_dir, max_rows=7))
    with pytest.raises(MismatchError, match="packed dataset"):
        TeacherCache(recipe.cache_dir).check(packed)


def test_the_gate_refuses_a_costly_codec(recipe, packed, tmp_path):
    from limbeck.errors import LimbeckError

    strict = with_keys(recipe, teacher={"max_kl": 1e-12})
    with pytest.raises(LimbeckError, match="teacher.max_kl"):
        build_cache(strict, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.h5"))


def test_another_tokenizer_is_refused(recipe, packed, corpus, tmp_path):
    from limbeck.data.tokenizer import train_tokenizer

    folder = save_model(tiny_model(), tmp_path / "other")
    train_tokenizer(recipe.dataset, 300, folder)
    foreign = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"model": str(folder)})})
    with pytest.raises(MismatchError, match="tokenizer"):
        build_cache(foreign, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_hub_model_is_known_by_its_commit_without_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from limbeck.errors import LimbeckError
    from limbeck.models import model_identity

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert model_identity("org/name") == {"weights": commit}
    with pytest.raises(LimbeckError, match="the hub cannot be reached"):
        model_identity("org/other")
    with pytest.raises(LimbeckError, match="no hub id"):
        model_identity("no such/name/at all")
