"""Intervals: exact on small cases, and right about as often as they say."""

import tracemalloc

import numpy as np
import pytest

from rlhf_helpers.intervals import mean_interval, share_interval, student, two_level_interval


def test_a_mean_over_two_values_can_be_either():
    assert mean_interval([2.0, 5.0]) == (3.5, (2.0, 5.0))


def test_values_that_agree_have_no_spread():
    assert mean_interval([0.5] * 7) == (0.5, (0.5, 0.5))
    assert two_level_interval(np.full((3, 4), 0.5)) == (0.5, pytest.approx((0.5, 0.5)))


def test_many_values_are_drawn_as_few_are_and_take_little_memory(monkeypatch):
    values = np.random.default_rng(1).normal(size=500)
    at_once = mean_interval(values)
    monkeypatch.setattr("rlhf_helpers.intervals.KEPT", 499)
    assert mean_interval(values) == at_once
    tracemalloc.start()
    mean_interval(np.tile(values, 20), draws=1_000)  # at once: 160 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_a_share_of_all_or_none_has_an_interval_too():
    """Wilson's, by its definition: the shares that lie 1.96 of their own deviations from what was seen."""
    for hits in ([True] * 21, [False] * 8, [False] * 5, [True] * 3 + [False] * 9):
        share, ends = share_interval(hits)
        at_the_ends = [abs(share - end) / (end * (1 - end) / len(hits)) ** 0.5 for end in ends if 1e-9 < end < 1 - 1e-9]
        assert share == np.mean(hits) and 0 <= ends[0] <= share <= ends[1] + 1e-12 and ends[1] <= 1
        assert len(at_the_ends) >= 1 and at_the_ends == pytest.approx([1.96] * len(at_the_ends))


def test_it_covers_the_true_mean_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        low, high = mean_interval(rng.normal(1.0, 1.0, 40), draws=400)[1]
        covered += low <= 1.0 <= high
    assert 87 <= covered <= 99


def test_student_s_quantiles_are_those_of_the_tables():
    found = [round(student(freedom), 3) for freedom in (1, 2, 3, 4, 9, 30, 120, 1e6)]
    assert found == [12.706, 4.303, 3.182, 2.776, 2.262, 2.042, 1.980, 1.960]


def half(values, control=None):
    mean, (low, high) = two_level_interval(values, control)
    assert high - mean == pytest.approx(mean - low)
    return high - mean


def test_of_seeds_or_of_prompts_alone_it_is_student_s_interval():
    """All the chance in one level: the mean, give or take t of that level's degrees of freedom times its standard error."""
    seeds, prompts = np.array([0.0, 1.0, 2.0]), np.random.default_rng(0).normal(size=100)
    assert half(seeds[:, None] + np.zeros((3, 50))) == pytest.approx(4.3027 * 1.0 / 3**0.5, rel=1e-4)
    assert half(seeds[:, None]) == pytest.approx(4.3027 * 1.0 / 3**0.5, rel=1e-4)  # one number a seed
    of_prompts = 1.9842 * prompts.std(ddof=1) / 100**0.5
    assert half(prompts + np.zeros((4, 1))) == half(prompts[None]) == pytest.approx(of_prompts, rel=1e-4)


def test_of_two_groups_of_seeds_it_is_welch_s():
    """By the formulas of Welch 1947: the variances of the two means add up, with Satterthwaite's degrees of freedom."""
    first, second = np.array([1.0, 2, 4])[:, None], np.array([0.0, 1, 1, 2, 0])[:, None]
    parts = [group.var(ddof=1) / len(group) for group in (first, second)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 4)
    assert half(first, second) == pytest.approx(student(freedom) * sum(parts) ** 0.5)
    assert two_level_interval(first, second)[0] == pytest.approx(7 / 3 - 0.8)


def test_what_two_groups_have_in_common_on_a_prompt_is_no_part_of_their_difference():
    rng = np.random.default_rng(0)
    hard, first, second = 10 * rng.normal(size=80), rng.normal(size=(3, 80)), rng.normal(size=(5, 80))
    assert half(first + hard, second + hard) == pytest.approx(half(first, second))


@pytest.mark.parametrize("seeds, control", [(3, None), (10, None), (3, 10), (3, 3)])
@pytest.mark.parametrize("between_seeds", [0.0, 0.1, 0.4])
def test_it_covers_the_truth_about_as_often_as_it_says_whatever_the_chance_is_made_of(seeds, control, between_seeds):
    rng, covered = np.random.default_rng(1), 0
    drawn = lambda n: rng.normal(size=(n, 1)) * between_seeds + rng.normal(size=(1, 60)) * 0.3 + rng.normal(size=(n, 60))
    for _ in range(500):
        common = 0.5 * rng.normal(size=60) * (control is not None)  # some prompts are harder, for both groups alike
        low, high = two_level_interval(drawn(seeds) + common, control and drawn(control) + common)[1]
        covered += low <= 0.0 <= high
    assert 455 <= covered <= 498  # of 500; 475 are meant
