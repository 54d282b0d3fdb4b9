"""Held-out evaluation: same prompts, same random numbers, nothing learnt."""

import contextlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_helpers.data import read_jsonl, save_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.evaluation import Evaluation, best_of, chosen_of, evaluate, paired_gain, report, summarize
from tests import tiny
from tests.tiny import same, state, with_lora

PROMPTS = ["t10 t11", "t12 t13 t14", "t15"]


def length(prompts, responses):
    return [float(len(response.split())) for response in responses]


def test_every_prompt_is_sampled_as_often_as_asked_and_scored():
    result = evaluate(tiny.trainer(), PROMPTS, length, samples=2)
    assert result.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert result.rewards.tolist() == length(None, result.responses)
    assert len(result.gold) == len(result.kl) == len(result.responses) == 6


def test_the_same_seed_gives_the_same_samples():
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.3))
    first, again = evaluate(trainer, PROMPTS, length), evaluate(trainer, PROMPTS, length)
    assert first.responses == again.responses and (first.kl == again.kl).all()
    assert evaluate(trainer, PROMPTS, length, seed=5).responses != first.responses


def test_evaluation_changes_nothing_in_the_trainer():
    trainer = tiny.trainer()
    trainer.step(*tiny.batch())
    before, numbers, rollout = state(trainer), trainer.generator.get_state(), trainer.rollout
    evaluate(trainer, PROMPTS, length)
    assert same(state(trainer), before) and torch.equal(trainer.generator.get_state(), numbers)
    assert trainer.rollout is rollout and len(trainer.history) == 1


def test_kl_is_0_for_the_untrained_policy_and_summed_over_the_response():
    assert (evaluate(tiny.trainer(), PROMPTS, length).kl == 0).all()
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.3))
    result = evaluate(trainer, PROMPTS, length, samples=1, batch_size=3)
    queries = trainer.encode(PROMPTS)[1]
    responses = trainer.generate(queries, generator=torch.Generator().manual_seed(1234))
    rollout = trainer.inspect(queries, responses)
    assert result.kl.tolist() == pytest.approx((rollout.logprobs - rollout.ref_logprobs).sum(1).tolist(), abs=1e-5)


def test_records_survive_a_jsonl_file(tmp_path):
    records = evaluate(tiny.trainer(), PROMPTS, length).records()
    assert records[0].keys() == {"prompt", "response", "reward", "gold", "kl"}
    save_jsonl(tmp_path / "samples.jsonl", records)
    assert read_jsonl(tmp_path / "samples.jsonl") == json.loads(json.dumps(records)) == records


def test_the_gain_is_the_mean_over_prompts_of_the_paired_differences():
    gain, (low, high) = paired_gain(["a", "a", "b"], [0.0, 0.0, 0.0], [1.0, 3.0, 5.0])
    assert gain == 3.5  # prompt a gained 2, prompt b 5
    assert (low, high) == (2.0, 5.0)  # a resample of two prompts can be all a or all b


def test_a_gain_that_all_prompts_share_has_no_spread():
    before = np.arange(6.0)
    assert paired_gain(list("aabbcc"), before, before + 0.5) == (0.5, (0.5, 0.5))


# ---------------------------------------------------------------- what a run came to


def test_an_evaluation_survives_being_saved():
    first = evaluate(tiny.trainer(with_lora(tiny.llama(), b_scale=0.3)), PROMPTS, length)
    again = Evaluation.of_records(json.loads(json.dumps(first.records())))
    assert (again.prompts, again.responses) == (first.prompts, first.responses)
    assert all((getattr(again, name) == getattr(first, name)).all() for name in ("rewards", "gold", "kl"))


