"""Held-out evaluation: the same prompts and the same random numbers before and after training, and what changed."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object

from rlhf_helpers import progress
from rlhf_helpers.course.gold import distinct2, gold_reward
from rlhf_helpers.machine import peak_megabytes

COLUMNS = ("prompt", "response", "reward", "gold", "kl")
TIMES = ("time/generate", "time/reward", "time/ppo/total")  # what a step takes


@dataclass
class Evaluation:
    """Samples of a policy on held-out prompts, in order; all lists are equally long."""

    prompts: list
    responses: list
    rewards: np.ndarray  # from the reward model, standardised
    gold: np.ndarray  # from the annotator's rule
    kl: np.ndarray  # sum over tokens of log pi - log pi_ref, nats per response

    @property
    def distinct2(self):
        return distinct2(self.responses)

    def records(self):
        """One dict a sample, for a JSONL file."""
        columns = zip(self.prompts, self.responses, self.rewards.tolist(), self.gold.tolist(), self.kl.tolist())
        return [dict(zip(COLUMNS, row)) for row in columns]

    @classmethod
    def of_records(cls, records):
        """The inverse of `records`."""
        prompts, responses, *numbers = ([record[name] for record in records] for name in COLUMNS)
        return cls(prompts, responses, *map(np.asarray, numbers))


def evaluate(trainer, prompts, reward_fn, samples=2, seed=1234, batch_size=40):
    """Sample `samples` responses to each prompt with a fixed seed, and score them. The trainer is not changed. Several
    processes share the prompts (some may get none), and all of them get the whole Evaluation."""
    prompts, _ = trainer.encode([prompt for prompt in prompts for _ in range(samples)])
    with trainer.accelerator.split_between_processes(prompts) as part:
        rows = evaluate_here(trainer, part, reward_fn, seed + trainer.accelerator.process_index, batch_size) if part else []
    texts, rewards, gold, kl = zip(*gather_object(rows))
    return Evaluation(prompts, list(texts), np.asarray(rewards), np.asarray(gold), np.asarray(kl))


def evaluate_here(trainer, prompts, reward_fn, seed, batch_size):
    """One (response, reward, gold, KL) for each of this process's prompts."""
    _, queries = trainer.encode(prompts)
    generator, texts, kl = torch.Generator().manual_seed(seed), [], []
    with progress.bar(len(prompts), "held-out", "samples", trainer.accelerator.is_main_process) as done:
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            responses = trainer.generate(batch, generator=generator)
            rollout = trainer.inspect(batch, responses)
            texts += trainer.decode(responses)
            kl += (rollout.logprobs - rollout.ref_logprobs).sum(1).tolist()
            done.update(len(batch))
    rewards = [float(score) for score in reward_fn(prompts, texts)]
    return list(zip(texts, rewards, map(gold_reward, prompts, texts), kl))


def paired_gain(prompts, before, after, draws=10_000, seed=0):
    """(mean gain, (low, high)): 95 % bootstrap interval over prompts of after - before, a prompt's samples kept together."""
    gains = {}
    for prompt, gain in zip(prompts, np.asarray(after) - np.asarray(before)):
        gains.setdefault(prompt, []).append(gain)
    means = np.asarray([np.mean(values) for values in gains.values()])
    resampled = np.random.default_rng(seed).choice(means, (draws, len(means))).mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(means.mean()), (float(low), float(high))


# ---------------------------------------------------------------- the results of a run


def summarize(before, after, history, seconds):
    """What summary.json says of two Evaluations and the steps between. A number that is not finite is None."""
    of_steps = lambda name: [row[name] for row in history if math.isfinite(row.get(name, math.nan))]
    sampler_kl, sampler_diff = of_steps("objective/sampler_kl"), of_steps("objective/sampler_max_diff")
    numbers = dict(
        heldout_reward_before=before.rewards.mean(),
        heldout_reward_after=after.rewards.mean(),
        heldout_reward_gain_ci95=paired_gain(before.prompts, before.rewards, after.rewards)[1],
        heldout_gold_before=before.gold.mean(),
        heldout_gold_after=after.gold.mean(),
        heldout_gold_gain_ci95=paired_gain(before.prompts, before.gold, after.gold)[1],
        base_reward_std=before.rewards.std(ddof=1) if len(before.rewards) > 1 else math.nan,
        mean_kl=after.kl.mean(),
        sampler_kl=sum(sampler_kl) / len(sampler_kl) if sampler_kl else math.nan,
        sampler_max_diff=max(sampler_diff, default=math.nan),
        distinct2_before=before.distinct2,
        distinct2_after=after.distinct2,
        seconds=seconds,
        ppo_seconds=sum(row.get(name, 0.0) for row in history for name in TIMES),
        peak_rss_mb=peak_megabytes(),
    )
    exact = ("sampler_kl", "sampler_max_diff")  # far below the fourth place
    rounded = lambda name, x: None if not math.isfinite(x) else float(x) if name in exact else round(float(x), 4)
    return {k: [rounded(k, x) for x in v] if isinstance(v, tuple) else rounded(k, v) for k, v in numbers.items()}


def report(summary, samples, output):
    """The last screen of a run; a number that is None is a question mark."""
    n = lambda value, form="+.2f": "?" if value is None else format(value, form)
    less = lambda a, b: None if a is None or b is None else a - b
    print(f"\nheld-out prompts, before -> after {summary['steps']} PPO steps (gain: 95 % interval, bootstrap over prompts)")
    for name in ("reward", "gold"):
        b, a = summary[f"heldout_{name}_before"], summary[f"heldout_{name}_after"]
        low, high = summary[f"heldout_{name}_gain_ci95"]
        print(f"  {name:7s} {n(b)} -> {n(a)}   gain {n(less(a, b))} ({n(low)} to {n(high)})")
    gain, std = less(summary["heldout_reward_after"], summary["heldout_reward_before"]), summary["base_reward_std"]
    deviations = gain / std if std and gain is not None else None
    print(f"  the reward's gain is {n(deviations, '.2f')} deviations of the base model's reward")
    print(f"  KL {n(summary['mean_kl'], '.2f')} nats a response; distinct word pairs "
          f"{n(summary['distinct2_before'], '.2f')} -> {n(summary['distinct2_after'], '.2f')}")  # fmt: skip
    apart, largest = n(summary["sampler_kl"], ".2g"), n(summary["sampler_max_diff"], ".2g")
    print(f"  sampler and trainer differ by {apart} nats (largest token {largest})")
    print(f"  {summary['ppo_seconds'] / 60:.1f} minutes of PPO, {summary['seconds'] / 60:.1f} in all, "
          f"peak memory {n(summary['peak_rss_mb'], '.0f')} MB\n")  # fmt: skip
    for sample in samples[:: max(1, len(samples) // 3)][:3]:
        print(f"{sample['prompt']}\n  before ({n(sample['reward_before'])}): {' '.join(sample['before'].split())}")
        print(f"  after  ({n(sample['reward'])}): {' '.join(sample['response'].split())}\n")
    print(f"figure  {output / 'curves.png'}\nlog     {output / 'history.jsonl'}")
    print(f"adapter {output / 'checkpoint'}\nsummary {output / 'summary.json'}")
