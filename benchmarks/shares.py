"""Where a training step's time goes: the teacher's targets, the student's matrix products, and the rest by operator.

Profiled steps (torch.profiler, this thread) leave out of the account only what lies outside a step. Products and
attention are their operators' own time; what lies between operators is Python's. The profiler's own cost is in it, so
shares of many small operators come out somewhat high.
"""

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Trainer

PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "matmul", "linear")}
ATTENTION = "aten::_scaled_dot_product"
STEP, TEACHER, TARGETS, PHASES = "a step", "teacher", "targets", ("data", "forward", "backward", "optimizer")
BETWEEN = "between operators (Python)"
SHOWN = 8


def step_shares(trainer: Trainer, steps: int) -> dict:
    """Shares of the steps' whole time; `rest_by_operator` names each operator with its part of the step."""
    teacher = trainer.teacher
    targets = teacher.targets

    def marked(rows):
        with record_function(TEACHER):
            return targets(rows)

    teacher.targets = marked
    try:
        _step(trainer)  # warm
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(steps):
                with record_function(STEP):
                    _step(trainer)
    finally:
        del teacher.targets
    return _shares(recorded.events())


def _step(trainer: Trainer) -> None:
    model = trainer.model.train()
    with record_function("data"):
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with record_function("forward"):
        loss = trainer.compute_loss(model, inputs)
    with record_function("backward"):
        loss.backward()
    with record_function("optimizer"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        model.zero_grad()


def _shares(events) -> dict:
    whole = sum(event.cpu_time_total for event in events if event.name == STEP)
    sums: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    for event in events:
        above = _ranges(event)
        if STEP not in above:
            continue
        seconds = event.self_cpu_time_total
        phases[next((name for name in above if name in PHASES), "between")] += seconds
        product = event.name in PRODUCTS or event.name.startswith(ATTENTION)
        if TEACHER in above:
            sums[TARGETS] += seconds
            sums["products of targets"] += seconds * product
        elif product:
            sums["products"] += seconds
        else:
            phase = next((name for name in above if name in PHASES), "")
            known = event.name.startswith("aten::")
            operators[f"{phase} {event.name.removeprefix('aten::')}" if known else f"{phase} {BETWEEN}".strip()] += (
                seconds
            )
    named = dict(operators.most_common(SHOWN))
    named["other operators"] = sum(operators.values()) - sum(named.values())
    return {
        "teacher_targets": sums[TARGETS] / whole,
        "of_which_matrix_products": sums["products of targets"] / whole,
        "matrix_products": sums["products"] / whole,
        "rest": sum(operators.values()) / whole,
        "rest_by_operator": {name: seconds / whole for name, seconds in named.items()},
        "by_phase": {name: seconds / whole for name, seconds in phases.most_common()},
    }


def _ranges(event) -> list[str]:
    """Names from the event up to the outermost range around it."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names