def damaged(change):
    rows = [dict(prompt=f"p{i // 2}", response="a", reward=1.0, gold=0.5, kl=0.0) for i in range(4)]
    change(rows)
    return rows


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda rows: rows.pop(), "1 to 2 samples a prompt; expected as many of each"),
        (lambda rows: rows[1].update(reward=10**400), "sample 2: reward is 1000*.*; expected a finite number"),
        (lambda rows: rows[1].update(gold=float("nan")), "sample 2: gold is nan; expected a finite number"),
        (lambda rows: rows[1].update(kl=True), "sample 2: kl is True; expected a finite number"),
        (lambda rows: rows[3].update(response="\ud800"), "sample 4: response is .*; expected text"),
    ],
)
def test_saved_samples_that_were_changed_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        Evaluation.of_records(damaged(change))


def test_a_process_without_prompts_takes_part(monkeypatch):
    trainer = tiny.trainer()
    nothing = contextlib.nullcontext([])
    monkeypatch.setattr(type(trainer.accelerator), "split_between_processes", lambda self, prompts: nothing)
    rows = [("t5", 1.0, 0.5, 0.25)] * 2  # from another process
    monkeypatch.setattr("rlhf_helpers.evaluation.gather_object", lambda mine: [*mine, *rows])
    result = evaluate(trainer, PROMPTS[:1], length, samples=2)
    assert result.responses == ["t5", "t5"] and result.rewards.tolist() == [1.0, 1.0]


def samples(rewards, kl=0.0, texts=None, each=1):
    n = len(rewards)
    prompts = [f"p{i // each}" for i in range(n)]
    return Evaluation(prompts, texts or ["a b"] * n, np.asarray(rewards), np.asarray(rewards) / 2, np.full(n, kl))


def test_samples_of_the_reference_are_those_of_the_untrained_policy_and_have_no_kl():
    trained = tiny.trainer(with_lora(tiny.llama(), b_scale=0.3))
    before = evaluate(trained, PROMPTS, length, reference=True)
    assert (before.kl == 0).all() and before.responses == evaluate(tiny.trainer(), PROMPTS, length).responses
    assert before.responses != evaluate(trained, PROMPTS, length).responses


def test_best_of_n_takes_the_answer_with_the_highest_reward_of_each_prompt():
    one = samples([0.0, 3.0, 1.0, 2.0, 5.0, 4.0, 9.0, 0.0], each=4)
    assert best_of(one, 4) == (6.0, 3.0) and best_of(one, 1) == (3.0, 1.5)


def test_best_of_n_is_the_mean_over_all_choices_of_n_from_the_samples():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for count in (1, 2, 3, 5, 6):
        choices = [list(rows) for rows in itertools.combinations(range(6), count)]
        by_hand = [np.mean([v[rows][r[rows].argmax()] for rows in choices]) for r, v in zip(rewards, values)]
        assert chosen_of(rewards, values, count).tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize(
    "count, words", [(0, "expected a whole number from 1"), (3, "expected at most 2, the answers to each")]
)
def test_best_of_more_answers_than_there_are_is_refused(count, words):
    with pytest.raises(InputError, match=f"^best_of: count is {count}; {words}"):
        best_of(evaluate(tiny.trainer(), PROMPTS, length, samples=2), count)


def test_a_prompt_that_comes_twice_is_named_by_its_row():
    with pytest.raises(InputError, match=r"^evaluate: prompts\[3\] is 't10 t11' again; expected different ones"):
        evaluate(tiny.trainer(), ["t9 " * 5000, *PROMPTS[:2], "t10 t11"], length)  # the first is too long, and counts


def test_a_gain_needs_as_many_numbers_as_prompts():
    with pytest.raises(InputError, match="^paired_gain: 2 prompts, 3 numbers before and 3 after; expected as many of each"):
        paired_gain(["a", "b"], [0, 0, 0], [1, 1, 5])


def test_the_first_samples_of_each_prompt_are_kept_in_order():
    assert samples([0.0, 1.0, 2.0, 3.0], each=2).first(1).rewards.tolist() == [0.0, 2.0]


