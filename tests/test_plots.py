"""Plots: what stands in a table or a figure is what was in the rollout."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread

from rlhf_helpers.config import CPU
from rlhf_helpers.course import plots, run_figures
from rlhf_helpers.stats import as_array
from tests import tiny
from tests.tiny import batch, with_lora


@pytest.fixture(scope="module")
def trainer():
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.3))
    for seed in range(3):
        trainer.step(*batch(seed=seed))
    return trainer


def pixels(figure):
    return imread(io.BytesIO(plots.png(figure)))


def test_a_token_table_has_a_line_for_every_token_and_its_numbers(trainer):
    rollout = trainer.rollout
    for row, n in enumerate(rollout.lengths.tolist()):
        table = plots.token_table(trainer.tokenizer, rollout, row)
        assert table["token"].tolist() == [f"t{i}" for i in rollout.response_ids[row, :n].tolist()]
        assert table["advantage"].tolist() == rollout.advantages[row, :n].tolist()
        assert np.allclose(table["logprob"] - table["ref"], table["kl"])
    assert table["reward"].iloc[-1] == rollout.rewards[row, n - 1].item()


def test_a_ratio_may_stand_beside(trainer):
    table = plots.token_table(trainer.tokenizer, trainer.rollout, 1, ratio=np.arange(8.0))
    assert table["ratio"].tolist() == [0.0, 1.0, 2.0]  # the response has three tokens


def test_white_space_is_made_visible():
    assert plots.visible(" a\n\tb") == "·a⏎⇥b"


def test_a_heat_map_has_a_panel_for_every_signal_with_every_token(trainer):
    figure = plots.token_heatmap(trainer.tokenizer, trainer.rollout, row=2, signals=("kl", "rewards"), per_line=3)
    panels = [axis for axis in figure.axes if axis.images and axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in panels] == [
        plots.TITLES["kl"],
        f"-β KL (points); on the last token the score of {trainer.rollout.scores[2]:+.2f} comes on top",
    ]
    for axis in panels:
        assert [text.get_text() for text in axis.texts] == plots.token_strings(trainer.tokenizer, trainer.rollout.responses[2])
        assert axis.images[0].get_array().shape == (3, 3)  # eight tokens in lines of three
    assert pixels(figure).std() > 0.05


def test_a_heat_map_of_ratios_is_centred_at_1(trainer):
    ratio = np.linspace(0.5, 1.5, trainer.rollout.mask.shape[1])
    figure = plots.token_heatmap(trainer.tokenizer, trainer.rollout, row=2, signals=(), per_line=9, ratio=ratio)
    drawn = figure.axes[0].images[0].get_array().compressed()
    assert np.allclose(drawn[: len(trainer.rollout.responses[2])], (ratio - 1)[: len(trainer.rollout.responses[2])])


def test_the_colours_of_a_signal_mean_the_same_in_every_response(trainer):
    scales = set()
    for row in range(len(trainer.rollout)):
        figure = plots.token_heatmap(trainer.tokenizer, trainer.rollout, row, signals=("advantages",))
        norm = figure.axes[0].images[0].norm
        scales.add((norm.vmin, norm.vmax))
    ((low, high),) = scales
    every = trainer.rollout.advantages[trainer.rollout.mask].abs()
    assert low == -high and every.median() < high <= every.max()


def test_rewards_are_drawn_without_the_score_which_would_drown_the_price_of_kl(trainer):
    rollout = trainer.rollout
    figure = plots.token_heatmap(trainer.tokenizer, rollout, row=2, signals=("rewards",), per_line=4)
    drawn = figure.axes[0].images[0].get_array().compressed()
    assert np.allclose(drawn, as_array(rollout.non_score_rewards[2][rollout.mask[2]]))
    assert abs(rollout.scores[2]) > 0.01 and abs(drawn[-1] - rollout.rewards[2][rollout.mask[2]][-1].item()) > 0.01


def test_colours_that_end_before_the_numbers_do_say_so():
    figure, axes = plots.new_figure()
    plots.draw_tokens(figure, axes[0, 0], ["a"] * 100, np.array([*np.linspace(-1, 1, 99), 50.0]), "kl")
    assert axes[0, 0].images[0].norm.vmax < 2 and axes[0, 0].images[0].colorbar.extend == "both"
    figure, axes = plots.new_figure()
    plots.draw_tokens(figure, axes[0, 0], ["a", "b"], np.array([0.0, 50.0]), "reward", every=np.array([0.0] * 99 + [50.0]))
    assert axes[0, 0].images[0].norm.vmax == 50 and axes[0, 0].images[0].colorbar.extend == "neither"
    figure, axes = plots.new_figure()
    plots.draw_tokens(figure, axes[0, 0], ["a", "b"], np.array([0.5, 9.0]), "ratio - 1", every=np.array([0.5, 0.5]))
    assert axes[0, 0].images[0].norm.vmax == 0.5 and axes[0, 0].images[0].colorbar.extend == "max"


def test_a_signal_of_zeros_and_text_that_looks_like_mathematics_can_be_drawn():
    figure, axes = plots.new_figure()
    plots.draw_tokens(figure, axes[0, 0], ["$", "$x_1", "\\alpha$"], np.zeros(3), "kl")
    assert pixels(figure).ndim == 3


def test_curves_show_each_stat_over_its_steps(trainer):
    figure = plots.training_curves(trainer.history)
    for axis, key in zip(figure.axes, plots.CURVES):
        line, smooth = axis.lines
        numbers = [row[key] for row in trainer.history]
        assert line.get_xdata().tolist() == smooth.get_xdata().tolist() == [1, 2, 3]
        assert line.get_ydata().tolist() == numbers and np.allclose(smooth.get_ydata(), plots.running_mean(numbers, 4))


def test_several_runs_share_the_panels(trainer):
    figure = plots.training_curves({"one": trainer.history, "two": trainer.history[:2]}, title="Two runs")
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3, 3, 2, 2]
    assert named(figure) == ["one", "two"]


def named(figure):
    """The words of a figure's legend."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_limits_are_drawn_where_the_run_has_them(trainer):
    limits = plots.limits_of(CPU.ppo_config(kl_budget=7.0, max_grad_norm=None))
    assert limits == {"tokens/responses_len_mean": 64, "objective/kl": 7.0}
    figure = plots.training_curves(trainer.history, limits=limits | {"ppo/loss/value": float("inf")})
    drawn = {axis.get_title(): [line.get_ydata()[0] for line in axis.lines[2:]] for axis in figure.axes}
    assert drawn["KL (nats a response)"] == [7.0] and drawn["response length (tokens)"] == [64]
    assert drawn["gradient norm"] == drawn["value loss"] == []
    live = plots.LiveCurves(1)
    live.drawn = float("inf")  # nothing is to be drawn
    with live:
        live(trainer, {})
        live.history = []
    assert live.limits == plots.limits_of(trainer.config)


