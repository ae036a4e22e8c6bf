"""Fill a cache: run the teacher over the packed rows, shard by shard.

The one idea: shards are independent ranges of rows, so ranks of torchrun take every W-th one, a killed run
redoes only its unfinished shard, and rank 0 writes the manifest when all are there.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck import ranks
from limbeck.config import Recipe
from limbeck.config.teacher import CacheConfig
from limbeck.console import progress, say
from limbeck.data.dataset import PackedDataset
from limbeck.data.tokenizer import recipe_tokenizer
from limbeck.errors import LimbeckError
from limbeck.folders import StageFolder
from limbeck.manifests import CacheManifest, CacheShard, CacheSplit, PackedManifest
from limbeck.targets.codec import CODEC_VERSION, CodecSpec
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.spec import TargetSpec
from limbeck.targets.store import ShardJournal, codec_record, write_shard
from limbeck.teachers.base import Teacher, targets_in_turn
from limbeck.teachers.sources import producing_source, target_spec


@dataclass(frozen=True)
class _Shard:
    """One shard to make: rows `start` to `stop` of a split."""

    file: str
    split: str
    start: int
    stop: int


def cache_inputs(recipe: Recipe) -> dict[str, Any]:
    """Everything the cached targets depend on, known without loading the teacher."""
    section = recipe.teacher.cache
    return {
        **producing_source(recipe).inputs(recipe_tokenizer(recipe)),
        "packed": PackedManifest.read(recipe.packed_dir).fingerprint,
        "train_rows": recipe.dataset.train_rows,
        "splits": sorted(section.splits),
        "rows_per_shard": section.rows_per_shard,
        "compression": section.compression,
        "codec_version": CODEC_VERSION,
    }


def build_cache(recipe: Recipe, folder: Path | StageFolder, *, force: bool = False) -> CacheManifest | None:
    """Make (or continue, or find done) the recipe's cache; returns its manifest, on rank 0.

    Args:
        recipe: the teacher and the rows.
        folder: where the targets go; as a `StageFolder` with its inputs where the caller knows them.
        force: start over.

    Raises:
        LimbeckError: the packed data is missing or another tokenizer's, the folder holds another cache, `force` is not
            given and it has no backup folder, K exceeds the vocabulary, or the codec's round trip costs too much.
    """
    tokenizer, section = recipe_tokenizer(recipe), recipe.teacher.cache
    data: dict[str, PackedDataset] = {
        split: PackedDataset(recipe.packed_dir, split, recipe.dataset.train_rows if split == "train" else None)
        for split in sorted(section.splits)
    }
    first = next(iter(data.values()))
    if not any(map(len, data.values())):
        raise LimbeckError(f"{recipe.packed_dir} has no rows in {', '.join(data)}. Choose other teacher.splits.")
    first.check(tokenizer, recipe.dataset.max_length)
    if isinstance(folder, Path):
        folder = StageFolder(folder, CacheManifest.command, cache_inputs(recipe))
    if folder.is_done() and not force:
        return CacheManifest.read(folder.path)
    with contextlib.closing(producing_source(recipe).open(tokenizer, first)) as teacher:
        spec = codec_spec(target_spec(recipe), teacher.vocab_size)
        return _fill(_Work(folder, section, teacher, spec, data), force)


@dataclass(frozen=True)
class _Work:
    """What is to be cached, and how."""

    stage: StageFolder
    section: CacheConfig
    teacher: Teacher
    spec: CodecSpec
    data: dict[str, PackedDataset]


def _fill(work: _Work, force: bool) -> CacheManifest | None:
    """This rank's shards, and on rank 0 the manifest once all ranks' are there."""
    rank, world, stage = ranks.rank(), ranks.world_size(), work.stage
    with stage.lock(".lock" if world == 1 else f".lock-{rank}"):
        stage.begin(clean=world == 1, replace=force)
        journal = ShardJournal(stage.path, rank)
        plan = list(_plan(work.data, work.section.rows_per_shard))
        mine = [shard for number, shard in enumerate(plan) if number % world == rank]
        _make_shards(work, mine, journal)
        if rank > 0:
            return None
        ranks.wait_until(
            lambda: all(shard.file in journal.finished() for shard in plan), "the other ranks' shards of the cache"
        )
        manifest = _cache_manifest(work, plan, journal.finished()).write(stage.path)
        journal.remove()
    return manifest


def _plan(data: dict[str, PackedDataset], rows_per_shard: int) -> Iterator[_Shard]:
    for split, rows in data.items():
        for number, start in enumerate(range(0, len(rows), rows_per_shard)):
            yield _Shard(f"{split}-{number:05d}.h5", split, start, min(start + rows_per_shard, len(rows)))


def _make_shards(work: _Work, shards: list[_Shard], journal: ShardJournal) -> None:
    done, folder = journal.finished(), work.stage.path
    if any(shard.file in done for shard in shards):
        say(f"continuing after {sum(shard.file in done for shard in shards)} finished shards in {folder}")
    started, positions = time.perf_counter(), 0
    with progress("caching teacher targets (rows)", sum(shard.stop - shard.start for shard in shards)) as bar:
        bar.advance(sum(shard.stop - shard.start for shard in shards if shard.file in done))
        missing = [shard for shard in shards if shard.file not in done]
        rows = (work.data[shard.split].rows(range(shard.start, shard.stop)) for shard in missing)
        for shard, (_, targets) in zip(missing, targets_in_turn(work.teacher, rows), strict=True):
            record, loss = write_shard(
                folder / shard.file,
                targets,
                work.spec,
                split=shard.split,
                first_row=shard.start,
                compression=work.section.compression,
                max_kl=work.section.max_kl,
            )
            journal.add({**record, "roundtrip_kl": loss.worst_kl, "teacher_mass": _mass(targets)})
            positions += targets.token_ids.shape[:2].numel()
            bar.advance(shard.stop - shard.start)
    seconds = time.perf_counter() - started
    if positions:
        say(f"cached {positions:,} positions in {seconds:.1f} s ({positions / seconds:,.0f} positions/s)")


def _mass(targets: SparseTargets) -> float:
    """Mean probability on the support, at temperature 1 or that of the draws."""
    log_p, _ = targets.at_temperature(targets.sampling_temperature or 1.0)
    return float(log_p.exp().sum(dim=-1).mean())


def codec_spec(spec: TargetSpec, vocab_size: int) -> CodecSpec:
    """The codec's parameters for targets of a vocabulary."""
    support, sampling = spec.support_of(vocab_size), spec.sampling
    if sampling is None:
        return CodecSpec(support, vocab_size, spec.temperatures)
    return CodecSpec(
        support,
        vocab_size,
        spec.temperatures,
        head=sampling.head,
        num_draws=sampling.draws,
        sampling_temperature=spec.sampling_temperature,
    )


def _cache_manifest(work: _Work, plan: list[_Shard], finished: dict[str, dict[str, Any]]) -> CacheManifest:
    data, stage = work.data, work.stage
    first = next(iter(data.values()))
    splits = {}
    for split in data:
        records = [CacheShard(**finished[shard.file]) for shard in plan if shard.split == split]
        rows = sum(record.rows for record in records)
        splits[split] = CacheSplit(rows=rows, packed=data[split].fingerprint, shards=records)
    positions = sum(split.rows for split in splits.values()) * first.max_length
    size = sum(record["bytes"] for record in finished.values())
    masses = [record["teacher_mass"] for record in finished.values()]
    return CacheManifest(
        fingerprint=stage.fingerprint,
        teacher=work.teacher.identity or {},
        tokenizer=first.manifest.tokenizer.hash,
        attention=work.teacher.attention or stage.inputs["attention"],
        max_length=first.max_length,
        codec=codec_record(work.spec),
        splits=splits,
        positions=positions,
        bytes_per_position=round(size / positions, 2),
        roundtrip_kl=max(record["roundtrip_kl"] for record in finished.values()),
        teacher_mass=sum(masses) / len(masses),
    )
