"""Reward models from fewer pairs, or from pairs drawn anew, by what each says of the untrained model's answers to the test prompts
(data/runs/reward_models): how it ranks the test pairs, and what the best of n by its choice is worth to the annotator. No policy is
trained, so that a question about the reward model has no noise of training in its answer."""

from itertools import combinations

import numpy as np

from rlhf_helpers.course import plots
from rlhf_helpers.course.compare import SIZES, base
from rlhf_helpers.course.runs import logs_of
from rlhf_helpers.evaluation import chosen_of

HOW = dict(mean=lambda scores: scores.mean(0), min=lambda scores: scores.min(0))  # several reward models as one


def scores_of(condition):
    """(reward models, prompts, samples): what those of a condition say of the untrained model's answers; None if there are none."""
    logs = logs_of("reward_models", condition)
    return np.stack([base("test").by_prompt(log.rewards) for log in logs]) if logs else None


def accuracy(log):
    """Share of the test pairs that a reward model ranks right; a tie is wrong."""
    return float(np.mean(np.array(log.after["chosen"]) > np.array(log.after["rejected"])))


def gold_of_best(scores, n):
    """Gold of the answer with the highest score among n, prompt by prompt: scores (..., prompts, samples) to (..., prompts)."""
    before = base("test")
    gold, rows = before.by_prompt(before.gold), scores.reshape(-1, *scores.shape[-2:])
    return np.stack([chosen_of(row, gold, n) for row in rows]).reshape(scores.shape[:-1])


def errors(scores):
    """What of each reward model's scores gold does not explain, by a line of its own: (reward models, answers), each of mean 0."""
    before = base("test")
    x = before.gold - before.gold.mean()
    y = scores.reshape(len(scores), -1)
    y = y - y.mean(1, keepdims=True)
    return y - np.outer(y @ x / (x @ x), x)


def correlations(scores):
    """Pearson's r of the errors of every two reward models, and of each with gold itself: (pairs,) and (reward models,)."""
    between, found = np.corrcoef(errors(scores)), scores.reshape(len(scores), -1)
    with_gold = np.array([np.corrcoef(row, base("test").gold)[0, 1] for row in found])
    return np.array([between[a, b] for a, b in combinations(range(len(scores)), 2)]), with_gold


def gold_over_n(conditions):
    """Gold of the best of n over n, a line for the mean of each condition's reward models, a band for what they span: {name:
    condition}. None without scores."""
    found = {name: scores for name, condition in conditions.items() if (scores := scores_of(condition)) is not None}
    if not found:
        return None
    figure, axes = plots.new_figure(size=(7.6, 3.6))
    axis, sizes = axes[0, 0], [n for n in SIZES if n <= next(iter(found.values())).shape[-1]]
    colours = plots.colormaps["viridis"](np.linspace(0.9, 0, len(found)))
    for (name, scores), colour in zip(found.items(), colours):
        lines = np.stack([gold_of_best(scores, n).mean(-1) for n in sizes])
        axis.plot(sizes, lines.mean(1), color=colour, marker="o", markersize=4, label=name)
        axis.fill_between(sizes, lines.min(1), lines.max(1), color=colour, alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, sizes)
    axis.set(xlabel="n: answers of the untrained model to choose from", ylabel="gold of the chosen one")
    plots.legend(figure)
    return figure
