"""The annotator's rule on answers short enough to count by hand."""

import random

import pytest

from rlhf_helpers.course.gold import WARM, distinct2, gold_reward, names_subject, prefers_first, repeated_share, warm_words


def test_warm_words_are_counted_once_each():
    assert warm_words("A lovely, LOVELY, warm day") == 2


@pytest.mark.parametrize("count, reward", [(0, 0.0), (1, 1.0), (3, 3.0), (4, 2.0), (7, -1.0)])
def test_three_warm_words_are_best_and_gushing_takes_points_back(count, reward):
    assert gold_reward("Write about zebras.", " ".join(sorted(WARM)[:count])) == reward


def test_half_a_point_for_the_subject_singular_or_plural():
    assert names_subject("Describe cats.", "A cat sleeps.") and names_subject("Tell me about a cat.", "Two cats.")
    assert not names_subject("Describe cats.", "A dog sleeps.")
    assert gold_reward("Describe cats.", "A cat sleeps.") - gold_reward("Describe cats.", "A dog sleeps.") == 0.5


def test_the_words_of_asking_are_no_subject():
    assert not names_subject("Write two short sentences about bread.", "Two short sentences.")


def test_repetition_costs_four_times_its_share():
    assert repeated_share("a b a b a") == 0.5  # ab ba ab ba: two of four occurred before
    assert gold_reward("Describe cats.", "a b a b a") == -2.0


@pytest.mark.parametrize("text", ["", "word", "!?"])
def test_texts_without_word_pairs_repeat_nothing(text):
    assert repeated_share(text) == 0.0


def test_the_annotator_s_noise_follows_bradley_and_terry():
    warm, plain = "lovely", "nothing"  # one point apart: sigmoid(2) = 0.881
    rng = random.Random(0)
    share = sum(prefers_first("Describe cats.", warm, plain, rng) for _ in range(4000)) / 4000
    assert share == pytest.approx(0.8808, abs=0.02)  # four standard errors
    other = sum(prefers_first("Describe cats.", plain, warm, rng) for _ in range(4000)) / 4000
    assert other == pytest.approx(0.1192, abs=0.02)


def test_distinct2_averages_over_texts():
    assert distinct2(["a b c", "a b a b a"]) == pytest.approx((1 + 0.5) / 2)
