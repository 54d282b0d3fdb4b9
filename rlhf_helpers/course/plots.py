"""Seeing: token tables and heat maps, live curves, histograms. The only module that imports matplotlib and pandas.

Every function returns a figure or a table; `show(figure, alt)` puts a figure on the page as a small PNG with alternative text.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; figures bring their own white ground, so that they
read in dark themes too."""

import io
import time

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from rlhf_helpers.stats import as_array

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
CURVES = {
    "ppo/mean_scores": "score",
    "objective/kl": "KL (nats a response)",
    "ppo/loss/value": "value loss",
    "ppo/policy/entropy": "entropy (nats a token)",
    "tokens/responses_len_mean": "response length (tokens)",
    "ppo/grad_norm": "gradient norm",
}
CURVES_ALT = "Training curves over PPO steps: score, KL, value loss, entropy, length, gradient norm"
SIGNALS = ("logprobs", "ref_logprobs", "kl", "rewards", "values", "advantages", "returns")


def new_figure(rows=1, columns=1, size=(7, 2.6), **kwargs):
    """(figure, axes as a 2-D array), outside pyplot: nothing is shown twice, and nothing has to be closed."""
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    return figure, axes


def png(figure, dpi=80):
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_figure(figure, path, dpi=120):
    """Write a figure to a PNG file."""
    with open(path, "wb") as file:
        file.write(png(figure, dpi))


def show(figure, alt, dpi=80, display_id=None):
    """Put a figure on the page with alternative text. With `display_id=True`, returns the handle that updates it."""
    from IPython.display import Image, display

    return display(Image(data=png(figure, dpi), format="png", alt=alt), display_id=display_id)


# ---------------------------------------------------------------- tokens


