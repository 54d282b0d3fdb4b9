"""Held-out evaluation: same prompts, same random numbers, nothing learnt."""

import json

import numpy as np
import pytest
import torch

from rlhf_helpers.data import read_jsonl, save_jsonl
from rlhf_helpers.evaluation import evaluate, paired_gain
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


def test_the_same_seed_gives_the_same_samples_in_batches_of_any_size():
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


def test_the_interval_covers_the_true_gain_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        low, high = paired_gain(range(40), np.zeros(40), rng.normal(1.0, 1.0, 40), draws=400)[1]
        covered += low <= 1.0 <= high
    assert 87 <= covered <= 99
