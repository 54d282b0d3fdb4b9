"""Held-out evaluation: the same prompts before and after training, each time from the same seed, and what changed."""

import math
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object

from rlhf_helpers import progress
from rlhf_helpers.course.gold import distinct2, gold_reward, is_whole
from rlhf_helpers.data import checked_list
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import is_whole_unicode, shown
from rlhf_helpers.intervals import mean_interval
from rlhf_helpers.machine import peak_megabytes
from rlhf_helpers.rollout import checked_scores, gae_advantages, is_list
from rlhf_helpers.sampling import check_whole
from rlhf_helpers.shard import is_sharded

NUMBER = (int, float)
COLUMNS = {"prompt": str, "response": str, "reward": NUMBER, "gold": NUMBER, "kl": NUMBER}
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

    @property
    def whole(self):
        """Share of the answers that end like a sentence."""
        return sum(map(is_whole, self.responses)) / len(self.responses)

    @property
    def samples(self):
        """Answers to each prompt."""
        return len(self.prompts) // len(set(self.prompts))

    def by_prompt(self, values):
        """Values of the answers as (prompts, samples)."""
        return np.asarray(values).reshape(-1, self.samples)

    def first(self, count):
        """The same with the first `count` answers to each prompt."""
        return Evaluation.of_records([record for i, record in enumerate(self.records()) if i % self.samples < count])

    def records(self):
        """One dict a sample, for a JSONL file."""
        columns = zip(self.prompts, self.responses, self.rewards.tolist(), self.gold.tolist(), self.kl.tolist())
        return [dict(zip(COLUMNS, row)) for row in columns]

    @classmethod
    def of_records(cls, records):
        """The inverse of `records`. Raises InputError for what they cannot be."""
        for number, record in enumerate(records, start=1):
            for name, kind in COLUMNS.items():
                found = record.get(name) if isinstance(record, dict) else None
                fits = isinstance(found, kind) and not isinstance(found, bool)
                if not fits or not (is_whole_unicode(found) if kind is str else abs(found) <= sys.float_info.max):
                    raise InputError(
                        f"sample {number}: {name} is {shown(found)}; expected {'text' if kind is str else 'a finite number'}"
                    )
        prompts, responses, *numbers = ([record[name] for record in records] for name in COLUMNS)
        if len(counts := set(Counter(prompts).values())) > 1:
            raise InputError(f"{min(counts)} to {max(counts)} samples a prompt; expected as many of each")
        return cls(prompts, responses, *map(np.asarray, numbers))


def evaluate(trainer, prompts, reward_fn, samples=2, seed=1234, batch_size=40, reference=False):
    """Sample `samples` responses to each prompt, the same for the same seed and batch_size, and score them; with `reference`, from the
    reference, whose KL is 0. The prompts must differ. The trainer is not changed. Several processes share the prompts (some may get
    none), and all of them get the whole Evaluation."""
    check_whole("evaluate", 1, samples=samples, batch_size=batch_size)
    prompts = checked_list("evaluate: prompts", prompts)
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str) and prompt in prompts[:row]:
            raise InputError(
                f"evaluate: prompts[{row}] is {shown(prompt)} again; expected different ones (samples= gives each several answers)"
            )
    prompts, _ = trainer.encode(prompts)
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    with trainer.accelerator.split_between_processes(prompts) as part:
        seed += trainer.accelerator.process_index
        if is_sharded(trainer.model.pretrained_model):  # then all make as many passes: who has a prompt less takes one more
            most = math.ceil(len(prompts) / trainer.accelerator.num_processes)
            asked = [*part, *prompts[: most - len(part)]]
        else:
            asked = part
        rows = evaluate_here(trainer, asked, reward_fn, seed, batch_size, reference)[: len(part)] if asked else []
    texts, rewards, gold, kl = zip(*gather_object(rows))
    return Evaluation(prompts, list(texts), np.asarray(rewards), np.asarray(gold), np.asarray(kl))