def visible(token):
    """A token with its white space made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


def token_strings(tokenizer, ids):
    """The text of each token id, white space visible."""
    return [visible(tokenizer.decode([int(i)])) for i in ids]


def token_table(tokenizer, rollout, row=0, ratio=None):
    """One response of a Rollout as a DataFrame, a line a token: what it was, how likely, what it was paid, what PPO made of
    it. `ratio` (T,), if given, is put beside."""
    keep = rollout.mask[row]
    columns = {"token": token_strings(tokenizer, rollout.response_ids[row][keep])}
    columns |= {name: getattr(rollout, name)[row][keep].cpu().numpy() for name in SIGNALS}
    if ratio is not None:
        columns["ratio"] = as_array(ratio)[: int(keep.sum())]
    return pd.DataFrame(columns).rename(columns={"ref_logprobs": "ref", "logprobs": "logprob", "values": "value",
                                                 "rewards": "reward", "advantages": "advantage", "returns": "return"})  # fmt: skip


def token_heatmap(tokenizer, rollout, row=0, signals=("kl", "rewards", "values", "advantages"), per_line=10, ratio=None):
    """One response of a Rollout as text, once for every signal, each token on a ground that shows its number. `ratio` (T,), if
    given, is drawn last, as its distance from 1."""
    keep = rollout.mask[row]
    tokens = token_strings(tokenizer, rollout.response_ids[row][keep])
    numbers = {name: as_array(getattr(rollout, name)[row][keep]) for name in signals}
    if ratio is not None:
        numbers["ratio - 1"] = as_array(ratio)[: len(tokens)] - 1
    lines = -(-len(tokens) // per_line)
    figure, axes = new_figure(len(numbers), 1, size=(0.78 * per_line + 1, (0.27 * lines + 0.36) * len(numbers)))
    for axis, name in zip(axes[:, 0], numbers):
        draw_tokens(figure, axis, tokens, numbers[name], name, per_line)
    return figure


def draw_tokens(figure, axis, tokens, numbers, title, per_line=10):
    """The tokens in lines of `per_line` over a heat map: two colours around 0, or one where no number is negative."""
    size = float(np.nanmax(np.abs(numbers))) or 1.0
    signed = bool((numbers < 0).any())
    norm = TwoSlopeNorm(0, -size, size) if signed else Normalize(0, size)
    cmap = colormaps["RdBu" if signed else "Blues"]
    lines = -(-len(tokens) // per_line)
    grid = np.full(lines * per_line, np.nan)
    grid[: len(tokens)] = numbers
    image = axis.imshow(grid.reshape(lines, per_line), cmap=cmap, norm=norm, aspect="auto")
    for i, (token, number) in enumerate(zip(tokens, numbers)):
        dark = np.dot(cmap(norm(number))[:3], (0.299, 0.587, 0.114)) < 0.5
        text = token if len(token) <= 11 else token[:10] + "…"
        axis.text(i % per_line, i // per_line, text, ha="center", va="center", fontsize=7.5, parse_math=False,
                  color="white" if dark else "black")  # fmt: skip
    axis.set_title(title, fontsize=8, loc="left")
    axis.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=axis, fraction=0.02, pad=0.01).ax.tick_params(labelsize=6)


def logprob_changes(advantages, before, after, bins=8):
    """What an update did: the change of each sampled token's log-prob against its advantage, a dot a token, and the mean
    with its 95 % interval in `bins` groups of equally many tokens. All three are 1-D."""
    advantages, before, after = map(as_array, (advantages, before, after))
    change = after - before
    figure, axes = new_figure(size=(6, 3))
    axis = axes[0, 0]
    axis.plot(advantages, change, ".", color=GREY, alpha=0.35, markersize=4, label="one token")
    groups = np.array_split(np.argsort(advantages), bins)
    centres = [advantages[group].mean() for group in groups]
    means = [change[group].mean() for group in groups]
    errors = [1.96 * change[group].std(ddof=1) / len(group) ** 0.5 for group in groups]
    axis.errorbar(
        centres, means, errors, color=ORANGE, marker="o", markersize=5, linewidth=1.5, label=f"mean of {len(groups[0])} tokens"
    )
    axis.axhline(0, color="black", linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.6)
    width = 1.3 * np.quantile(np.abs(change), 0.97)
    axis.set(ylim=(-width, width))
    axis.set_xlabel("advantage (whitened)", fontsize=8)
    axis.set_ylabel("log-prob after - before", fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    return figure


# ---------------------------------------------------------------- runs


def training_curves(history, curves=CURVES, title=None):
    """The stats of a run over its steps, one small panel each. `history` is a list of dicts, or several in a dict by name."""
    runs = history if isinstance(history, dict) else {None: history}
    rows = -(-len(curves) // 3)
    figure, axes = new_figure(rows, 3, size=(8.4, 1.75 * rows + (0.3 if title else 0)))
    for axis, (key, name) in zip(axes.flat, curves.items()):
        for colour, (label, run) in zip((BLUE, ORANGE, GREEN, RED), runs.items()):
            points = [(row["step"], row[key]) for row in run if key in row]
            axis.plot(*zip(*points) if points else ([], []), color=colour, linewidth=1.3, label=label)
        axis.set_title(name, fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    axes[-1, 0].set_xlabel("step", fontsize=8)
    if len(runs) > 1:
        axes[0, 0].legend(fontsize=7, frameon=False)
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


class LiveCurves:
    """Curves that grow while PPO runs: `with LiveCurves(steps) as live: trainer.train(..., on_step=live)`. One output on the
    page, redrawn in place at most every `every` seconds of `clock`, with the step and the time left in its title."""

    def __init__(self, steps, every=2.0, curves=CURVES, alt=CURVES_ALT, clock=time.monotonic):
        self.steps, self.every, self.curves, self.alt, self.clock = steps, every, curves, alt, clock
        self.handle, self.history, self.drawn = None, [], float("-inf")

    def __enter__(self):
        self.started, self.done = self.clock(), 0
        return self

    def __call__(self, trainer, stats):
        self.history, self.done = list(trainer.history), self.done + 1
        if self.clock() - self.drawn >= self.every:
            left = (self.clock() - self.started) / self.done * (self.steps - self.done)
            self.draw(f"step {self.done} of {self.steps}, about {left / 60:.1f} min left")

    def draw(self, title):
        figure = training_curves(self.history, self.curves, title)
        if self.handle is None:
            self.handle = show(figure, self.alt, dpi=70, display_id=True)
        else:
            from IPython.display import Image

            self.handle.update(Image(data=png(figure, 70), format="png", alt=self.alt))
        self.drawn = self.clock()

    def __exit__(self, *exception):
        if self.history:
            self.draw(f"{self.done} of {self.steps} steps in {(self.clock() - self.started) / 60:.1f} min")


def histograms(groups, label, bins=30, title=None):
    """Overlaid histograms of several groups of numbers, {name: numbers}, on common bins."""
    figure, axes = new_figure(size=(5.6, 2.4))
    numbers = {name: as_array(values) for name, values in groups.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(numbers.values())), bins)
    for colour, (name, values) in zip((BLUE, ORANGE, GREEN, RED), numbers.items()):
        axes[0, 0].hist(values, edges, alpha=0.55, color=colour, label=name)
        axes[0, 0].axvline(values.mean(), color=colour, linewidth=1.5)
    axes[0, 0].set_xlabel(label, fontsize=8)
    axes[0, 0].set_ylabel("count", fontsize=8)
    if title:
        axes[0, 0].set_title(title, fontsize=9)
    if len(numbers) > 1:
        axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def clipped_objective(cliprange=0.2, ratios=None, advantages=None):
    """PPO's loss of one token against its ratio, for a good and a bad token; tokens of a run as dots, if given."""
    figure, axes = new_figure(1, 2, size=(7.4, 2.5))
    ratios = None if ratios is None else as_array(ratios)
    low, high = (0.5, 1.5) if ratios is None else (min(0.5, *ratios), max(1.5, *ratios))
    grid = np.linspace(low, high, 401)
    for axis, (sign, name) in zip(axes[0], ((1, "advantage +1: make it likelier"), (-1, "advantage -1: make it rarer"))):
        loss = np.maximum(-sign * grid, -sign * grid.clip(1 - cliprange, 1 + cliprange))
        axis.plot(grid, loss, color=BLUE, linewidth=1.6)
        axis.plot(grid, -sign * grid, color=GREY, linewidth=0.8, linestyle=":")
        edge = 1 + sign * cliprange
        flat = (edge, grid[-1]) if sign > 0 else (grid[0], edge)
        axis.axvspan(*flat, color=GREY, alpha=0.15, linewidth=0)
        axis.text(np.mean(flat), 0.75, "clipped:\nno gradient", ha="center", fontsize=7, transform=axis.get_xaxis_transform())
        axis.axvline(1, color=GREY, linewidth=0.6)
        if ratios is not None:
            some = ratios[np.sign(as_array(advantages)) == sign]
            axis.plot(
                some, np.maximum(-sign * some, -sign * some.clip(1 - cliprange, 1 + cliprange)), ".", color=ORANGE, markersize=4
            )
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("ratio", fontsize=8)
    axes[0, 0].set_ylabel("loss", fontsize=8)
    return figure


