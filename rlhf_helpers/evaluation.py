"""Held-out evaluation: the same prompts and the same random numbers before and after training, and what changed."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object

from rlhf_helpers.course.gold import distinct2, gold_reward


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
        return [dict(zip(("prompt", "response", "reward", "gold", "kl"), row)) for row in columns]


def evaluate(trainer, prompts, reward_fn, samples=2, seed=1234, batch_size=40):
    """Sample `samples` responses to each prompt with a fixed seed, and score them. The trainer is not changed. Several
    processes share the prompts, and all of them get the whole Evaluation."""
    prompts, _ = trainer.encode([prompt for prompt in prompts for _ in range(samples)])
    with trainer.accelerator.split_between_processes(prompts) as part:
        rows = evaluate_here(trainer, part, reward_fn, seed + trainer.accelerator.process_index, batch_size)
    texts, rewards, gold, kl = zip(*gather_object(rows))
    return Evaluation(prompts, list(texts), np.asarray(rewards), np.asarray(gold), np.asarray(kl))


def evaluate_here(trainer, prompts, reward_fn, seed, batch_size):
    """One (response, reward, gold, KL) for each of this process's prompts."""
    _, queries = trainer.encode(prompts)
    responses = trainer.generate(queries, batch_size=batch_size, generator=torch.Generator().manual_seed(seed))
    texts = trainer.decode(responses)
    kl = []
    for start in range(0, len(queries), batch_size):
        rollout = trainer.inspect(queries[start : start + batch_size], responses[start : start + batch_size])
        kl += (rollout.logprobs - rollout.ref_logprobs).sum(1).tolist()
    rewards = [float(score) for score in reward_fn(prompts, texts)]
    return list(zip(texts, rewards, map(gold_reward, prompts, texts), kl))


def paired_gain(prompts, before, after, draws=10_000, seed=0):
    """(mean gain, (low, high)): 95 % bootstrap interval over prompts of after - before, the samples of a prompt kept together."""
    gains = {}
    for prompt, gain in zip(prompts, np.asarray(after) - np.asarray(before)):
        gains.setdefault(prompt, []).append(gain)
    means = np.asarray([np.mean(values) for values in gains.values()])
    resampled = np.random.default_rng(seed).choice(means, (draws, len(means))).mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(means.mean()), (float(low), float(high))
