"""Runs side by side: who is compared with whom, what is called a tie, and what the plane shows."""

import numpy as np
import pytest

from rlhf_helpers.course import compare, experiments, runs
from rlhf_helpers.intervals import mean_interval, two_level_interval

TEXTS = ["Tea is a warm drink.", "Rain is wet."]  # gold 2.5 and 1.5


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project with two test prompts and the untrained model's answers to them, four each."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts_test.jsonl").write_text('{"prompt": "What is tea?"}\n{"prompt": "What is rain?"}\n')
    monkeypatch.setenv("RLHF_HOME", str(tmp_path))
    write("base", "test", 0, ["a"] * 8, [0.0, 1.0, 2.0, 3.0] * 2, kl=0.0)
    return tmp_path


def write(experiment, condition, seed, texts=TEXTS, rewards=(2.0, 2.0), kl=4.0):
    after = dict(split="test", responses=texts, rewards=list(rewards), kl=[kl] * len(texts))
    head = dict(experiment=experiment, condition=condition, seed=seed)
    runs.write_log(experiments.log_file(experiments.Run(experiment, condition, seed)), head, [], after)


def test_a_condition_is_compared_with_all_runs_of_the_frozen_recipe(home):
    write("headline", "frozen", 0, ["a", "a"])
    write("headline", "frozen", 7)  # a seed that the other has not
    write("advantages", "leave_one_out", 0)
    (row,) = compare.rows("advantages")
    assert dict(zip(compare.COLUMNS, row))["seeds"] == 1 and row[4] == "+1.00: one seed decides nothing"  # 2 - (0 + 2) / 2


def test_two_seeds_whose_gains_agree_are_told_apart_from_the_frozen_recipe_s(home):
    write("headline", "frozen", 0, ["a", "a"]), write("headline", "frozen", 1, ["a", "a"])
    for seed in (3, 4):
        write("advantages", "leave_one_out", seed, ["Tea is a warm drink.", "Rain is warm."])
    (row,) = compare.rows("advantages")
    assert row[4] == "+2.50 (+2.50 to +2.50)"
    write("headline", "frozen", 2)  # 1.5 and 2.5, where the others have 0
    gold = np.array([[0.0, 0.0], [0.0, 0.0], [2.5, 1.5]])
    said = compare.rows("advantages")[0][4]
    assert said == compare.verdict(np.full((2, 2), 2.5), gold) and said.startswith("+1.83 (-1.") and said.endswith("): a tie")


def test_how_far_runs_went_is_compared_in_factors():
    assert compare.times([8.0, 8.0, 8.0], [2.0, 2.0]) == "x 4.00 (4.00 to 4.00)"
    said = compare.times([65.0, 154.0, 204.0], [9.0, 10.0, 12.0])
    assert said.startswith("x 12.37 (3.1") and "tie" not in said
    assert compare.times([2.0, 8.0], [4.0, 4.0]).endswith(": a tie")
    assert compare.times([8.0], [2.0, 2.0]) == compare.times([8.0, 8.0], [2.0]) == "x 4.00: one seed decides nothing"
    assert compare.times([0.0, -0.1, 0.0], [1.0, 1.0, 1.0]) == "x 0.01 (0.01 to 0.01)"


def test_what_was_reached_is_said_of_what_has_logs(home):
    """The untrained model's eight answers, "a", have no gold and rewards 0 to 3; of four draws the best has 3."""
    untrained, whole, best = compare.reached()
    assert untrained == ["the untrained model", "0.00", "", "1.50", "0", "1"]
    assert whole[3:] == ["1.50", "", "5.0"]  # none is whole: all are kept, and 1 / the share stays finite
    assert best == ["its best of 4", "0.00", "+0.00 (+0.00 to +0.00)", "3.00", "at most 0.64", "4"]
    write("headline", "frozen", 0), write("headline", "frozen", 1, kl=6.0)
    ppo = compare.reached()[3]
    assert ppo == ["**PPO**, the frozen recipe, 2 seeds", "2.00", "+2.00 (-4.35 to +8.35)", "2.00", "5.0 (4.0 to 6.0)", "1"]


def test_of_one_run_an_interval_is_over_its_prompts_by_bootstrap():
    values = np.array([[0.0, 1.0, 4.0, 9.0]])
    assert compare.over(values) == mean_interval(values[0]) != two_level_interval(values)


