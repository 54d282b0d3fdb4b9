"""Figures of many runs: the fits find the curve that made the points, their intervals say what the data cannot, and lines are where
the numbers are."""

import numpy as np
import pytest

from rlhf_helpers.course import run_figures
from rlhf_helpers.course.gold import gold_reward
from rlhf_helpers.course.runs import Log


@pytest.mark.parametrize(
    "form, curve",
    [("d (α - β log d)", lambda d, a, b: d * (a - b * np.log(d))), ("d (α - β d)", lambda d, a, b: d * (a - b * d))],
)
def test_a_fit_finds_the_curve_that_made_the_points(form, curve):
    d = np.linspace(0.2, 3, 9)
    assert run_figures.fitted(d, curve(d, 0.8, 0.3), form) == pytest.approx([0.8, 0.3])


def test_an_interval_has_the_truth_in_it_and_is_wide_where_runs_are_few_and_short():
    rng = np.random.default_rng(1)
    noisy = lambda far: (d := rng.uniform(0.3, far, 8), d * (0.8 - 0.3 * d) + rng.normal(0, 0.2, 8))
    many, few = ([noisy(far) for _ in range(n)] for n, far in ((40, 3.0), (4, 1.0)))
    (_, alpha), (_, beta) = run_figures.fit_with_interval(many, "d (α - β d)")
    assert alpha[0] < 0.8 < alpha[1] and 0 < beta[0] < 0.3 < beta[1] < 0.5
    _, (_, (low, high)) = run_figures.fit_with_interval(few, "d (α - β d)")
    assert low < 0.3 < high and high - low > 3 * (beta[1] - beta[0])


def test_a_path_starts_at_the_reference_and_its_means_do_not_overlap():
    kl, gold = np.arange(12.0), np.repeat([1.0, 2.0, 4.0], 4)
    d, gains = run_figures.path(kl, gold, start=1.0)
    assert d**2 == pytest.approx([5.5, 9.5]) and gains == pytest.approx([1.0, 3.0])
    assert run_figures.distance(-0.5) == 0


def test_named_seeds_stand_out_and_the_limit_is_drawn():
    runs = {f"seed {n}": [dict(kl=float(n + step)) for step in range(3)] for n in range(4)}
    (axis, *_) = run_figures.of_seeds(runs, {"kl": "KL"}, {"kl": 9.0}, named=("seed 2",), width=2).axes
    drawn = {line.get_color(): line.get_ydata() for line in axis.lines}
    assert list(drawn[run_figures.RED]) == [2.0, 2.5, 3.5] and list(drawn[run_figures.GREY]) == [9.0, 9.0]
    assert [text.get_text() for text in axis.texts] == [" seed 2", "limit 9"]


def test_the_curves_of_gao_end_where_their_points_end():
    groups = [(np.array([0.5, 1.0, 2.0]), np.array([0.4, 0.7, 1.0]) + shift) for shift in (0.0, 0.1)]
    figure = run_figures.gao({"ten runs": (groups, "d (α - β log d)")}, {"ends": ([1.5], [0.9])})
    points, curve, dots, *_ = figure.axes[0].lines
    assert list(points.get_ydata()) == pytest.approx([0.45, 0.75, 1.05]) and list(dots.get_xdata()) == [1.5]
    assert (curve.get_xdata()[0], curve.get_xdata()[-1]) == (0.5, 2.0)
    (alpha, _), (beta, _) = run_figures.fit_with_interval(groups, "d (α - β log d)")
    assert curve.get_ydata()[-1] == pytest.approx(2 * (alpha - beta * np.log(2)))
    with pytest.raises(ValueError, match="a group of 1 points; expected at least 2"):
        run_figures.fit_with_interval([(np.array([1.0]), np.array([0.5]))], "d (α - β d)")


def test_what_is_paid_and_what_is_wanted_are_two_panels_with_a_line_a_run():
    prompt, texts = "Say something about tea.", ["Tea is nice.", "Tea is a thing.", "Rain is nice."]
    step = lambda score, text: dict(scores=[score], prompts=[prompt], texts=[text])
    log = lambda *scores: Log(dict(condition="x", seed=len(scores)), list(map(step, scores, texts)), {})
    paid, wanted = run_figures.paid_and_wanted(
        {"frozen": [log(1.0, 3.0)], "no_price": [log(2.0, 4.0, 6.0), log(0.0, 0.0)]}, width=2
    ).axes
    curves = [list(line.get_ydata()) for line in paid.get_lines()]
    assert curves[:3] == [[1.0, 2.0], [2.0, 3.0, 5.0], [0.0, 0.0]]
    golds = [gold_reward(prompt, text) for text in texts]
    assert golds == [2.5, 1.5, 0.0] and list(wanted.get_lines()[1].get_ydata()) == [2.5, 2.0, 0.75]
    colours = [line.get_color() for line in paid.get_lines()[:3]]
    assert colours == [run_figures.BLUE, run_figures.RED, run_figures.RED]
    assert [text.get_text() for text in paid.get_legend().get_texts()] == ["frozen", "no price"]
    assert [text.get_text() for text in paid.texts] == [" seed 3"]  # of the longest run
    assert not paid.texts[0].get_annotation_clip()  # else a name above the panel would not be drawn


def test_names_of_lines_that_end_close_together_are_moved_apart():
    assert run_figures.apart([5.0, 1.0, 5.1, 5.2], 0.5) == pytest.approx([5.0, 1.0, 5.5, 6.0])
    assert run_figures.apart([], 0.5).size == 0


def test_runs_of_a_group_are_thin_lines_and_their_mean_a_thick_one():
    runs = [[{"proxy": 1.0}, {"proxy": 3.0}], [{"proxy": 3.0}, {"proxy": 5.0}, {"proxy": 9.0}]]
    figure = run_figures.over_steps({"two runs": runs, "one run": runs[:1]}, {"proxy": "proxy"}, width=1)
    *thin, mean = figure.axes[0].lines[:3]
    assert [line.get_ydata().tolist() for line in thin] == [[1, 3], [3, 5, 9]]
    assert mean.get_ydata().tolist() == [2, 4] and mean.get_xdata().tolist() == [1, 2]
    assert mean.get_linewidth() > max(line.get_linewidth() for line in thin)
    assert figure.axes[1].lines[0].get_ydata().tolist() == [1, 3]
    assert figure.axes[0].get_ylabel() == "proxy" and not figure.legends and "thick: the mean" in figure.get_supxlabel()
