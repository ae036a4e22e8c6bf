"""`limbeck teacher probe`: what an endpoint speaks, what it gives, whether its rows are where they should be, how fast.

The one idea: everything is found out by asking. Alignment is tested three ways: a changed token must first change its
own row (any endpoint), real text must be likelier at the right shift than one off (with a tokenizer), and a teacher in
this process must agree (with its weights at hand).
"""

import statistics
import time
from typing import Any

import torch

from limbeck.config import Recipe, TeacherConfig
from limbeck.console import printable
from limbeck.data.dataset import PackedRows
from limbeck.data.tokenizer import LoadedTokenizer, recipe_tokenizer
from limbeck.errors import ConfigError, LimbeckError
from limbeck.models import load_frozen
from limbeck.registry import PROTOCOLS
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.spec import TargetSpec
from limbeck.teachers.discovery import discover
from limbeck.teachers.http import TeacherClient
from limbeck.teachers.identity import connection
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.protocols.base import EndpointInfo, WireSpec
from limbeck.teachers.protocols.segments import CANARY
from limbeck.teachers.remote import RemoteTeacher, check_spec
from limbeck.teachers.sources import target_spec

_TEXT = (
    "The old still stood in a corner of the workshop. Every autumn it was filled, heated slowly and watched through "
    "the night, for what came over first was sharp and what came last was dull; only the middle was kept. In the "
    "morning the copper was washed, the fire was raked out, and the year was written on a paper label."
)
_ROUNDS, _ROWS = 12, 4


def probe(recipe: Recipe) -> dict[str, Any]:
    """What is found out about the recipe's first endpoint, as printed by `limbeck teacher probe`.

    Raises:
        ConfigError: no endpoint is named.
        UnreachableError, RefusedError: nobody answers there, or nobody who can be understood.
    """
    section = recipe.teacher.remote
    if not recipe.teacher.is_remote:
        raise ConfigError("no endpoint: `limbeck teacher probe http://HOST:PORT`.")
    tokenizer = _tokenizer_at_hand(recipe)
    client = TeacherClient(section.endpoint[:1], **connection(section))
    try:
        known = discover(client, section.protocol, tokenizer, section.served_model)
    finally:
        client.close()
    info = known.info
    vocab_size = info.vocab_size or section.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    wanted = recipe.teacher.top_k or 64
    top_k = min(wanted, info.max_top_k or wanted, vocab_size or wanted)
    found: dict[str, Any] = {
        "endpoint": section.endpoint[0],
        "protocol": info.protocol,
        "model": info.model,
        "fingerprint": info.fingerprint,
        "vocab_size": vocab_size,
        "vocab_size_from": _vocabulary_source(section.vocab_size, info.vocab_size, tokenizer),
        "tokenizer": _tokenizer_agrees(info.tokenizer, tokenizer),
        "max_top_k": info.max_top_k,
        "max_tokens": info.max_tokens,
        "max_sequences": info.max_sequences,
        "temperatures": "any" if info.temperatures else "1 only, whatever is asked",
        "top_k": top_k,
        "notes": list(info.notes),
    }
    teacher = RemoteTeacher.connect(
        section.endpoint[:1], protocol=info.protocol, top_k=top_k, temperatures=(1.0,), tokenizer=tokenizer,
        vocab_size=vocab_size or 1 << 24, model=section.served_model, full=section.logprobs == "float32",
        approximate=True, max_request_tokens=section.max_request_tokens, found=known, **connection(section),
    )  # fmt: skip
    found["this_recipe"] = _verdict(target_spec(recipe), section.tail, info, vocab_size)
    try:
        rows = _text_rows(tokenizer)
        found |= _speed(teacher, rows)
        found["alignment"] = "by a changed token" if info.protocol != "limbeck" else "rows are answered whole"
        if tokenizer is not None:
            found["text"] = _shifts(teacher.targets(rows), rows)
            if recipe.teacher.source is not None:
                found["local"] = _against_local(recipe.teacher, recipe.training.device, teacher, rows)
    finally:
        teacher.close()
    return found


def _verdict(wanted: TargetSpec, tail: str, info: EndpointInfo, vocab_size: int | None) -> str:
    """Whether the recipe's K, temperatures, attention and sampling can be had here."""
    spec = WireSpec(**vars(wanted), vocab_size=vocab_size or 1 << 24, approximate=tail == "approximate")
    try:
        check_spec(spec, info)
        PROTOCOLS.get(info.protocol)().supports(spec, info)
    except LimbeckError as error:
        return f"would be refused: {error}"
    kept = f"K {spec.support}" if spec.top_k else "the whole vocabulary"
    return f"can be taught: {kept} at temperatures {', '.join(f'{t:g}' for t in spec.temperatures)}"


