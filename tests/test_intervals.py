"""Bootstrap intervals: exact on small cases, and right about as often as they say."""

import tracemalloc

import numpy as np
import pytest

from rlhf_helpers.intervals import mean_interval, share_interval, two_level_interval


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


def test_with_both_levels_drawn_an_interval_is_as_wide_as_the_wider_of_them():
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(10, 1)) + np.zeros((10, 100))  # all the chance is in the seeds
    prompts = np.zeros((10, 1)) + rng.normal(size=(1, 100))
    width = lambda values: np.subtract(*two_level_interval(values)[1][::-1])
    assert width(seeds) == pytest.approx(2 * 1.96 * seeds[:, 0].std() / 10**0.5, rel=0.15)
    assert width(prompts) == pytest.approx(2 * 1.96 * prompts[0].std() / 100**0.5, rel=0.15)


def test_the_two_level_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(100):
        values = 1.0 + rng.normal(size=(10, 1)) * 0.3 + rng.normal(size=(1, 60)) + rng.normal(size=(10, 60))
        low, high = two_level_interval(values, draws=400)[1]
        covered += low <= 1.0 <= high
    assert 85 <= covered <= 100


def test_of_few_seeds_the_interval_is_as_wide_as_student_s_t():
    """Three seeds that differ, over prompts that do not: the mean, give or take 4.30 standard errors (to a bootstrap's shape)."""
    values = np.array([0.0, 1.0, 2.0])[:, None] + np.zeros((3, 50))
    mean, (low, high) = two_level_interval(values)
    error = values[:, 0].std(ddof=1) / 3**0.5
    assert mean == 1.0 and high - 1 > 3.3 * error and 1 - low > 3.3 * error
