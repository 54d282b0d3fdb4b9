"""Runs side by side, from their logs: what each gained over the untrained model, prompt by prompt, which differences are ties, and
the plane of KL and gold. docs/experiments.md and notebook 08 are made with it."""

import math

import numpy as np

from rlhf_helpers.course import plots
from rlhf_helpers.course.experiments import EXPERIMENTS, missing
from rlhf_helpers.course.gold import is_whole
from rlhf_helpers.course.runs import logs_of
from rlhf_helpers.evaluation import chosen_of
from rlhf_helpers.intervals import mean_interval, two_level_interval

SIZES = (1, 2, 4, 8, 16, 32, 64)
MORE_COLOURS = ("#56B4E9", "#000000", "#994F00", "#5D3A9B", "#40B0A6", "#B8A800")
COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED, plots.PURPLE, *MORE_COLOURS)
TOGETHER = ("headline", "advantages", "dpo")  # what is compared in one plane has its colours and shapes in every plane
COLUMNS = [
    "condition",
    "seeds",
    "reward gained",
    "gold gained",
    "gold against the frozen recipe",
    "KL (lowest to highest)",
    "whole",
]


def base(split):
    """The log of the untrained model's answers to a split, or None."""
    return next(iter(logs_of("base", split)), None)


def gain(log, name):
    """What a run's answers gained over the untrained model's, prompt by prompt, (prompts,). Rewards are by one judge, the log's."""
    before = base(log.after["split"])
    start = before.rewards_by(log.after.get("judge")) if name == "rewards" else getattr(before, name)
    return log.by_prompt(getattr(log, name)).mean(1) - before.by_prompt(start).mean(1)


def net(log, price):
    """The objective of RLHF, prompt by prompt, (prompts,): the reward less a price on KL (Ziegler et al. 2019, equation 2), less what the
    untrained model has, whose KL is 0."""
    return gain(log, "rewards") - price * log.by_prompt(log.after["kl"]).mean(1)


def drawn_until_whole(log, values):
    """What drawing anew until an answer is whole would have, without any reward model, prompt by prompt, (prompts,): the mean of
    `values` over a prompt's whole answers, or over all where none is."""
    whole = log.by_prompt([is_whole(text) for text in log.after["responses"]])
    kept = np.where(whole.any(1, keepdims=True), whole, True)
    return (log.by_prompt(values) * kept).sum(1) / kept.sum(1)


def draws_until_whole(log):
    """How many draws an answer that takes, mean over prompts: 1 / the share of whole ones, kept finite where none is."""
    whole = log.by_prompt([is_whole(text) for text in log.after["responses"]])
    return float(np.mean((whole.shape[1] + 1) / (whole.sum(1) + 1)))


def signed(x):
    return f"{x:+.2f}"


def spread(interval):
    mean, (low, high) = interval
    return f"{signed(mean)} ({signed(low)} to {signed(high)})"


def ranged(kls):
    """The mean of some runs' KLs, and the range."""
    return f"{np.mean(kls):.1f}" + (f" ({min(kls):.1f} to {max(kls):.1f})" if len(kls) > 1 else "")


def over(values):
    """(mean, interval) of (runs, prompts): of one run over its prompts, of several over both."""
    return mean_interval(values[0]) if len(values) == 1 else two_level_interval(values)


def verdict(values, control=None):
    """A difference, (seeds, prompts), or that of two groups of runs, with its interval: a tie where that has 0 in it, and no verdict
    from one seed."""
    mean, (low, high) = interval = two_level_interval(values, control)
    if 1 in (len(values), len(values if control is None else control)):
        return f"{signed(mean)}: one seed decides nothing"
    return spread(interval) + (": a tie" if low <= 0 <= high else "")


def times(values, control):
    """How many times as far as other runs some went, of one KL a run: the ratio of the geometric means, with its interval. KLs of one
    condition lie as factors apart, not as sums: 65, 154 and 204. (A sampled KL may be below 0; 0.01 stands for all that small.)"""
    mean, (low, high) = two_level_interval(*(np.log(np.maximum(group, 0.01))[:, None] for group in (values, control)))
    if 1 in (len(values), len(control)):
        return f"x {math.exp(mean):.2f}: one seed decides nothing"
    said = f"x {math.exp(mean):.2f} ({math.exp(low):.2f} to {math.exp(high):.2f})"
    return said + (": a tie" if low <= 0 <= high else "")


