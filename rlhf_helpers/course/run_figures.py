"""Figures of many runs: what differs between seeds, and gold over the distance from the reference, with the curves of Gao et al.
2023 ("Scaling laws for reward model overoptimization", arXiv:2210.10760)."""

from itertools import cycle

import numpy as np

from rlhf_helpers.course.plots import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    SMALL,
    TEXT,
    draw_limit,
    legend,
    new_figure,
    over_lines,
    running_mean,
)
from rlhf_helpers.intervals import two_level_interval

COLOURS = (RED, ORANGE)
FORMS = {  # what multiplies alpha and -beta, of the distance d
    "d (α - β log d)": lambda d: np.stack([d, -d * np.log(d)], -1),  # of RL
    "d (α - β d)": lambda d: np.stack([d, -d * d], -1),  # of best of n
}


def of_seeds(runs, curves, limits=None, named=(), width=4):
    """Runs that differ in their seed alone, {name: history}: a panel for each of `curves` ({key: title}), a thin line a run (mean
    of the last `width` steps), those of `named` in colour, with their name at the end. `limits`, {key: number}, are dashed."""
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = new_figure(rows, columns, size=(9.2, 2.5 * rows))
    for axis, (key, title) in zip(axes.flat, curves.items()):
        for name, run in runs.items():
            line = running_mean([row[key] for row in run], width)
            colour = COLOURS[named.index(name) % len(COLOURS)] if name in named else BLUE
            bold = dict(linewidth=2, zorder=3) if name in named else dict(linewidth=0.9, alpha=0.6)
            axis.plot(range(1, len(line) + 1), line, color=colour, **bold)
            if name in named:
                over_lines(axis.annotate(f" {name}", (len(line), line[-1]), color=colour, fontsize=SMALL, va="center"))
        if key in (limits or {}):
            draw_limit(axis, limits[key])
        axis.set_title(title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(f"step; means of {width}")
    return figure


def over_steps(groups, curves, width=4):
    """Several series over the steps of several runs: {name: [run, run, ...]}, a panel a group. Each run is a thin line (running
    mean of `width` steps), the mean of all runs a thick one, up to the step at which the first ends. `curves` is {key of a row: label}."""
    figure, axes = new_figure(1, len(groups), size=(min(10, max(7.6, 3.2 * len(groups))), 3.2), sharex=True, sharey=True)
    for axis, (name, runs) in zip(axes[0], groups.items()):
        for (colour, style), (key, label) in zip(((BLUE, "-"), (RED, "--"), (ORANGE, ":")), curves.items()):
            lines = [running_mean([row[key] for row in run], width) for run in runs]
            for line in lines if len(lines) > 1 else []:
                axis.plot(range(1, len(line) + 1), line, color=colour, linewidth=0.8, alpha=0.6, linestyle=style)
            mean = np.mean([line[: min(map(len, lines))] for line in lines], axis=0)
            axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2.2, linestyle=style, label=label)
        axis.set_title(name)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
    thick = "; thin: one run, thick: the mean, until the first ends" if max(map(len, groups.values())) > 1 else ""
    figure.supxlabel("step" + (f" (means of the last {width})" if width > 1 else "") + thick, fontsize=TEXT)
    if len(curves) > 1:
        legend(figure)
    else:
        axes[0, 0].set_ylabel(label)
    return figure


def ends_by_itself(groups):
    """The share of answers with an EOS within the limit, over the steps: {condition: logs}, a panel each."""
    runs = {name.replace("_", " "): [log.steps for log in logs] for name, logs in groups.items() if logs}
    return over_steps(runs, {"ended": "share that ends by itself"})


def apart(heights, least):
    """`heights`, each raised as little as keeps it `least` above the next lower one."""
    raised, order = np.array(heights, float), np.argsort(heights)
    for lower, higher in zip(order, order[1:]):
        raised[higher] = max(raised[higher], raised[lower] + least)
    return raised


