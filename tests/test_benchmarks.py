"""What the benchmarks share: rounds, paired ratios, verdicts, the JSON and its exit status."""

import json

import pytest

from common import NOISY, NOISY_STATUS, Repeats, Span, interleaved, ratio, report


def test_every_round_has_every_case_and_starts_with_another():
    order: list[str] = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert all(len(case.wall) == len(case.cpu) == 4 for case in found.values())


def test_a_case_may_time_itself():
    found = interleaved({"own": lambda: Span(2.0, 3.0) / 2}, 2)
    assert found["own"] == Repeats([1.0, 1.0], [1.5, 1.5])


def test_ratios_are_formed_within_rounds():
    """A machine that is now slow and now fast changes both sides of a round, not their ratio."""
    theirs = Repeats([1.0, 7.0, 2.0, 30.0, 4.0], [1.0] * 5)
    ours = Repeats([0.5 * x for x in theirs.wall], [0.8, 0.9, 1.0, 1.1, 1.2])
    found = ratio(ours, theirs)
    assert (found.low, found.median, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (found.cpu_low, found.cpu_median, found.cpu_high) == pytest.approx((0.9, 1.0, 1.1))
    assert found.verdict == "below 1"
    assert ratio(theirs, ours, scale=3.0).median == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("wall", "verdict"),
    [
        ([1.5, 1.6, 1.7, 1.6, 1.5], "above 1"),
        ([0.6, 1.2, 1.9, 0.9, 1.5], NOISY),
        ([1.5, 1.5], NOISY),  # two rounds show no spread
        ([1.0] * 5, NOISY),  # equal: no side
    ],
)
def test_verdict(wall, verdict):
    ones = Repeats([1.0] * len(wall), [0.0] * len(wall))
    found = ratio(Repeats(wall, ones.cpu), ones)
    assert found.verdict == verdict
    assert found.cpu_median is None


def test_report_ends_with_the_status_of_its_headline(capsys):
    ones, noise = Repeats([1.0] * 5, [1.0] * 5), Repeats([0.6, 1.2, 1.9, 0.9, 1.5], [1.0] * 5)
    comparisons = {"sure": ratio(Repeats([2.0] * 5, [2.0] * 5), ones), "noise": ratio(noise, ones)}
    assert report({"shape": 1}, True, comparisons, headline=["sure"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sure"] == 2.0
    assert printed["comparisons"]["noise"]["verdict"] == NOISY
    assert report({}, True, comparisons, headline=["sure", "noise"]) == NOISY_STATUS
    output = capsys.readouterr()
    assert json.loads(output.out)["too_noisy_to_judge"] == ["noise"]
    assert "noise" in output.err