def listed(*experiments):
    """The conditions of experiments, each once, in the order in which they are listed."""
    return list(dict.fromkeys(run.condition for experiment in experiments for run in EXPERIMENTS[experiment]))


def by_condition(*experiments):
    """{condition: its logs} of experiments, in the order in which they are listed; what is not listed comes last."""
    found = {condition: [] for condition in listed(*experiments)}
    for log in (log for experiment in experiments for log in logs_of(experiment)):
        found.setdefault(log.head["condition"], []).append(log)
    return {condition: logs for condition, logs in found.items() if logs}


def stacked(logs, what):
    """(runs, prompts) of what `what(log)` gives for each run."""
    return np.stack([what(log) for log in logs])


def rows(*experiments):
    """A row of COLUMNS for each condition that has logs: means over its seeds, gains with intervals over seeds and prompts."""
    made, frozen = [], logs_of("headline")
    for condition, logs in by_condition(*experiments).items():
        gains = {name: stacked(logs, lambda log: gain(log, name)) for name in ("rewards", "gold")}
        apart = ""
        if frozen and logs[0].head.get("experiment") != "headline" and logs[0].after["split"] == frozen[0].after["split"]:
            apart = verdict(gains["gold"], stacked(frozen, lambda log: gain(log, "gold")))
        made.append([condition, len(logs), *(spread(over(values)) for values in gains.values()), apart,
                     ranged([log.kl for log in logs]), f"{np.mean([log.whole for log in logs]):.0%}"])  # fmt: skip
    return made


def reached():
    """Rows of REACHED for the ways to answer the test prompts: what each has, and at what price in KL and in draws."""
    if (before := base("test")) is None:
        return []
    rewards, gold = before.by_prompt(before.rewards), before.by_prompt(before.gold)
    row = lambda name, level, gained, reward, kl, draws: [
        name,
        f"{level:.2f}",
        spread(gained) if gained else "",
        reward,
        kl,
        draws,
    ]
    whole = drawn_until_whole(before, before.gold)
    made = [row("the untrained model", gold.mean(), None, f"{rewards.mean():.2f}", "0", "1"),
            row("the same, drawn anew until whole", whole.mean(), mean_interval(whole - gold.mean(1)),
                f"{drawn_until_whole(before, before.rewards).mean():.2f}", "", f"{draws_until_whole(before):.1f}")]  # fmt: skip
    for n in [n for n in (4, 8, 16) if n <= rewards.shape[1]]:
        best, score = (chosen_of(rewards, values, n) for values in (gold, rewards))
        kl = f"at most {math.log(n) - (n - 1) / n:.2f}"
        made.append(row(f"its best of {n}", best.mean(), mean_interval(best - gold.mean(1)), f"{score.mean():.2f}", kl, str(n)))
    for name, (experiment, condition) in TRAINED.items():
        if not (logs := logs_of(experiment, condition)):
            continue
        ends = [log.kl for log in logs]
        reward = rewards.mean() + np.mean([gain(log, "rewards").mean() for log in logs])
        made.append(row(f"{name}, {len(logs)} seeds", np.mean([log.gold.mean() for log in logs]),
                        over(stacked(logs, lambda log: gain(log, "gold"))), f"{reward:.2f}",
                        ranged(ends), "1"))  # fmt: skip
    return made


REACHED = ["answers by", "gold", "gained", "reward", "KL, nats", "draws per answer"]
TRAINED = {
    "**PPO**, the frozen recipe": ("headline", None),
    "PPO without a price or a budget": ("prices", "price_0_lr_0.002"),
    "DPO, β = 0.1": ("dpo", "beta_0.1"),
    "DPO, β = 0.03": ("dpo", "beta_0.03"),
}


def not_made(*experiments):
    """How many runs of the experiments are listed and have no log yet: {experiment: "12 of 30 runs"}."""
    left = {name: len(missing(name)) for name in experiments}
    return {name: f"{count} of {len(EXPERIMENTS[name])} runs" for name, count in left.items() if count}


# ---------------------------------------------------------------- the figure