def paid_and_wanted(groups, width=4):
    """Two panels, what is paid (the score) and what is wanted (the gold), over the steps, means of `width`: {name: logs}, a line a run,
    each seed in a style of its own. The longest runs have their seed at the end of their score."""
    longest = max(len(log.steps) for logs in groups.values() for log in logs)
    figure, axes = new_figure(1, 2, size=(8, 2.9))
    for axis, key, title in zip(axes[0], ("score", "gold"), ("score: what is paid", "gold: what is wanted")):
        ends = []
        for place, (name, logs) in enumerate(groups.items()):
            colour = (BLUE, RED, ORANGE)[place % 3]
            for number, (log, style) in enumerate(zip(logs, cycle(("-", "--", ":")))):
                line = running_mean(log.course_of(key), width)
                label = None if number else name.replace("_", " ")
                axis.plot(
                    range(1, len(line) + 1), line, style, color=colour, linewidth=1.4, label=label, zorder=3 - 0.1 * place
                )
                if key == "score" and len(line) == longest:
                    ends.append((line[-1], f" seed {log.head['seed']}", colour))
        for y, (_, seed, colour) in zip(apart([end[0] for end in ends], 0.06 * np.ptp(axis.get_ylim())), ends):
            over_lines(axis.annotate(seed, (longest, y), color=colour, fontsize=SMALL, va="center", annotation_clip=False))
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set(title=title, xlabel=f"step; means of {width}")
    axes[0, 0].legend(frameon=False, fontsize=SMALL)
    return figure


def distance(kl):
    """The square root of a KL in nats, 0 for an estimate below 0."""
    return np.sqrt(np.maximum(kl, 0))


def path(kl, gold, start, width=4):
    """(distances, gains) of a run: means of `width` steps, not overlapping, without the first, which is at distance 0. `start` is
    the gold of the reference."""
    ends = range(2 * width - 1, len(kl), width)
    return distance(running_mean(kl, width)[ends]), running_mean(gold, width)[ends] - start


def fitted(distances, gains, form):
    """(alpha, beta) of Gao et al.'s curve by least squares; distances are above 0."""
    return np.linalg.lstsq(FORMS[form](np.asarray(distances, float)), np.asarray(gains, float), rcond=None)[0]


def fit_with_interval(groups, form):
    """((alpha, (low, high)), (beta, (low, high))): the mean of the fits to each of `groups` (a run's, or a prompt's, distances and
    gains, of two points or more), and its interval over the groups."""
    if fewest := [len(distances) for distances, _ in groups if len(distances) < 2]:
        raise ValueError(f"a group of {fewest[0]} points; expected at least 2, as many as the curve has parameters")
    fits = np.array([fitted(*group, form) for group in groups])
    return tuple(two_level_interval(column[:, None]) for column in fits.T)


def gao(clouds, dots=None):
    """Gold gained over the distance: {name: (groups, form)} as points with the fitted curve over their range (a group's points are
    averaged where all groups share their distances), and `dots`, {name: (distances, gains)}, as larger marks."""
    figure, axes = new_figure(size=(8, 4.2))
    axis = axes[0, 0]
    for (name, (groups, form)), colour in zip(clouds.items(), (BLUE, ORANGE, GREY)):
        d, y = (np.concatenate([group[side] for group in groups]) for side in (0, 1))
        grid = np.linspace(max(1e-3, d.min()), d.max(), 200)
        if all(np.array_equal(group[0], groups[0][0]) for group in groups):
            d, y = groups[0][0], np.mean([group[1] for group in groups], 0)
        axis.plot(d, y, ".", color=colour, alpha=0.5, markersize=7)
        line = FORMS[form](grid) @ [mean for mean, _ in fit_with_interval(groups, form)]
        axis.plot(grid, line, color=colour, linewidth=2, label=f"{name}: {form}")
    for (name, (d, y)), marker in zip((dots or {}).items(), "Ds"):
        axis.plot(d, y, marker, color=RED, markersize=6, linestyle="none", label=name)
    most = axis.get_xlim()[1] ** 2
    ticks = [tick for tick in (0, 0.25, 1, 2, 4, 6, 9, 12, 16, 25, 36, 50, 100) if tick <= most]
    axis.set_xticks(np.sqrt(ticks), [f"{tick:g}" for tick in ticks])
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="KL, nats an answer, spaced by its square root d", ylabel="gold gained")
    axis.legend(frameon=False, fontsize=SMALL, loc="upper left")
    return figure