def test_the_objective_is_the_reward_gained_less_the_price_of_the_kl(home):
    write("headline", "frozen", 0, rewards=(2.0, 3.0), kl=4.0)
    (log,) = runs.logs_of("headline")
    assert compare.net(log, 0.0).tolist() == compare.gain(log, "rewards").tolist() == [0.5, 1.5]
    assert compare.net(log, 0.25).tolist() == [-0.5, 0.5]


def test_drawing_until_an_answer_is_whole_keeps_the_whole_ones_and_all_where_there_is_none(home):
    write("headline", "frozen", 0, ["Tea is", "Tea is warm.", "It is.", "a", "b", "c", "d", "e"], range(8))
    (log,) = runs.logs_of("headline")
    assert compare.drawn_until_whole(log, log.rewards).tolist() == [1.5, 5.5]  # of 0 to 3 the two whole ones; of 4 to 7 all


def test_the_frozen_recipe_is_not_compared_with_itself(home):
    write("dpo", "beta_1", 3)
    assert compare.rows("dpo")[0][4] == ""  # nothing to compare it with
    write("headline", "frozen", 0)
    frozen, other = compare.rows("headline", "dpo")
    assert frozen[0] == "frozen" and frozen[4] == "" and other[4] == "+0.00: one seed decides nothing"
    assert frozen[2].startswith("+0.50") and frozen[5:] == ["4.0", "100%"]


def test_a_difference_with_0_in_its_interval_is_a_tie_and_one_seed_gives_no_verdict():
    apart = lambda *means: np.array(means)[:, None] + np.zeros((len(means), 30))
    assert compare.verdict(apart(0.5, 0.6, 0.5, 0.6)).startswith("+0.55 (")
    assert "tie" not in compare.verdict(apart(0.5, 0.6, 0.5, 0.6))
    assert compare.verdict(apart(0.5, -0.6, 0.5)).endswith("a tie")
    assert compare.verdict(apart(0.5)) == "+0.50: one seed decides nothing"


def test_what_is_listed_and_has_no_log_is_said_to_be_missing(home):
    assert compare.rows("advantages") == [] and compare.not_made("advantages") == {"advantages": "30 of 30 runs"}
    write("advantages", "batch_mean", 0)
    assert compare.not_made("advantages", "headline") == {"advantages": "29 of 30 runs", "headline": "10 of 10 runs"}
    for run in experiments.EXPERIMENTS["headline"]:
        write("headline", run.condition, run.seed)
    assert compare.not_made("headline") == {}


def test_the_plane_has_a_dot_for_every_run_and_best_of_n_as_a_line(home):
    assert compare.plane("headline") is None
    write("headline", "frozen", 0), write("headline", "frozen", 1, kl=9.0)
    legend_of = lambda figure: [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend_of(compare.plane("headline")) == ["best of n", "frozen"]
    write("dpo", "beta_1", 0, ["a", "a"], kl=1.0)
    axis = compare.plane("headline", "dpo", names={"frozen": "value head"}).axes[0]
    dots = {scatter.get_label(): scatter.get_offsets().tolist() for scatter in axis.collections}
    assert dots == {"value head": [[2.0, 2.0], [3.0, 2.0]], "beta_1": [[1.0, 0.0]]}
    assert [text.get_text() for text in axis.texts] == ["untrained", "n = 2", "n = 4"]
    assert len(axis.lines[0].get_xdata()) == 3
    assert legend_of(axis.figure) == ["best of n", "value head", "beta_1"]
    alone = compare.plane("dpo").axes[0].collections[0]  # a method has one colour and one shape, whatever stands beside it
    assert (alone.get_facecolor() == axis.collections[1].get_facecolor()).all()
    assert (alone.get_paths()[0].vertices == axis.collections[1].get_paths()[0].vertices).all()
    one = compare.plane("headline", "dpo", names=dict.fromkeys(("frozen", "beta_1"), "all"), marks={"beta_1": "1"}).axes[0]
    assert [len(scatter.get_offsets()) for scatter in one.collections] == [3]  # one word, one colour
    assert [(text.get_text(), text.xy) for text in one.texts if text.get_text() == "1"] == [("1", (1.0, 0.0))]
    shaped = compare.plane(
        "headline", "dpo", names={"beta_1": "dear", "frozen": "free"}, shapes={"frozen": "slow", "beta_1": "fast"}
    )
    assert legend_of(shaped) == ["best of n", "dear", "free", "fast", "slow"]  # colours in the order of names, then the shapes
    places = [scatter.get_offsets().tolist() for scatter in shaped.axes[0].collections if len(scatter.get_offsets())]
    assert places == [[[1.0, 0.0]], [[2.0, 2.0]], [[3.0, 2.0]]]
