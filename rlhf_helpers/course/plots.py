"""Seeing: token tables and heat maps, live curves, histograms. The only module that imports matplotlib and pandas.

Every function returns a figure or a table; `show(figure, alt)` puts a figure on the page as a PNG with alternative text, sharp
(160 dpi), with letters about as large as the page's, on white. Colours are Okabe and Ito's, for colour-blind readers."""

import io
import time

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image as Picture

from rlhf_helpers.files import whole_file
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
TITLES = {
    "kl": "KL (nats)",
    "non_score_rewards": "-β KL (points): what the token pays",
    "values": "value (points): what the head expected before the token",
    "advantages": "advantage, whitened",
    "returns": "return (points): what came, from here on",
}
SMALL, TEXT = 9, 10  # points; on the page an inch is 100 px, so that 10 points are its 14 px
SIZES = {"font.size": TEXT, "axes.titlesize": TEXT, "axes.labelsize": TEXT, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL}


def new_figure(rows=1, columns=1, size=(7.6, 3), **kwargs):
    """(figure, axes as a 2-D array), outside pyplot: nothing is shown twice, and nothing has to be closed."""
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    with rc_context(SIZES):
        axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure, axis=None):
    """The names of the lines of `axis` (by default the first) in a row above the panels, where they cover nothing."""
    handles, labels = (axis or figure.axes[0]).get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=SMALL)


def over_lines(text):
    """A text of a figure, bold and with a white edge, so that it can be read where lines pass."""
    text.set(fontweight="bold", zorder=4, path_effects=[withStroke(linewidth=3, foreground="white")])


