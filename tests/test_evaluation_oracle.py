"""The scores of an evaluation beside brute force over plain transformers.

The oracle cuts the packed rows into documents by itself, runs one document after the other alone through
`model(input_ids=…)`, takes log-probabilities in float64 and counts bytes by GPT-2's map of bytes to characters.
"""

import functools
import math

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conftest import TOKENIZER, tiny_model
from limbeck.config import Recipe, SamplingConfig
from limbeck.data.dataset import PackedDataset, PackedRows
from limbeck.data.pack import pack
from limbeck.data.tokenizer import load_tokenizer
from limbeck.evaluation.fidelity import score_model
from limbeck.teachers.base import Teacher
from limbeck.teachers.local import LocalTeacher

#: What a model may do to its logits: nothing, cap them, scale them, add a bias to them; and how large they are made.
MODELS = {
    "llama": ({}, 20.0),
    "gemma2": ({"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 5.0}, 60.0),
    "granite": ({"model_type": "granite", "logits_scaling": 4.0}, 60.0),
    "phi": ({"model_type": "phi", "tie_word_embeddings": False}, 20.0),
}


def model_of(name, seed=1):
    changes, size = MODELS[name]
    model = tiny_model(seed=seed, **changes)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(size)
        if head.bias is not None:
            head.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="module")
def rows(corpus, tmp_path_factory):
    """Held-out rows: several documents a row, documents across rows, the last row filled up."""
    folder = tmp_path_factory.mktemp("packed")
    source = {"name": str(corpus), "max_length": 32, "validation_fraction": 0.2}
    pack(Recipe.model_validate({"name": "rows", "dataset": source}).dataset, load_tokenizer(TOKENIZER), folder)
    held_out = PackedDataset(folder, "validation")
    last = held_out[len(held_out) - 1]["doc_ids"].tolist()
    assert last[-1] == -1
    assert last[0] >= 0
    assert len(held_out) > 17  # 512 positions of 4096 logits are scored at once: some batch has more
    return held_out


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()


# -- brute force ------------------------------------------------------------------------------------------


def documents(rows):
    """(row, start, stop) of every stretch of a row that is one document."""
    found = []
    for number in range(len(rows)):
        owners = rows[number]["doc_ids"].tolist()
        start = 0
        for place in range(1, len(owners) + 1):
            if place == len(owners) or owners[place] != owners[start]:
                if owners[start] >= 0:
                    found.append((number, start, place))
                start = place
    return found


@torch.no_grad()
def log_probabilities(model, rows, attention):
    """float64 log-probabilities `[n, V]` of every document: alone, or after all that stands before it in its row."""
    found = []
    for number, start, stop in documents(rows):
        first = start if attention == "per_document" else 0
        logits = model(input_ids=rows[number]["input_ids"][first:stop].unsqueeze(0)).logits[0, start - first :]
        found.append(logits.double().log_softmax(-1))
    return found


def byte_of_character():
    """GPT-2's map: printable bytes stand for themselves, the others for the characters from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + place): byte for place, byte in enumerate(others)}


@functools.cache
def bytes_of_ids(folder=TOKENIZER):
    """The bytes of every id of a byte-level tokenizer; a special token is no text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table, special = byte_of_character(), set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [b"" if i in special else bytes(table[c] for c in token) for i, token in enumerate(tokens)]


def scores_of(model, rows, *, attention="per_document", teacher=None, top_k=64):
    """Every score by its definition, a document at a time."""
    size = [len(text) for text in bytes_of_ids()]
    nats, count, text, kl, matches, teacher_mass, student_mass = 0.0, 0, 0, 0.0, 0, 0.0, 0.0
    ours = log_probabilities(model, rows, attention)
    theirs = log_probabilities(teacher, rows, attention) if teacher is not None else ours
    for (number, start, stop), log_q, log_p in zip(documents(rows), ours, theirs, strict=True):
        following, log_q, log_p = rows[number]["input_ids"][start + 1 : stop], log_q[:-1], log_p[:-1]
        nats -= float(log_q.gather(1, following.unsqueeze(1)).sum())
        count += stop - start - 1
        text += sum(size[i] for i in following.tolist())
        if teacher is None:
            continue
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        matches += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        support = log_p.topk(top_k).indices
        teacher_mass += float(log_p.gather(1, support).exp().sum())
        student_mass += float(log_q.gather(1, support).exp().sum())
    loss = nats / count
    plain = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": nats / math.log(2) / text, "tokens": count}
    if teacher is None:
        return plain
    means = {"kl_to_teacher": kl, "top1_agreement": matches, "teacher_mass": teacher_mass, "student_mass": student_mass}
    return plain | {name: total / count for name, total in means.items()}


def assert_scores(found, wanted, rel=2e-5):
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=rel, abs=1e-6), name