def before_after(numbers):
    """{name: (before, after)} of the same prompts: a panel each, a dot a prompt, above the diagonal where it went up."""
    figure, axes = new_figure(1, len(numbers), size=(3.3 * len(numbers), 3))
    for axis, (name, pair) in zip(axes[0], numbers.items()):
        before, after = map(as_array, pair)
        low, high = min(before.min(), after.min()), max(before.max(), after.max())
        up = after > before
        axis.plot([low, high], [low, high], color=GREY, linewidth=0.8, linestyle=":")
        axis.plot(before[up], after[up], "o", color=BLUE, markersize=4, alpha=0.7, label=f"went up: {up.sum()}")
        axis.plot(before[~up], after[~up], "s", color=ORANGE, markersize=4, alpha=0.8, label=f"did not: {(~up).sum()}")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("before", fontsize=8)
        axis.set_ylabel("after", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    return figure


def running_mean(numbers, width=4):
    """The mean of each number and up to `width` - 1 before it, as long as the series itself."""
    sums = np.cumsum([0.0, *numbers])
    start = np.maximum(np.arange(len(numbers)) + 1 - width, 0)
    return (sums[1:] - sums[start]) / np.minimum(np.arange(len(numbers)) + 1, width)


def over_steps(groups, curves, width=4):
    """Several series over the steps of several runs: {name: [run, run, ...]}, a panel a group. Each run is a thin line (running
    mean of `width` steps), the mean of all runs a thick one. `curves` is {key of a row: label}."""
    figure, axes = new_figure(1, len(groups), size=(max(4.2, 2.3 * len(groups)), 2.5), sharey=True)
    for axis, (name, runs) in zip(axes[0], groups.items()):
        for (colour, style), (key, label) in zip(((BLUE, "-"), (ORANGE, "--"), (GREEN, ":")), curves.items()):
            lines = [running_mean([row[key] for row in run], width) for run in runs]
            for line in lines if len(lines) > 1 else []:
                axis.plot(range(1, len(line) + 1), line, color=colour, linewidth=0.6, alpha=0.6, linestyle=style)
            mean = np.mean([line[: min(map(len, lines))] for line in lines], axis=0)
            axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2, linestyle=style, label=label)
        axis.set_title(name, fontsize=8)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("step", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def frontier(groups, x="kl", y="gold", labels=("KL (nats a response)", "gold"), width=4):
    """The paths of several runs, {name: [run, run, ...]}, over the plane of KL and gold, running means of `width` steps, with a
    mark where each run ends. Distance is laid out as the square root of KL, as in Gao et al. 2023 (arXiv:2210.10760)."""
    figure, axes = new_figure(size=(6.4, 3.4))
    axis = axes[0, 0]
    axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    for (name, runs), colour, marker in zip(groups.items(), (RED, BLUE, GREEN, ORANGE, PURPLE, GREY), "oDs^vP"):
        for i, run in enumerate(runs):
            path = [running_mean([row[key] for row in run], width) for key in (x, y)]
            axis.plot(*path, color=colour, linewidth=0.9, alpha=0.75)
            axis.plot(
                path[0][-1], path[1][-1], marker, color=colour, markersize=7, markeredgecolor="black", label=None if i else name
            )
    ticks = [tick for tick in (0, 2, 8, 20, 50, 100, 200, 400) if tick <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel(labels[0] + ", spaced by its square root", fontsize=8)
    axis.set_ylabel(labels[1], fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    return figure


def stacked_bars(table, label):
    """One horizontal bar for each row of a DataFrame, its columns stacked, the total at its end."""
    figure, axes = new_figure(size=(7, 0.42 * len(table) + 0.9))
    axis, left = axes[0, 0], np.zeros(len(table))
    for colour, name in zip((BLUE, ORANGE, GREEN, RED, GREY), table.columns):
        axis.barh(table.index, table[name], left=left, color=colour, label=name, height=0.65)
        left += table[name].to_numpy()
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:.0f}", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(label, fontsize=8)
    axis.legend(fontsize=7, frameon=False, loc="lower right")
    return figure