def test_gains_compare_the_means_of_a_prompt_whatever_the_number_of_its_samples():
    before, after = samples([0.0, 1.0, 2.0, 3.0] * 2, each=4), samples([2.0, 3.0, 4.0, 5.0], each=2)
    summary = summarize(before, after, [], 60.0)
    assert summary["heldout_reward_gain"] == 2.0 and summary["heldout_reward_gain_ci95"] == [1.0, 3.0]
    assert summary["heldout_gold_gain"] == 1.0 and summary["heldout_gold_gain_ci95"] == [0.5, 1.5]
    assert (summary["best_of"], summary["best_of_reward"], summary["best_of_gold"]) == (4, 3.0, 1.5)


def test_a_summary_says_how_many_answers_are_whole():
    before, after = samples([0.0, 1.0], texts=["It rains", "It rains."]), samples([0.0, 1.0], texts=["It rains."] * 2)
    summary = summarize(before, after, [], 60.0)
    assert (summary["whole_before"], summary["whole_after"]) == (0.5, 1.0)


def test_a_summary_says_how_far_sampler_and_trainer_were_apart():
    names = ("objective/sampler_kl", "objective/sampler_max_diff")
    history = [dict(zip(names, row)) for row in ((0.0, 0.0), (2e-7, 3e-6), (math.nan, 1e-6))] + [{}]
    summary = summarize(samples([0.0, 1.0]), samples([1.0, 2.0]), history, seconds=60.0)
    assert summary["sampler_kl"] == 1e-7 and summary["sampler_max_diff"] == 3e-6


def test_numbers_that_are_none_are_null_in_the_summary_and_a_question_mark_on_the_screen(capsys):
    summary = summarize(samples([math.nan]), samples([1.0], kl=math.nan), [], seconds=60.0) | dict(steps=1)
    assert summary["base_reward_std"] is None and summary["mean_kl"] is None and summary["sampler_kl"] is None
    assert summary["heldout_reward_gain"] is None and summary["heldout_reward_gain_ci95"] == [None, None]
    json.dumps(summary, allow_nan=False)
    row = dict(prompt="p", before="a", response="b", reward_before=None, reward=1.0)
    report(summary, [row], Path("run"))
    out = capsys.readouterr().out
    assert "gain ? (? to ?)" in out and "before (?): a" in out
    assert "KL ? nats a response" in out and "sampler and trainer differ by ? nats (largest token ?)" in out


def test_the_last_screen_shows_gain_and_interval_in_one_unit_with_best_of_n_beside_them(capsys):
    before, after = samples([0.0, 1.0, 2.0, 3.0] * 2, each=4), samples([2.0, 3.0, 4.0, 5.0], each=2)
    report(summarize(before, after, [], 60.0) | dict(steps=1), [], Path("run"))
    out = capsys.readouterr().out
    assert "reward  +1.50 -> +3.50   gain +2.00 (+1.00 to +3.00)   (best of 4, untrained: 3.00)" in out
    assert "whole answers 0% -> 0%" in out


def test_the_screen_of_an_older_summary_has_question_marks(capsys):
    summary = summarize(samples([0.0, 1.0]), samples([1.0, 2.0]), [], 60.0) | dict(steps=1)
    report({name: value for name, value in summary.items() if "best" not in name and "whole" not in name}, [], Path("run"))
    assert "(best of ?, untrained: ?)" in capsys.readouterr().out


@pytest.mark.parametrize("value, line", [(0.0, "0 nats (largest token 0)"), (2.5e-7, "2.5e-07 nats (largest token 2.5e-07)")])
def test_the_last_screen_shows_the_sampler_s_exactness(value, line, capsys):
    history = [{"objective/sampler_kl": value, "objective/sampler_max_diff": value}]
    report(summarize(samples([0.0, 1.0]), samples([1.0, 2.0]), history, 60.0) | dict(steps=1), [], Path("run"))
    assert f"sampler and trainer differ by {line}" in capsys.readouterr().out