def taught(teacher, attention="per_document"):
    return LocalTeacher(teacher, attention=attention, vocab_size=len(lengths()))


@functools.cache
def lengths():
    return load_tokenizer(TOKENIZER).byte_lengths()


# -- bytes ------------------------------------------------------------------------------------------------


def test_byte_lengths_are_those_of_gpt2s_byte_map():
    plain = AutoTokenizer.from_pretrained(TOKENIZER)
    oracle = bytes_of_ids()
    assert np.array_equal(lengths(), [len(text) for text in oracle])
    text = 'def f():\n\treturn "naïve – 日本 🙂"\n\x00'
    assert b"".join(oracle[i] for i in plain(text)["input_ids"]) == text.encode()
    assert lengths()[plain.eos_token_id] == 0


def test_a_token_of_several_characters_counts_its_bytes(tmp_path):
    """Not its characters: a tokenizer of Japanese has tokens of three bytes and more."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["日本語のテキスト 日本語 naïve naïve café"] * 20, vocab_size=320, min_frequency=2,
                                special_tokens=["<|endoftext|>"], show_progress=False)  # fmt: skip
    names = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **names).save_pretrained(tmp_path)
    oracle = bytes_of_ids(str(tmp_path))
    assert "日本語".encode() in oracle
    assert load_tokenizer(str(tmp_path)).byte_lengths().tolist() == [len(text) for text in oracle]


# -- scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["per_document", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_brute_force_over_documents(rows, name, attention):
    """Whatever the batch size; 64 rows are more positions than are scored at once."""
    model = model_of(name)
    wanted = scores_of(model, rows, attention=attention)
    for batch_size in (1, 3, 64):
        found = score_model(model, rows, lengths(), attention=attention, batch_size=batch_size)
        assert_scores(found, wanted)
        assert found.tokens_per_second > 0
        assert found.kl_to_teacher is None
        assert found.student_mass is None


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_the_models_here_feel_their_cap_or_scale(rows, name):
    """Without it the scores would be others by far more than the tolerance."""
    model = model_of(name)
    before = scores_of(model, rows)["loss"]
    if name == "gemma2":
        model.config.final_logit_softcapping = None
    else:
        model.logits_scaling = model.config.logits_scaling = 1.0
    assert abs(scores_of(model, rows)["loss"] - before) > 0.05


@pytest.mark.parametrize("attention", ["per_document", "packed"])
@pytest.mark.parametrize(("name", "top_k"), [("llama", 1), ("gemma2", 5), ("granite", 64), ("phi", 5)])
def test_fidelity_is_brute_force_over_the_whole_vocabulary(rows, teacher, name, top_k, attention):
    """KL(teacher ‖ model) and no other way round; both masses on the teacher's likeliest ids."""
    model = model_of(name)
    with torch.no_grad():  # of the teacher's kind, so that they sometimes agree
        model.get_output_embeddings().weight.add_(teacher.get_output_embeddings().weight, alpha=2.0)
    wanted = scores_of(model, rows, attention=attention, teacher=teacher, top_k=top_k)
    assert wanted["kl_to_teacher"] > 0.01
    assert wanted["teacher_mass"] != pytest.approx(wanted["student_mass"], rel=1e-3)
    for batch_size in (2, 64):
        found = score_model(
            model,
            rows,
            lengths(),
            teacher=taught(teacher, attention),
            top_k=top_k,
            attention=attention,
            batch_size=batch_size,
        )
        assert_scores(found, wanted)


