"""Asking ahead: bounded, in order, cancelled at the end, and without any effect on what is learnt."""

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from conftest import tiny_model
from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher
from limbeck.teachers.base import Teacher
from limbeck.training.prefetch import PENDING, TargetsAhead


class Elsewhere(Teacher):
    """A local teacher in a thread, as a remote one looks to the trainer."""

    in_workers = False

    def __init__(self, local, ahead):
        self.local, self.ahead = local, ahead
        self.temperatures, self.vocab_size, self.attention = local.temperatures, local.vocab_size, local.attention
        self.pool, self.asked = ThreadPoolExecutor(1), []

    def targets(self, rows):
        return self.local.targets(rows)

    def template(self):
        return self.local.template()

    def submit(self, rows):
        self.asked.append(rows.row_ids.tolist())
        return self.pool.submit(self.local.targets, rows)

    def close(self):
        self.pool.shutdown(cancel_futures=True)


class Counting:
    """Futures that nobody answers."""

    def __init__(self, ahead):
        self.ahead, self.futures = ahead, []

    def submit(self, rows):
        self.futures.append(Future())
        return self.futures[-1]


def batches(count):
    for number in range(count):
        yield {"row_ids": torch.tensor([number]), "input_ids": torch.zeros(1, 2), "doc_ids": torch.zeros(1, 2)}


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_batches_come_in_order_and_no_more_than_asked_for_are_on_their_way(ahead):
    teacher = Counting(ahead)
    taken = []
    for number, batch in enumerate(TargetsAhead(batches(10), teacher)):
        taken.append(int(batch["row_ids"]))
        assert batch[PENDING] is teacher.futures[number]
        assert len(teacher.futures) == min(10, number + max(1, ahead))
    assert taken == list(range(10))


def test_what_nobody_will_use_is_cancelled():
    teacher = Counting(4)
    ahead = TargetsAhead(batches(10), teacher)
    first = next(ahead)
    ahead.close()
    assert not first[PENDING].cancelled()
    assert all(future.cancelled() for future in teacher.futures[1:])


def train(teacher, packed, folder, workers=0):
    student = tiny_model(seed=1)
    args = DistillationArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        learning_rate=1e-3, report_to="none", use_cpu=True, save_strategy="no", dataloader_num_workers=workers,
    )  # fmt: skip
    DistillationTrainer(model=student, args=args, teacher=teacher, train_dataset=packed).train()
    return torch.cat([p.detach().flatten() for p in student.parameters()])


@pytest.mark.parametrize("workers", [0, 2])
def test_asking_ahead_changes_nothing_that_is_learnt(packed, tmp_path, workers):
    local = LocalTeacher(tiny_model(seed=3), top_k=8)
    expected = train(local, packed, tmp_path / "local")
    for ahead in (0, 1, 7):
        teacher = Elsewhere(local, ahead)
        assert torch.equal(train(teacher, packed, tmp_path / f"ahead{ahead}", workers), expected)
        assert len(teacher.asked) >= 15 if ahead else not teacher.asked
        teacher.close()