@pytest.mark.parametrize("make", ["curves", "changes", "histograms", "before_after", "over_steps", "bars"])
def test_no_legend_lies_on_the_data(trainer, make):
    rows = [{"proxy": 1.0, "gold": 0.0}, {"proxy": 3.0, "gold": 1.0}]
    figure = {
        "curves": lambda: plots.training_curves({"one": trainer.history, "two": trainer.history}, title="Two runs"),
        "changes": lambda: plots.logprob_changes(np.linspace(-2, 2, 80), np.zeros(80), np.linspace(-1, 1, 80)),
        "histograms": lambda: plots.histograms({"before": [0.0, 1.0], "after": [2.0, 4.0]}, "score"),
        "before_after": lambda: plots.before_after({"reward": ([0.0, 1.0], [1.0, 0.5]), "gold": ([0.0, 2.0], [1.0, 2.5])}),
        "over_steps": lambda: run_figures.over_steps({"a": [rows], "b": [rows]}, {"proxy": "proxy", "gold": "gold"}),
        "bars": lambda: plots.stacked_bars(pd.DataFrame({"x": [1.0, 2.0], "y": [2.0, 1.0]}, index=["a", "b"]), "MB"),
    }[make]()
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width  # it is on the figure, and on no panel
    assert not [axis for axis in figure.axes if box.overlaps(axis.get_window_extent())]


def test_curves_of_nothing_are_empty_panels():
    assert all(len(axis.lines[0].get_xdata()) == 0 for axis in plots.training_curves([]).axes)


@pytest.fixture
def page(monkeypatch):
    """Two lists: the alternative texts of the outputs on the page, and those of the updates of them."""
    shown, updates = [], []
    handle = type("Handle", (), dict(update=lambda self, image: updates.append(image.alt)))()
    monkeypatch.setattr(plots, "show", lambda figure, alt, *options, **more: shown.append(alt) or handle)
    return shown, updates


def drawings(trainer, every, times):
    """The titles that live curves draw when a step ends at each of these times; the clock began at the first of them."""
    titles, now = [], [times[0]]
    live = plots.LiveCurves(steps=len(times) - 1, every=every, clock=lambda: now[0])
    draw = live.draw
    live.draw = lambda title: (titles.append(title), draw(title))
    with live:
        for now[0] in times[1:]:
            live(trainer, {})
    return live, titles


def test_live_curves_use_one_output_and_draw_at_most_every_few_seconds(trainer, page):
    shown, updates = page
    live, titles = drawings(trainer, every=5, times=[100, 103, 106, 107.9, 108, 114])
    assert [title[:6] for title in titles] == ["step 1", "step 4", "step 5", "5 of 5"]
    assert len(shown) == 1 and updates == shown * 3
    assert live.history == trainer.history


@pytest.mark.parametrize("began", [0, 1e9], ids=["a clock that begins with the machine", "one that began long ago"])
def test_live_curves_draw_the_first_step_at_once_and_the_last_state_at_the_end(trainer, page, began):
    _, titles = drawings(trainer, every=3600, times=[began, began + 60, began + 120, began + 180])
    assert titles == ["step 1 of 3, about 2.0 min left", "3 of 3 steps in 3.0 min"]