def png(figure, dpi=160):
    """The figure as PNG bytes, in the 256 colours that suit it best: a third of the size, and no difference to be seen."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    picture = Picture.open(buffer).convert("RGB").quantize(256, dither=Picture.Dither.NONE)
    picture.save(small, format="PNG", optimize=True)
    return small.getvalue()


def save_figure(figure, path, dpi=160):
    """Write a figure to a PNG file, whole or not at all. Raises files.NotWritten."""
    with whole_file(path) as beside:
        beside.write_bytes(png(figure, dpi))


def image(figure, alt, dpi=160):
    """The figure for a page, with alternative text: an inch is 100 px wide, whatever `dpi` is."""
    from IPython.display import Image

    return Image(data=png(figure, dpi), format="png", alt=alt, width=round(100 * figure.get_figwidth()))


def show(figure, alt, dpi=160, display_id=None):
    """Put a figure on the page with alternative text. With `display_id=True`, returns the handle that updates it."""
    from IPython.display import display

    return display(image(figure, alt, dpi), display_id=display_id)


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


def token_heatmap(tokenizer, rollout, row=0, signals=("kl", "values", "advantages"), per_line=9, ratio=None):
    """One response of a Rollout as text, once for every signal, each token on a ground that shows its number. The colours of a
    signal mean the same in all responses of the rollout: they end where 98 % of its tokens do. "rewards" are drawn without the
    score, which stands in the title. `ratio` (T,), if given, is drawn last, as its distance from 1, with colours that end at 0.5 or before."""
    keep = rollout.mask[row]
    tokens = token_strings(tokenizer, rollout.response_ids[row][keep])
    panels = []
    for name in signals:
        title, every = TITLES.get(name, name), getattr(rollout, name)
        if name == "rewards":
            title, every = (
                f"-β KL (points); on the last token the score of {rollout.scores[row]:+.2f} comes on top",
                rollout.non_score_rewards,
            )
        panels.append((title, as_array(every[row][keep]), as_array(every[rollout.mask])))
    if ratio is not None:
        moved = as_array(ratio)[: len(tokens)] - 1
        panels.append(("ratio - 1", moved, moved.clip(-0.5, 0.5)))  # so that one outlier does not hide all others
    lines = -(-len(tokens) // per_line)
    figure, axes = new_figure(len(panels), 1, size=(0.98 * per_line + 0.9, (0.3 * lines + 0.42) * len(panels)))
    for axis, (title, numbers, every) in zip(axes[:, 0], panels):
        draw_tokens(figure, axis, tokens, numbers, title, per_line, every)
    return figure


def draw_tokens(figure, axis, tokens, numbers, title, per_line=9, every=None):
    """The tokens in lines of `per_line` over a heat map: two colours around 0, or one where no number is negative. The scale is
    that of the numbers `every`, by default those drawn; what lies beyond has the last colour, and the bar a pointed end."""
    every = numbers if every is None else every
    most, size = np.nanmax(np.abs(every)), np.nanquantile(np.abs(every), 0.98)
    size = float(size if size > most / 100 else most) or 1.0
    signed = bool((every < 0).any())
    norm = TwoSlopeNorm(0, -size, size) if signed else Normalize(0, size)
    cmap = colormaps["RdBu" if signed else "Blues"]
    lines = -(-len(tokens) // per_line)
    grid = np.full(lines * per_line, np.nan)
    grid[: len(tokens)] = numbers
    image = axis.imshow(grid.reshape(lines, per_line), cmap=cmap, norm=norm, aspect="auto")
    for i, (token, number) in enumerate(zip(tokens, numbers)):
        dark = np.dot(cmap(norm(number))[:3], (0.299, 0.587, 0.114)) < 0.5
        text = token if len(token) <= 12 else token[:11] + "…"
        axis.text(i % per_line, i // per_line, text, ha="center", va="center", fontsize=TEXT, parse_math=False,
                  color="white" if dark else "black")  # fmt: skip
    axis.set_title(title, loc="left")
    axis.set(xticks=[], yticks=[])
    beyond = "neither" if max(most, np.nanmax(np.abs(numbers))) <= size else "both" if signed else "max"
    figure.colorbar(image, ax=axis, fraction=0.02, pad=0.01, extend=beyond).ax.tick_params(labelsize=SMALL)


def logprob_changes(advantages, before, after, bins=8):
    """What an update did: the change of each sampled token's log-prob against its advantage, a dot a token, and the mean
    with its 95 % interval in `bins` groups of equally many tokens. All three are 1-D. Dots beyond the frame lie on its edge, as
    triangles, and are counted."""
    advantages, before, after = map(as_array, (advantages, before, after))
    change = after - before
    figure, axes = new_figure(size=(7.6, 3.8))
    axis = axes[0, 0]
    width = 1.3 * np.quantile(np.abs(change), 0.97)
    inside = np.abs(change) <= width
    axis.plot(advantages[inside], change[inside], ".", color=GREY, alpha=0.4, markersize=5, label="one token")
    groups = np.array_split(np.argsort(advantages), bins)
    centres = [advantages[group].mean() for group in groups]
    means = [change[group].mean() for group in groups]
    errors = [1.96 * change[group].std(ddof=1) / len(group) ** 0.5 for group in groups]
    axis.errorbar(centres, means, errors, color=RED, marker="o", markersize=5, linewidth=1.5,
                  label=f"mean of {len(groups[0])} tokens, 95 % interval")  # fmt: skip
    for sign, marker in ((1, "^"), (-1, "v")):
        beyond = ~inside & (np.sign(change) == sign)
        label = f"{(~inside).sum()} beyond the frame" if sign > 0 else None
        axis.plot(advantages[beyond], np.full(beyond.sum(), 0.97 * sign * width), marker, color=GREY, markersize=5, label=label)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set(ylim=(-width, width), xlabel="advantage (whitened)", ylabel="log-prob after - before (nats)")
    legend(figure)
    return figure


# ---------------------------------------------------------------- runs


def training_curves(history, curves=CURVES, title=None, limits=None, width=4):
    """The stats of a run over its steps, one small panel each: every step pale, the mean of the last `width` steps dark. `history`
    is a list of dicts, or several in a dict by name. `limits`, {key: number}, are drawn as dashed lines."""
    runs = history if isinstance(history, dict) else {None: history}
    rows = -(-len(curves) // 3)
    figure, axes = new_figure(rows, 3, size=(9.6, 2.1 * rows + 0.4))
    for axis, (key, name) in zip(axes.flat, curves.items()):
        for colour, (label, run) in zip((BLUE, ORANGE, GREEN, RED), runs.items()):
            steps, numbers = [row["step"] for row in run if key in row], [row[key] for row in run if key in row]
            axis.plot(steps, numbers, color=colour, linewidth=1, alpha=0.4)
            axis.plot(steps, running_mean(numbers, width), color=colour, linewidth=1.8, label=label or f"mean of {width} steps")
        if np.isfinite((limits or {}).get(key, np.inf)):
            draw_limit(axis, limits[key])
        axis.set_title(name)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step" if len(runs) == 1 else f"step; dark: mean of {width}")
    if any(runs.values()):
        legend(figure)
    if title:
        figure.suptitle(title, fontsize=TEXT, x=0.99, ha="right")
    return figure


def draw_limit(axis, limit):
    """A dashed line with its number at the left end, and room for it below the title."""
    axis.axhline(limit, color=GREY, linewidth=1, linestyle="--")
    axis.margins(y=0.15)
    over_lines(axis.annotate(f"limit {limit:g}", (0.01, limit), xycoords=("axes fraction", "data"), fontsize=SMALL, color=GREY))


def limits_of(config):
    """What a run can or should not pass, {key of a stat: number}, from its PPOConfig; {} for other configs."""
    names = {"tokens/responses_len_mean": "max_new_tokens", "objective/kl": "kl_budget", "ppo/grad_norm": "max_grad_norm"}
    return {key: getattr(config, name) for key, name in names.items() if getattr(config, name, None) is not None}


class LiveCurves:
    """Curves that grow while PPO runs: `with LiveCurves(steps) as live: trainer.train(..., on_step=live)`. One output on the
    page, redrawn in place at most every `every` seconds of `clock`, with the step and the time left in its title."""

    def __init__(self, steps, every=2.0, curves=CURVES, alt=CURVES_ALT, clock=time.monotonic):
        self.steps, self.every, self.curves, self.alt, self.clock = steps, every, curves, alt, clock
        self.handle, self.history, self.limits, self.drawn = None, [], {}, float("-inf")
        self.dpi = 80  # quick, but for the last

    def __enter__(self):
        self.started, self.done = self.clock(), 0
        return self

    def __call__(self, trainer, stats):
        self.history, self.done = list(trainer.history), self.done + 1
        self.limits = limits_of(getattr(trainer, "config", None))
        if self.clock() - self.drawn >= self.every:
            left = (self.clock() - self.started) / self.done * (self.steps - self.done)
            self.draw(f"step {self.done} of {self.steps}, about {left / 60:.1f} min left")

    def draw(self, title):
        figure = training_curves(self.history, self.curves, title, self.limits)
        if self.handle is None:
            self.handle = show(figure, self.alt, self.dpi, display_id=True)
        else:
            self.handle.update(image(figure, self.alt, self.dpi))
        self.drawn = self.clock()

    def __exit__(self, *exception):
        if self.history:
            self.dpi = 160
            self.draw(f"{self.done} of {self.steps} steps in {(self.clock() - self.started) / 60:.1f} min")


def histograms(groups, label, bins=30, title=None):
    """Overlaid histograms of several groups of numbers, {name: numbers}, on common bins."""
    figure, axes = new_figure(size=(7.6, 3))
    numbers = {name: as_array(values) for name, values in groups.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(numbers.values())), bins)
    for colour, (name, values) in zip((BLUE, ORANGE, GREEN, RED), numbers.items()):
        axes[0, 0].hist(values, edges, alpha=0.55, color=colour, label=name)
        axes[0, 0].axvline(values.mean(), color=colour, linewidth=2)
    axes[0, 0].set(xlabel=f"{label}; lines: means", ylabel="count")
    axes[0, 0].set_title(title or "")
    if len(numbers) > 1:
        legend(figure)
    return figure


def clipped_objective(cliprange=0.2, ratios=None, advantages=None, reach=1.0):
    """PPO's loss of one token against its ratio, for a good and a bad token; tokens of a run as dots, if given. Ratios further
    than `reach` from 1 are not drawn, but counted at the edge."""
    figure, axes = new_figure(1, 2, size=(9.2, 3.4))
    ratios = None if ratios is None else as_array(ratios)
    grid = np.linspace(1 - reach, 1 + reach, 401)
    for axis, (sign, name) in zip(axes[0], ((1, "advantage +1: make it likelier"), (-1, "advantage -1: make it rarer"))):
        losses = lambda ratio: np.maximum(-sign * ratio, -sign * ratio.clip(1 - cliprange, 1 + cliprange))
        axis.plot(grid, losses(grid), color=BLUE, linewidth=1.8)
        axis.plot(grid, -sign * grid, color=GREY, linewidth=1, linestyle=":")
        edge = 1 + sign * cliprange
        flat = (edge, grid[-1]) if sign > 0 else (grid[0], edge)
        axis.axvspan(*flat, color=GREY, alpha=0.15, linewidth=0)
        above = 0.86 if sign > 0 else 0.5
        axis.text(
            np.mean(flat), above, "clipped: no gradient", ha="center", fontsize=SMALL, transform=axis.get_xaxis_transform()
        )
        axis.axvline(1, color=GREY, linewidth=0.6)
        if ratios is not None:
            some = ratios[np.sign(as_array(advantages)) == sign]
            near = np.abs(some - 1) <= reach
            axis.plot(some[near], losses(some[near]), ".", color=ORANGE, markersize=6)
            if beyond := int((~near).sum()):
                name += f"\n({beyond} of {len(some)} tokens beyond the frame, up to {some.max():.3g})"
        axis.set(title=name, xlabel="ratio")
    axes[0, 0].set_ylabel("loss")
    return figure


def before_after(numbers):
    """{name: (before, after)} of the same prompts: a panel each, a dot a prompt, above the diagonal where it went up."""
    figure, axes = new_figure(1, len(numbers), size=(4.2 * len(numbers), 4))
    for axis, (name, pair) in zip(axes[0], numbers.items()):
        before, after = map(as_array, pair)
        low, high = min(before.min(), after.min()), max(before.max(), after.max())
        up = after > before
        axis.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle=":")
        axis.plot(before[up], after[up], "o", color=BLUE, markersize=5, alpha=0.7, label="went up")
        axis.plot(before[~up], after[~up], "s", color=ORANGE, markersize=5, alpha=0.8, label="did not")
        axis.set(title=f"{name}\n{up.sum()} of {len(up)} went up", xlabel="before", ylabel="after")
    legend(figure)
    return figure


def running_mean(numbers, width=4):
    """The mean of each number and up to `width` - 1 before it, as long as the series itself."""
    sums, ends = np.cumsum([0.0, *numbers]), np.arange(len(numbers)) + 1
    return (sums[1:] - sums[np.maximum(ends - width, 0)]) / np.minimum(ends, width)


def frontier(groups, x="kl", y="gold", labels=("KL (nats a response)", "gold"), width=4, budgets=()):
    """The paths of several runs, {name: [run, run, ...]}, over the plane of KL and gold: a panel a group, all on the same axes and
    over the pale paths of all others, running means of `width` steps, with a mark where each run ends and a line at each of
    `budgets`. Distance is laid out as the square root of KL, as in Gao et al. 2023 (arXiv:2210.10760)."""
    smooth = lambda run: [running_mean([row[key] for row in run], width) for key in (x, y)]
    paths = {name: [smooth(run) for run in runs] for name, runs in groups.items()}
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = new_figure(rows, columns, size=(max(6.4, 3.2 * columns), 2.6 * rows + 0.4), sharex=True, sharey=True)
    far = max(path[0].max() for some in paths.values() for path in some)
    ticks = [tick for tick in (0, 2, 8, 20, 50, 100, 200, 400) if tick <= max(2, 1.1 * far)]
    for axis, name in zip(axes.flat, paths):
        axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        for path in paths[name]:
            axis.plot(*path, color=BLUE, linewidth=1.4)
            axis.plot(path[0][-1], path[1][-1], "o", color=RED, markersize=6)
        for path in [path for other in paths if other != name for path in paths[other]]:
            axis.plot(*path, color=GREY, linewidth=0.6, alpha=0.3, zorder=0)
        for budget in budgets:
            axis.axvline(budget, color=GREY, linewidth=1, linestyle="--")
        axis.set_title(name)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
    for axis in axes.flat[len(paths) :]:
        axis.set_visible(False)
    figure.supxlabel(labels[0] + ", spaced by its square root; dot: where a run ends", fontsize=TEXT)
    figure.supylabel(labels[1], fontsize=TEXT)
    return figure


def stacked_bars(table, label):
    """One horizontal bar for each row of a DataFrame, its columns stacked, the total at its end."""
    figure, axes = new_figure(size=(7.6, 0.48 * len(table) + 1.2))
    axis, left = axes[0, 0], np.zeros(len(table))
    for colour, name in zip((BLUE, ORANGE, GREEN, RED, GREY), table.columns):
        axis.barh(table.index, table[name], left=left, color=colour, label=name, height=0.65)
        left += table[name].to_numpy()
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:.0f}", va="center", fontsize=TEXT)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    legend(figure)
    return figure
