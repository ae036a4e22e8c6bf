"""What every benchmark shares: arguments, interleaved repeats, paired ratios with their spread, peak memory, JSON.

Cases take turns, so that a busy machine hits all alike, and a ratio is formed within each round: repeat i of one case
over repeat i of the other. Told of it are the median and the quartiles, of wall time and of CPU time. The distance
between the quartiles (of the ratios' logarithms) is the spread, |log median| the effect; where the effect does not
exceed the spread, or there are fewer than three rounds, the verdict is "too noisy to judge". Of two equal cases that
lets a side be named in one comparison of six at five rounds and in one of twenty-five at nine (normal noise,
simulated; half the distance would let it in two of five). A benchmark ends with exit status 3 when that is the verdict
on a headline ratio; what it measured is printed all the same.

`--quick` keeps torch to one thread: where other work holds a core, the second thread of a pair is waited for, and the
waiting is most of the swing, in CPU time too.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

NOISY, NOISY_STATUS = "too noisy to judge", 3


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the flags every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="smaller, under a minute on 2 cores")
    return parser


# -- time ---------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Seconds on the wall and of CPU: all threads of this process, and its children that have ended."""

    wall: float
    cpu: float

    def __truediv__(self, count: float) -> "Span":
        return Span(self.wall / count, self.cpu / count)


def now() -> Span:
    """The two clocks; only differences mean something."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Span(time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime)


def since(start: Span) -> Span:
    """What has passed since `start = now()`."""
    end = now()
    return Span(end.wall - start.wall, end.cpu - start.cpu)


@dataclass
class Repeats:
    """One case's repeats, in the order of the rounds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median seconds on the wall."""
        return statistics.median(self.wall)


def interleaved(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, Repeats]:
    """The repeats of each case, the cases taking turns; each round starts with another case.

    A case that returns a `Span` has timed itself, which leaves its preparation out; any other is timed whole.
    """
    found = {name: Repeats() for name in cases}
    names = list(cases)
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = now()
            result = cases[name]()
            span = result if isinstance(result, Span) else since(start)
            found[name].wall.append(span.wall)
            found[name].cpu.append(span.cpu)
    return found


def medians(found: dict[str, Repeats]) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of each case, as they stand in the JSON."""
    return {
        "seconds": {name: case.seconds for name, case in found.items()},
        "cpu_seconds": {name: statistics.median(case.cpu) for name, case in found.items()},
    }


# -- ratios -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Paired ratios of two cases: median and quartiles, of wall and CPU time; the verdict is on wall time.

    Attributes:
        median, low, high: of wall time; low and high are the quartiles.
        cpu_median, cpu_low, cpu_high: of CPU time; None where a case took none that the clock could see.
        verdict: below 1, above 1, or too noisy to judge.
    """

    median: float
    low: float
    high: float
    cpu_median: float | None
    cpu_low: float | None
    cpu_high: float | None
    verdict: str

    def __str__(self) -> str:
        cpu = "" if self.cpu_median is None else f"; CPU {self.cpu_median:.3g} ({self.cpu_low:.3g}-{self.cpu_high:.3g})"
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g}){cpu}: {self.verdict}"


def ratio(a: Repeats, b: Repeats, scale: float = 1.0) -> Comparison:
    """`a` over `b` times `scale`, repeat by repeat."""
    wall = [math.log(scale * x / y) for x, y in zip(a.wall, b.wall, strict=True)]
    cpu = None
    if min(*a.cpu, *b.cpu) > 0.0:
        cpu = [math.log(scale * x / y) for x, y in zip(a.cpu, b.cpu, strict=True)]
    low, median, high = _quartiles(wall)
    cpu_low, cpu_median, cpu_high = (math.exp(v) for v in _quartiles(cpu)) if cpu else (None, None, None)
    verdict = "below 1" if median < 0.0 else "above 1"
    if len(wall) < 3 or high - low >= abs(median):
        verdict = NOISY
    return Comparison(math.exp(median), math.exp(low), math.exp(high), cpu_median, cpu_low, cpu_high, verdict)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


# -- memory -------------------------------------------------------------------------------------------------------


def peak_memory(case: Callable[[], object]) -> int:
    """Bytes of resident memory that `case` needs beyond what the process holds before it (Linux, CPU)."""
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident_bytes()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        case()
    finally:
        done.set()
        watcher.join()
    return peak - before


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# -- result -------------------------------------------------------------------------------------------------------


def report(
    result: dict[str, Any],
    as_json: bool,
    comparisons: dict[str, Comparison] | None = None,
    headline: Iterable[str] = (),
) -> int:
    """Print the result, one JSON document or aligned lines; returns the exit status.

    Each comparison's median stands at the top level under its name, its spread and verdict under `comparisons`.
    """
    comparisons = comparisons or {}
    noisy = [name for name in headline if comparisons[name].verdict == NOISY]
    if as_json:
        numbers = {name: found.median for name, found in comparisons.items()}
        detail = {name: asdict(found) for name, found in comparisons.items()}
        print(json.dumps({**result, **numbers, "comparisons": detail, "too_noisy_to_judge": noisy}, indent=2))
    else:
        for key, value in {**result, **comparisons}.items():
            print(f"{key:<36} {_readable(value)}")
    if noisy:
        print(f"{NOISY}: {', '.join(noisy)}", file=sys.stderr)
    return NOISY_STATUS if noisy else 0


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