def test_a_model_beside_itself(rows, teacher):
    """KL 0, full agreement, equal masses; and all the mass on as many ids as there are."""
    same = score_model(teacher, rows, lengths(), teacher=taught(teacher), top_k=3)
    wanted = scores_of(teacher, rows, teacher=teacher, top_k=3)
    assert (same.kl_to_teacher, same.top1_agreement) == (pytest.approx(0.0, abs=1e-7), 1.0)
    assert same.teacher_mass == same.student_mass == pytest.approx(wanted["teacher_mass"], rel=2e-5)
    assert score_model(teacher, rows, lengths(), teacher=taught(teacher), top_k=9999).teacher_mass == pytest.approx(
        1.0, abs=1e-5
    )


def test_sixty_four_ids_and_documents_apart_unless_told_otherwise(rows, teacher):
    wanted = scores_of(model_of("llama"), rows, teacher=teacher, top_k=64)
    assert_scores(score_model(model_of("llama"), rows, lengths(), teacher=taught(teacher)), wanted)


def test_a_model_that_is_sure_and_wrong_is_scored_in_full(rows, teacher):
    """Log-probabilities far below −80 are finite and count as what they are."""
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1000.0)
    wanted = scores_of(model, rows, teacher=teacher)
    assert wanted["kl_to_teacher"] > 120
    found = score_model(model, rows, lengths(), teacher=taught(teacher))
    assert found.loss == pytest.approx(wanted["loss"], rel=1e-5)
    assert found.kl_to_teacher == pytest.approx(wanted["kl_to_teacher"], rel=1e-5)


class Stored(Teacher):
    """What a teacher elsewhere gives: targets alone, and several batches at a time."""

    ahead = 2

    def __init__(self, local):
        self.local, self.temperatures, self.vocab_size = local, local.temperatures, local.vocab_size
        self.asked = []

    def targets(self, rows):
        self.asked.append(rows.row_ids.tolist())
        return self.local.targets(rows)

    def template(self):
        return self.local.template()


@pytest.mark.parametrize("top_k", [1, 5])
def test_stored_ids_bound_the_distance_from_below(rows, teacher, top_k):
    """The KL of the partition into those ids and the rest, by its definition."""
    model = model_of("llama")
    kl = matches = count = 0
    for (number, start, stop), log_q, log_p in zip(
        documents(rows), log_probabilities(model, rows, "per_document"),
        log_probabilities(teacher, rows, "per_document"), strict=True,
    ):  # fmt: skip
        p, q = log_p[:-1].exp(), log_q[:-1].exp()
        ids = p.topk(top_k).indices
        p_in, q_in = p.gather(1, ids), q.gather(1, ids)
        p_rest, q_rest = 1 - p_in.sum(1), 1 - q_in.sum(1)
        kl += float((p_in * (p_in / q_in).log()).sum() + (p_rest * (p_rest / q_rest).log()).sum())
        matches += int((p.argmax(1) == q.argmax(1)).sum())
        count += stop - start - 1
        assert number < len(rows)
    stored = Stored(LocalTeacher(teacher, top_k=top_k, vocab_size=len(lengths())))
    found = score_model(model, rows, lengths(), teacher=stored, batch_size=3)
    assert found.kl_to_teacher_at_least == pytest.approx(kl / count, rel=2e-5)
    assert (found.kl_to_teacher, found.kl_to_teacher_estimate) == (None, None)
    assert found.top1_agreement == pytest.approx(matches / count)
    whole = scores_of(model, rows, teacher=teacher, top_k=top_k)
    assert found.kl_to_teacher_at_least < whole["kl_to_teacher"]
    assert_scores(found, {key: whole[key] for key in ("loss", "teacher_mass", "student_mass")})
    assert [row for batch in stored.asked for row in batch] == list(range(len(rows)))  # each once, in order


