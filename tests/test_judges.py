"""Reward models by what they say of the untrained model's answers."""

from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_helpers.course import experiments, judges, runs, variants

GOLD = np.array([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 4.0, 0.0]])  # two prompts, four answers each


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    before = SimpleNamespace(gold=GOLD.ravel(), by_prompt=lambda values: np.asarray(values).reshape(2, 4))
    monkeypatch.setattr(judges, "base", lambda split: before)


def test_the_best_of_n_is_the_reward_model_s_choice_and_has_the_annotator_s_gold():
    likes_gold, likes_the_first = GOLD, np.tile([4.0, 3.0, 2.0, 1.0], (2, 1))
    assert judges.gold_of_best(likes_gold, 4).tolist() == [3.0, 4.0]
    assert judges.gold_of_best(likes_the_first, 4).tolist() == [0.0, 1.0]
    both = judges.gold_of_best(np.stack([likes_gold, likes_the_first]), 1)
    assert both.shape == (2, 2) and np.allclose(both, [[1.5, 1.5], [1.5, 1.5]])  # of one answer there is no choice


def test_an_error_is_what_a_line_in_gold_leaves_of_a_score():
    noise = np.array([1.0, -1.0, 0.5, 2.0, 0.0, -2.0, 1.0, 0.3])
    scores = np.stack([3 + 2 * GOLD.ravel(), GOLD.ravel() + noise, 5 * GOLD.ravel() + noise]).reshape(3, 2, 4)
    found = judges.errors(scores)
    assert np.allclose(found[0], 0) and np.allclose(found[1], found[2])
    assert np.allclose(found @ GOLD.ravel(), 0) and np.allclose(found.sum(1), 0)
    between, with_gold = judges.correlations(scores[1:])
    assert np.allclose(between, [1.0]) and len(with_gold) == 2 and with_gold[1] > with_gold[0]


def test_a_pair_with_equal_scores_is_ranked_wrong():
    assert judges.accuracy(SimpleNamespace(after=dict(chosen=[1.0, 2.0, 0.0], rejected=[0.0, 2.0, 1.0]))) == pytest.approx(
        1 / 3
    )


def test_several_as_one_are_their_mean_or_what_the_strictest_says():
    scores = np.array([[[1.0, 4.0]], [[3.0, 0.0]]])
    assert judges.HOW["mean"](scores).tolist() == [[2.0, 2.0]] and judges.HOW["min"](scores).tolist() == [[1.0, 0.0]]


def test_a_member_s_pairs_are_drawn_anew_with_replacement(monkeypatch):
    drawn = {}
    monkeypatch.setattr(variants, "kept", lambda name, pairs, seed: drawn.setdefault(name, pairs))
    one, two = variants.reward_named("resampled", 1), variants.reward_named("resampled", 2)
    keys = lambda pairs: [tuple(pair.values()) for pair in pairs]
    assert len(one) == len(two) == 856 and keys(one) != keys(two)
    assert 0.6 < len(set(keys(one))) / 856 < 0.66  # 1 - 1/e of them, the others twice or more


def test_every_reward_model_that_is_listed_has_a_name_that_is_known(tmp_path, monkeypatch):
    listed = experiments.SCORED["reward_models"]
    asked = []
    monkeypatch.setattr(variants, "kept", lambda name, pairs, seed, **options: asked.append((name, len(pairs))))
    for run in listed:
        if run.reward != "model":
            variants.reward_named(run.reward, run.seed)
    assert len(asked) == len(set(asked)) == len(listed) - 1 == 17
    assert {n for _, n in asked} == {75, 150, 300, 600, 856}
    monkeypatch.setenv("RLHF_HOME", str(tmp_path))
    assert experiments.missing("reward_models") == listed


def test_the_logs_of_reward_models_score_every_answer_and_every_pair():
    logs = runs.logs_of("reward_models")
    assert {(log.head["condition"], log.head["seed"]) for log in logs} >= {("course", 0), *(("resampled", n) for n in range(5))}
    for log in logs:
        assert len(log.after["rewards"]) == 120 * 16 and len(log.after["chosen"]) == len(log.after["rejected"]) >= 190
        assert np.isfinite(log.after["rewards"]).all() and np.std(log.after["rewards"]) > 0.1