def _tokenizer_at_hand(recipe: Recipe) -> LoadedTokenizer | None:
    named = (recipe.tokenizer.name, recipe.teacher.model, recipe.student.model)
    return recipe_tokenizer(recipe) if any(named) else None


def _tokenizer_agrees(told: str | None, own: LoadedTokenizer | None) -> str:
    if told is None:
        return "not told by this protocol"
    if own is None:
        return f"{told[:12]} (name one with --tokenizer to compare)"
    return "the same" if told == own.hash else f"another: {told[:12]}, and {own.name} is {own.hash[:12]}"


def _vocabulary_source(given: int | None, told: int | None, tokenizer: LoadedTokenizer | None) -> str:
    if told is not None:
        return "the endpoint"
    if given is not None:
        return "teacher.vocab_size"
    return "the tokenizer" if tokenizer is not None else "unknown; name the tokenizer"


def _text_rows(tokenizer: LoadedTokenizer | None) -> PackedRows:
    """The same sentences from several beginnings, `[4, T]`."""
    ids = CANARY * 5 if tokenizer is None else tokenizer.hf(_TEXT, add_special_tokens=False)["input_ids"]
    starts = [0] if tokenizer is not None else [0, 1, 2, 3]  # a text cut inside a word is another text
    length = len(ids) - starts[-1]
    rows = torch.tensor([ids[start : start + length] for start in starts] * (_ROWS // len(starts)))
    return PackedRows(torch.arange(len(rows)), rows, torch.zeros_like(rows))


def _speed(teacher: RemoteTeacher, rows: PackedRows) -> dict[str, Any]:
    """Round trips alone and with several in flight."""
    teacher.targets(rows)
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        teacher.targets(rows.slice(0, 1))
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    for future in [teacher.submit(rows) for _ in range(_ROUNDS)]:
        future.result()
    seconds = time.perf_counter() - started
    return {
        "round_trip_ms": round(1e3 * statistics.median(times), 2),
        "round_trips_per_s": round(1.0 / statistics.median(times), 1),
        "positions_per_s": round(_ROUNDS * rows.input_ids.numel() / seconds),
    }


def _shifts(targets: SparseTargets, rows: PackedRows) -> dict[str, Any]:
    """Share of real tokens that are the likeliest id of the row before them, of their own row, and of the one after."""
    best = targets.token_ids[..., 0]
    shares: dict[str, Any] = {}
    for name, shift in (("own_token", 0), ("next_token", 1), ("one_after", 2)):
        real = rows.input_ids[:, shift:]
        guess = best[:, : real.shape[1]]
        known = guess >= 0
        shares[name] = round(float((guess == real)[known].float().mean()), 3) if bool(known.any()) else 0.0
    others = max(shares["own_token"], shares["one_after"])
    clear = shares["next_token"] > others
    shares["verdict"] = "the next token is guessed best, as it should be" if clear else "unclear: a weak model"
    return shares


def _against_local(
    section: TeacherConfig, device: str | None, teacher: RemoteTeacher, rows: PackedRows
) -> dict[str, Any]:
    """KL of the local teacher's top ids to the remote's, in nats a position."""
    assert section.source is not None
    try:
        model = load_frozen(section.source, section.local.dtype, section.local.device or device)
    except LimbeckError as error:
        return {"skipped": f"{section.model} has no weights here ({str(error)[:80]})"}
    local = LocalTeacher(model, top_k=teacher.spec.top_k, temperatures=(1.0,), attention="packed")
    own = local.targets(rows).to("cpu")
    other = teacher.targets(rows)
    size = max(own.vocab_size, other.vocab_size)
    p, q = own.to_dense(size)[:, :-1], other.to_dense(size)[:, :-1]
    known = other.valid.any(dim=-1)[:, :-1]
    gap = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()), 0.0).sum(dim=-1)[known]
    # The other's favourite is as good as ours where both are equally likely.
    favourite = other.token_ids[..., :1].clamp_min(0).long()[:, :-1]
    same = (p.amax(dim=-1) - p.gather(-1, favourite).squeeze(-1) < 1e-3)[known]
    return {
        "kl": float(gap.mean().clamp_min(0.0)),
        "top1_agreement": round(float(same.float().mean()), 4),
        "positions": int(known.sum()),
    }


def report_text(found: dict[str, Any]) -> str:
    """The report for a reader, one a line."""
    lines = []
    for key, value in found.items():
        if key == "notes" or value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number:.3g}" if isinstance(number, float) else f"{name} {number}"
                              for name, number in value.items())  # fmt: skip
        lines.append(f"{key:<18} {printable(str(value))}")
    return "\n".join([*lines, *(f"note: {printable(note)}" for note in found["notes"])])