def test_draws_estimate_the_distance_at_their_temperature_alone(rows, teacher):
    model = model_of("llama")
    kl = scores_of(model, rows, teacher=teacher)["kl_to_teacher"]
    sampling = SamplingConfig(head=8, draws=400)
    drawn = Stored(LocalTeacher(teacher, sampling=sampling, temperatures=(1.0,), vocab_size=len(lengths())))
    found = score_model(model, rows, lengths(), teacher=drawn)
    assert found.kl_to_teacher_estimate == pytest.approx(kl, rel=0.05)
    assert (found.kl_to_teacher, found.kl_to_teacher_at_least) == (None, None)
    assert score_model(teacher, rows, lengths(), teacher=drawn).top1_agreement == 1.0
    warm = Stored(LocalTeacher(teacher, sampling=sampling, temperatures=(1.0, 2.0), vocab_size=len(lengths())))
    found = score_model(model, rows, lengths(), teacher=warm)
    assert (found.kl_to_teacher, found.kl_to_teacher_at_least, found.kl_to_teacher_estimate) == (None, None, None)
    assert found.top1_agreement is not None
    same = score_model(teacher, rows, lengths(), teacher=warm)
    assert same.teacher_mass == pytest.approx(same.student_mass, rel=1e-5)


def test_a_batch_without_a_position_counts_for_nothing(teacher):
    """One-token documents are never scored, and a batch of nothing else has no mean."""

    class Rows:
        def __len__(self):
            return 2

        def rows(self, indices):
            ids = torch.arange(1, 17).reshape(2, 8)
            docs = torch.tensor([[0] * 8, list(range(8))])
            return PackedRows(torch.arange(2), ids, docs).slice(indices[0], indices[-1] + 1)

    stored = Stored(LocalTeacher(teacher, top_k=3, vocab_size=len(lengths())))
    one, both = (score_model(model_of("llama"), Rows(), lengths(), teacher=stored, batch_size=n) for n in (1, 2))
    assert one.kl_to_teacher_at_least == pytest.approx(both.kl_to_teacher_at_least)
    assert one.loss == pytest.approx(both.loss)


# -- the teacher's targets --------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["per_document", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_local_teachers_targets_are_the_documents_read_alone(rows, name, attention):
    """At every position, the last of a document too: support, log-probabilities and normalisers."""
    model, taus, k = model_of(name), (1.0, 2.0, 0.5), 9
    wanted = log_probabilities(model, rows, attention)
    local = LocalTeacher(model, top_k=k, temperatures=taus, attention=attention, max_batch_tokens=100)
    batch = rows.rows(range(len(rows)))
    found = local.targets(batch)
    for (number, start, stop), log_p in zip(documents(rows), wanted, strict=True):
        part = found[number, start:stop]
        of_its_ids = log_p.gather(-1, part.token_ids.long())
        torch.testing.assert_close(part.logprobs.double(), of_its_ids, rtol=0, atol=3e-5)
        torch.testing.assert_close(of_its_ids, log_p.topk(k).values, rtol=0, atol=3e-5)
        for index, tau in enumerate(taus):
            torch.testing.assert_close(
                part.log_z[:, index].double(), (log_p / tau).logsumexp(-1), rtol=0, atol=6e-5
            )  # fmt: skip
    assert isinstance(batch, PackedRows)
    assert int((batch.labels != -100).sum()) == sum(stop - start - 1 for _, start, stop in documents(rows))


def test_dropout_has_no_part_in_a_score(rows):
    model = tiny_model(attention_dropout=0.5).train()
    found = score_model(model, rows, lengths())
    assert not model.training
    assert_scores(found, scores_of(tiny_model(), rows))