def evaluate_here(trainer, prompts, reward_fn, seed, batch_size, reference):
    """One (response, reward, gold, KL) for each of this process's prompts."""
    _, queries = trainer.encode(prompts)
    generator, texts, kl = torch.Generator().manual_seed(seed), [], []
    with progress.bar(len(prompts), "held-out", "samples", trainer.accelerator.is_main_process) as done:
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            responses = trainer.generate(batch, generator=generator, reference=reference)
            texts += trainer.decode(responses)
            # A batch may cut groups in two, so it is not asked for the advantages of those.
            kl += [0.0] * len(batch) if reference else kl_of(trainer.inspect(batch, responses, advantages=gae_advantages))
            done.update(len(batch))
    rewards = reward_fn(list(prompts), list(texts))
    if not is_list(rewards) or len(rewards := list(rewards)) != len(texts):
        raise InputError(f"the reward function gave {shown(rewards)} for {len(texts)} answers; expected a number for each")
    checked_scores("evaluate", rewards)
    precise = lambda score: score.item() if hasattr(score, "item") else float(np.reshape(score, ()))  # as precise as it came
    rewards = list(map(precise, rewards))
    return list(zip(texts, rewards, map(gold_reward, prompts, texts), kl, strict=True))


def kl_of(rollout):
    """Nats of every response, a list: the sum over its tokens of log pi - log pi_ref."""
    return (rollout.logprobs - rollout.ref_logprobs).sum(1).tolist()


def paired_gain(prompts, before, after):
    """(mean gain, (low, high)): 95 % bootstrap interval over prompts of after - before, a prompt's samples kept together."""
    gains, sizes = {}, (len(prompts), len(before), len(after))
    if len(set(sizes)) > 1:
        raise InputError(
            f"paired_gain: {sizes[0]} prompts, {sizes[1]} numbers before and {sizes[2]} after; expected as many of each"
        )
    for prompt, gain in zip(prompts, np.asarray(after) - np.asarray(before)):
        gains.setdefault(prompt, []).append(gain)
    return mean_interval([np.mean(values) for values in gains.values()])


def best_of(evaluation, count):
    """(reward, gold): means over prompts of the answer that the reward model likes best among `count` to each: what sampling
    `count` times brings without any training."""
    check_whole("best_of", 1, count=count)
    if count > evaluation.samples:
        raise InputError(f"best_of: count is {count}; expected at most {evaluation.samples}, the answers to each prompt")
    rewards, gold = evaluation.by_prompt(evaluation.rewards), evaluation.by_prompt(evaluation.gold)
    return tuple(float(chosen_of(rewards, values, count).mean()) for values in (rewards, gold))


def chosen_of(rewards, values, count):
    """(prompts,): what the answer with the highest reward among `count` has of `values`, on average over all choices of `count`
    from the samples. `rewards` and `values` are (prompts, samples). The k-th best of N is the best of `count` in
    C(N - k, count - 1) of C(N, count) choices."""
    n = rewards.shape[1]
    weights = np.array([math.comb(n - k, count - 1) for k in range(1, n + 1)]) / math.comb(n, count)
    order = np.argsort(-rewards, axis=1, kind="stable")
    return np.take_along_axis(values, order, 1) @ weights


# ---------------------------------------------------------------- the results of a run