def by_rate(experiment):
    """`names` and `shapes` of the plane for runs at several prices and learning rates: a colour for each price, dark to light, and a
    shape for each rate."""
    settings = {log.head["condition"]: log.head["config"] for log in logs_of(experiment)}
    settings = dict(sorted(settings.items(), key=lambda item: item[1]["init_kl_coef"]))
    names = {name: f"price {how['init_kl_coef']:g}" for name, how in settings.items()}
    return dict(names=names, shapes={name: f"learning rate {how['learning_rate']:g}" for name, how in settings.items()})


def plane(*experiments, names=None, marks=None, shapes=None):
    """Gold over the square root of KL (Gao et al. 2023, arXiv:2210.10760): every run of the experiments as a dot, their conditions
    in colours, and best of n of the untrained model as a line. `names` are other words for conditions, one word for several makes
    them one colour; `marks` are words beside the dots of a condition. With `shapes`, the shape is by these words, and the colours are
    a scale in the order of `names`. None without logs."""
    logs = [log for experiment in experiments for log in logs_of(experiment)]
    if not logs or base(logs[0].after["split"]) is None:
        return None
    figure, axes = plots.new_figure(size=(7.6, 4.0))
    axis, before = axes[0, 0], base(logs[0].after["split"])
    rewards, gold = before.by_prompt(before.rewards), before.by_prompt(before.gold)
    sizes = [n for n in SIZES if n <= rewards.shape[1]]
    bound = [math.sqrt(math.log(n) - (n - 1) / n) for n in sizes]
    level = [chosen_of(rewards, gold, n).mean() for n in sizes]
    axis.plot(bound, level, color=plots.GREY, marker="o", markersize=3, linewidth=1, label="best of n")
    for n, x, y in zip(sizes, bound, level):
        how = dict(xytext=(-6, 1), ha="right") if n > 1 else dict(xytext=(6, -4))  # left of the line there are no runs
        words = f"n = {n}" if n > 1 else "untrained"
        axis.annotate(words, (x, y), textcoords="offset points", fontsize=8, color=plots.GREY, **how)
    label = lambda log: (names or {}).get(log.head["condition"], log.head["condition"])
    conditions = by_condition(*experiments)
    order = list(dict.fromkeys([*listed(*(TOGETHER if set(experiments) <= set(TOGETHER) else experiments)), *conditions]))
    numbers = {label(conditions[name][0]): order.index(name) for name in reversed(order) if name in conditions}
    labels, colours = sorted(numbers, key=numbers.get), COLOURS
    if shapes:
        labels = [name for name in dict.fromkeys(names.values()) if name in labels]
        numbers = {name: number for number, name in enumerate(labels)}
        colours = [plots.colormaps["plasma"](place) for place in np.linspace(0, 0.9, len(labels))]
    markers = dict(zip(sorted(set((shapes or {}).values())), "os^DvP*"))
    for name in labels:
        own = [log for log in logs if label(log) == name]
        x, y = [math.sqrt(max(log.kl, 0)) for log in own], [log.gold.mean() for log in own]
        number = numbers[name]
        colour = colours[number % len(colours)]
        if shapes:
            axis.scatter([], [], color=colour, marker="o", s=26, label=name)
            for log, *at in zip(own, x, y):
                axis.scatter(*at, color=colour, marker=markers[shapes[log.head["condition"]]], s=26, zorder=3)
        else:
            axis.scatter(x, y, color=colour, marker="os^DvP*"[number % 7], s=26, label=name, zorder=3)
        for log, *at in zip(own, x, y):
            if mark := (marks or {}).get(log.head["condition"]):
                axis.annotate(mark, at, (5, -3), textcoords="offset points", fontsize=8, color=colour)
    for shape, marker in markers.items():
        axis.scatter([], [], color=plots.GREY, marker=marker, s=26, label=shape)
    axis.set_xlabel("KL, nats an answer (axis: its square root)", fontsize=9)
    axis.set_ylabel(f"gold on {logs[0].after['split']} prompts, mean of a run", fontsize=9)
    most = max(log.kl for log in logs)
    ticks = [t for t in (0, 0.25, 1, 2, 4, 6, 9, 12, 16, 25, 36, 50, 100, 200) if t <= 1.2 * most + 1]
    axis.set_xticks([math.sqrt(t) for t in ticks], [f"{t:g}" for t in ticks])
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