def test_a_running_mean_counts_what_is_there():
    assert np.allclose(plots.running_mean([4.0, 0.0, 2.0, 6.0], width=3), [4, 2, 2, 8 / 3])


def test_the_frontier_has_a_panel_a_group_with_the_ends_of_its_runs_and_the_budgets():
    run = [{"kl": 0.0, "gold": 1.0}, {"kl": 4.0, "gold": 2.0}, {"kl": 9.0, "gold": 0.5}]
    figure = plots.frontier({"free": [run, run[:2]], "priced": [run[:1]]}, width=1, budgets=(8,))
    assert [axis.get_title() for axis in figure.axes] == ["free", "priced"]
    axis, priced = figure.axes
    ends = lambda axis: [line.get_xydata()[0].tolist() for line in axis.lines if line.get_marker() == "o"]
    assert ends(axis) == [[9.0, 0.5], [4.0, 2.0]] and ends(priced) == [[0.0, 1.0]]
    pale = [line for line in priced.lines if line.get_alpha()]
    assert [line.get_xydata().tolist() for line in pale] == [[[0, 1], [4, 2], [9, 0.5]], [[0, 1], [4, 2]]]
    assert all(panel.lines[-1].get_xdata() == [8, 8] for panel in (axis, priced))
    assert axis.get_xlim() == priced.get_xlim() and axis.get_ylim() == priced.get_ylim()
    place = axis.transData.transform
    assert np.isclose(place((4, 0))[0] - place((0, 0))[0], place((16, 0))[0] - place((4, 0))[0])  # spaced by the square root


def test_histograms_share_their_bins_and_mark_the_means():
    figure = plots.histograms({"before": [0.0, 1.0], "after": [2.0, 4.0]}, "score", bins=4)
    (axis,) = figure.axes
    assert [patch.get_x() for patch in axis.patches][:4] == [0.0, 1.0, 2.0, 3.0]
    assert [line.get_xdata()[0] for line in axis.lines] == [0.5, 3.0]


def test_the_clipped_objective_is_flat_beyond_the_range_where_the_step_was_wanted():
    good, bad = plots.clipped_objective(cliprange=0.2).axes
    x, y = good.lines[0].get_data()
    assert np.allclose(y[x >= 1.2], -1.2) and np.allclose(y[x <= 1.2], -x[x <= 1.2])
    x, y = bad.lines[0].get_data()
    assert np.allclose(y[x <= 0.8], 0.8) and np.allclose(y[x >= 0.8], x[x >= 0.8])


def test_an_outlier_does_not_stretch_the_clipped_objective_but_is_counted():
    ratios, advantages = np.array([0.9, 1.1, 7.0, 1.2]), np.array([1.0, 1.0, 1.0, -1.0])
    good, bad = plots.clipped_objective(0.2, ratios, advantages).axes
    assert (
        good.get_xlim()[1] < 2.2
        and "1 of 3 tokens beyond the frame, up to 7" in good.get_title()
        and "beyond" not in bad.get_title()
    )
    assert [dots.get_xdata().tolist() for dots in (good.lines[-1], bad.lines[-1])] == [[0.9, 1.1], [1.2]]


def test_dots_beyond_the_frame_lie_on_its_edge_and_are_counted():
    change = np.r_[np.linspace(-1, 1, 98), 9.0, -9.0]
    figure = plots.logprob_changes(np.linspace(-2, 2, 100), np.zeros(100), change)
    assert "2 beyond the frame" in named(figure)
    (up,) = [line for line in figure.axes[0].lines if line.get_marker() == "^"]
    (down,) = [line for line in figure.axes[0].lines if line.get_marker() == "v"]
    low, high = figure.axes[0].get_ylim()
    assert low < down.get_ydata()[0] < -1 and 1 < up.get_ydata()[0] < high


def test_on_the_page_letters_are_as_large_as_the_text_and_the_picture_is_sharp(trainer):
    picture = plots.image(plots.training_curves(trainer.history), "some curves")
    pixels = imread(io.BytesIO(picture.data))
    assert pixels.shape[1] == pytest.approx(1.6 * picture.width, abs=1) and picture.alt == "some curves"
    figure, axes = plots.new_figure()
    words = [axes[0, 0].xaxis.label, axes[0, 0].title, *axes[0, 0].get_xticklabels()]
    assert all(12 <= word.get_fontsize() * 100 / 72 <= 16 for word in words)  # px, where an inch is 100


def test_a_figure_is_a_small_png_on_a_white_ground(trainer, tmp_path):
    figure = plots.training_curves(trainer.history)
    plots.save_figure(figure, tmp_path / "curves.png", dpi=80)
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 100_000
    assert np.allclose(pixels(figure)[0, 0, :3], 1)


def test_numbers_are_taken_from_lists_arrays_and_tensors_with_gradients():
    half = torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
    for values in (half, half.tolist(), np.array([0.5, 2.0])):
        assert as_array(values).dtype == float and as_array(values).tolist() == [0.5, 2.0]