def summarize(before, after, history, seconds):
    """What summary.json says of two Evaluations of the same prompts and the steps between. Gains and their intervals are in the
    unit of what they are gains of. A number that is not finite is None."""
    of_steps = lambda name: [row[name] for row in history if math.isfinite(row.get(name, math.nan))]
    sampler_kl, sampler_diff = of_steps("objective/sampler_kl"), of_steps("objective/sampler_max_diff")
    numbers = {}
    for name, values in dict(reward="rewards", gold="gold").items():
        b, a = getattr(before, values), getattr(after, values)
        gain, interval = mean_interval(after.by_prompt(a).mean(1) - before.by_prompt(b).mean(1))
        numbers |= {f"heldout_{name}_before": b.mean(), f"heldout_{name}_after": a.mean()}
        numbers |= {f"heldout_{name}_gain": gain, f"heldout_{name}_gain_ci95": interval}
    n = min(4, before.samples)
    best_reward, best_gold = best_of(before, n)
    numbers |= dict(
        best_of=n,  # how many answers of the untrained model the next two choose from
        best_of_reward=best_reward,
        best_of_gold=best_gold,
        base_reward_std=before.rewards.std(ddof=1) if len(before.rewards) > 1 else math.nan,
        mean_kl=after.kl.mean(),
        sampler_kl=sum(sampler_kl) / len(sampler_kl) if sampler_kl else math.nan,
        sampler_max_diff=max(sampler_diff, default=math.nan),
        whole_before=before.whole,
        whole_after=after.whole,
        distinct2_before=before.distinct2,
        distinct2_after=after.distinct2,
        seconds=seconds,
        ppo_seconds=sum(row.get(name, 0.0) for row in history for name in TIMES),
        peak_rss_mb=peak_megabytes(),
    )
    exact = ("sampler_kl", "sampler_max_diff", "best_of")  # far below the fourth place, or whole
    rounded = lambda name, x: None if not math.isfinite(x) else x if name in exact else round(float(x), 4)
    return {k: [rounded(k, x) for x in v] if isinstance(v, tuple) else rounded(k, v) for k, v in numbers.items()}


def report(summary, samples, output):
    """The last screen of a run, printed whole or not at all; a number that is None, or that an older summary lacks, is a question
    mark."""
    print(screen(summary, samples, output))


def screen(summary, samples, output):
    """The lines of `report`, as one text."""
    lines = []
    say = lines.append
    shown = lambda value, form="+.2f": "?" if value is None else format(value, form)
    n = lambda name, form="+.2f": shown(summary.get(name), form)
    say(f"\nheld-out prompts, before -> after {summary['steps']} PPO steps (gain: 95 % interval, bootstrap over prompts)")
    for name in ("reward", "gold"):
        low, high = map(shown, summary[f"heldout_{name}_gain_ci95"])
        best = f"(best of {n('best_of', 'd')}, untrained: {n(f'best_of_{name}', '.2f')})"
        say(f"  {name:7s} {n(f'heldout_{name}_before')} -> {n(f'heldout_{name}_after')}   "
              f"gain {n(f'heldout_{name}_gain')} ({low} to {high})   {best}")  # fmt: skip
    say(f"  whole answers {n('whole_before', '.0%')} -> {n('whole_after', '.0%')}; distinct word pairs "
          f"{n('distinct2_before', '.2f')} -> {n('distinct2_after', '.2f')}; KL {n('mean_kl', '.2f')} nats a response")  # fmt: skip
    apart, largest = n("sampler_kl", ".2g"), n("sampler_max_diff", ".2g")
    say(f"  sampler and trainer differ by {apart} nats (largest token {largest})")
    say(f"  {summary['ppo_seconds'] / 60:.1f} minutes of PPO, {summary['seconds'] / 60:.1f} in all, "
          f"peak memory {n('peak_rss_mb', '.0f')} MB\n")  # fmt: skip
    for sample in samples[:: max(1, len(samples) // 3)][:3]:
        say(f"{sample['prompt']}\n  before ({shown(sample['reward_before'])}): {' '.join(sample['before'].split())}")
        say(f"  after  ({shown(sample['reward'])}): {' '.join(sample['response'].split())}\n")
    say(f"figure  {output / 'curves.png'}\nlog     {output / 'history.jsonl'}")
    say(f"adapter {output / 'checkpoint'}\nsummary {output / 'summary.json'}")
    return "\n".join(lines)
