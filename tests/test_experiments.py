"""The experiments: their logs, what is missing, and that the page says what the logs say."""

import hashlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_helpers.config import CPU
from rlhf_helpers.course import experiments, runs
from rlhf_helpers.course.gold import gold_reward
from rlhf_helpers.course.variants import ADVANTAGES, CHANGES
from rlhf_helpers.data import load_preferences, load_prompts
from rlhf_helpers.errors import InputError
from rlhf_helpers.reward import ensure_reward_model
from tools import experiments as page
from tools.reward_on_test_pairs import accuracies, with_other_prompts

ROOT = Path(__file__).resolve().parent.parent
STEP = dict(kl=0.5, explained=None, prompts=["What is tea?"], texts=["Tea is a drink."], scores=[0.25], kls=[0.5])


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project with two dev prompts."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts_heldout.jsonl").write_text('{"prompt": "What is tea?"}\n{"prompt": "What is rain?"}\n')
    monkeypatch.setenv("RLHF_HOME", str(tmp_path))
    return tmp_path


def after(responses, rewards):
    return dict(split="dev", responses=responses, rewards=rewards, kl=[1.0, 3.0] * (len(responses) // 2))


def test_a_log_keeps_every_text_and_judges_it_when_it_is_read(home):
    run = experiments.Run("recipes", "one", 100)
    texts = ["Tea is a warm drink.", "Rain is wet."]
    runs.write_log(experiments.log_file(run), dict(condition="one", seed=100), [STEP, STEP], after(texts, [1.0, 0.0]))
    (log,) = runs.logs_of("recipes", "one")
    assert log.judged == ["What is tea?", "What is rain?"] and log.kl == 2.0 and log.whole == 1.0
    assert log.gold.tolist() == [gold_reward(prompt, text) for prompt, text in zip(log.judged, texts)] == [2.5, 1.5]
    assert log.course_of("gold").tolist() == [1.5, 1.5] and log.course_of("score").tolist() == [0.25, 0.25]
    assert np.isnan(log.course_of("explained")).all() and log.course_of("kl").tolist() == [0.5, 0.5]


def test_the_same_log_is_the_same_file(home):
    for name in ("a", "b"):
        runs.write_log(home / f"{name}.jsonl.gz", dict(seed=1), [STEP], after(["x", "y"], [0.0, 0.0]))
    assert (home / "a.jsonl.gz").read_bytes() == (home / "b.jsonl.gz").read_bytes()


def test_a_run_is_missing_until_its_log_is_there(home, monkeypatch):
    some = [experiments.Run("headline", "frozen", seed) for seed in (0, 1)]
    monkeypatch.setitem(experiments.EXPERIMENTS, "headline", some)
    assert experiments.missing("headline") == some
    runs.write_log(experiments.log_file(some[0]), dict(seed=0), [], after(["x", "y"], [0.0, 0.0]))
    assert experiments.missing("headline") == some[1:]


def test_the_parts_of_an_experiment_are_all_of_it_whatever_is_made(home, monkeypatch):
    runs_of_it = [experiments.Run("prices", "one", seed) for seed in range(5)]
    monkeypatch.setitem(experiments.EXPERIMENTS, "prices", runs_of_it)
    assert experiments.missing("prices", 1, 2) == runs_of_it[::2] and experiments.missing("prices", 2, 2) == runs_of_it[1::2]
    runs.write_log(experiments.log_file(runs_of_it[0]), dict(seed=0), [], after(["x", "y"], [0.0, 0.0]))
    assert experiments.missing("prices", 2, 2) == runs_of_it[1::2]


@pytest.mark.parametrize("text", ["3/2", "0/2", "1", "a/b"])
def test_a_part_that_is_none_is_refused_in_one_sentence(text, monkeypatch, capsys):
    script = ROOT / "data" / "make_runs.py"
    monkeypatch.setattr("sys.argv", [str(script), "--all", "--part", text])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 2 and f"'{text}' is no part" in capsys.readouterr().err


def test_a_condition_that_no_experiment_has_is_refused_in_one_sentence(monkeypatch, capsys):
    script = ROOT / "data" / "make_runs.py"
    monkeypatch.setattr("sys.argv", [str(script), "--only", "dpo", "--conditions", "beta_0.1", "beta_2"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--conditions: 'beta_2' is no condition here" in said and "beta_0.03" in said


def test_another_judge_scores_what_was_written_and_leaves_the_rest(home, monkeypatch, capsys):
    rescore = runpy.run_path(ROOT / "data" / "make_runs.py")["rescore"]
    path, folder = home / "data" / "runs" / "headline" / "frozen_seed0.jsonl.gz", home / "judge"
    runs.write_log(path, dict(condition="frozen", seed=0), [STEP], after(["x", "yy"], [0.0, 0.5]))
    folder.mkdir(), (folder / "weights").write_text("1")
    lengths = lambda prompts, texts: np.array([len(text) for text in texts], dtype=float)
    monkeypatch.setattr("rlhf_helpers.reward.RewardModel.load", lambda folder: lengths)
    was = runs.read_log(path)
    rescore(folder)
    log = runs.read_log(path)
    assert log.rewards.tolist() == [1.0, 2.0] and "moved by up to 1.500" in capsys.readouterr().out
    assert log.after.pop("judge") and (log.head, log.steps) == (was.head, was.steps)
    assert log.after | dict(rewards=0) == was.after | dict(rewards=0)
    rescore(folder)
    assert capsys.readouterr().out == ""  # all have this judge


def test_a_new_judge_scores_the_untrained_model_too_and_gains_are_by_one(home, monkeypatch, capsys):
    judged_too = runpy.run_path(ROOT / "data" / "make_runs.py")["judged_too"]
    path, folder = home / "data" / "runs" / "base" / "dev_seed0.jsonl.gz", home / "judge"
    runs.write_log(
        path, dict(experiment="base", condition="dev", seed=0), [], after(["x", "yy"], [5.0, 6.0]) | dict(judge="old")
    )
    folder.mkdir(), (folder / "weights").write_text("1")
    monkeypatch.setattr(
        "rlhf_helpers.reward.RewardModel.load",
        lambda folder: lambda prompts, texts: np.array([len(text) for text in texts], dtype=float),
    )
    judged_too(folder)
    base = runs.read_log(path)
    (judge,) = base.after["other_judges"]
    assert base.rewards.tolist() == base.rewards_by("old").tolist() == [5.0, 6.0] and base.rewards_by(judge).tolist() == [
        1.0,
        2.0,
    ]
    gained = lambda by: page.gain(runs.Log({}, [], after(["xxx", "yyy"], [3.0, 3.0]) | dict(judge=by)), "rewards").tolist()
    assert gained(judge) == [2.0, 1.0] and gained("old") == [-2.0, -3.0]
    assert judge in capsys.readouterr().out
    judged_too(folder)
    assert capsys.readouterr().out == ""  # it has
    with pytest.raises(InputError, match="base/dev: not scored by the reward model unknown; expected one of old, "):
        gained("unknown")


def test_a_killed_change_of_judges_leaves_logs_that_can_be_read(home, monkeypatch):
    """It goes through the runs first, and ends with the untrained model, which until then has both judges."""
    rescore = runpy.run_path(ROOT / "data" / "make_runs.py")["rescore"]
    kept, folder = dict(experiment="base", condition="dev", seed=0), home / "judge"
    runs.write_log(home / "data/runs/base/dev_seed0.jsonl.gz", kept, [], after(["x", "yy"], [5.0, 6.0]) | dict(judge="old"))
    for name in ("a", "z"):
        path = home / "data" / "runs" / name / "one_seed0.jsonl.gz"
        runs.write_log(path, dict(condition="one", seed=0), [], after(["xxx", "yyy"], [3.0, 3.0]) | dict(judge="old"))
    folder.mkdir(), (folder / "weights").write_text("1")
    asked = []

    def lengths(prompts, texts):
        asked.append(texts)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return np.array([len(text) for text in texts], dtype=float)

    monkeypatch.setattr("rlhf_helpers.reward.RewardModel.load", lambda folder: lengths)
    with pytest.raises(KeyboardInterrupt):
        rescore(folder)
    gains = lambda name: page.gain(*runs.logs_of(name), "rewards").tolist()
    assert gains("a") == [2.0, 1.0] and gains("z") == [-2.0, -3.0]
    rescore(folder)
    assert gains("a") == gains("z") == [2.0, 1.0] and "other_judges" not in runs.logs_of("base")[0].after


def test_a_judge_that_is_none_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    script = ROOT / "data" / "make_runs.py"
    monkeypatch.setattr("sys.argv", [str(script), "--rescore", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 2 and "argument --rescore: " in capsys.readouterr().err


def test_what_a_log_gained_is_by_one_reward_model():
    """Rewards by two of them cannot be compared: training it again moves single scores by up to half a deviation. So whoever judged
    a run judged the untrained model, too; and the headline, which stands beside best of n in reward, has its judge."""
    for name in experiments.EXPERIMENTS:
        for log in runs.logs_of(name):
            judge, base = log.after["judge"], page.base(log.after["split"])
            assert judge and len(base.rewards_by(judge)) == len(base.rewards), log.head
            assert judge == base.after["judge"] or name not in ("base", "headline")


def test_every_run_has_settings_that_exist_and_a_name_of_its_own():
    every = [run for some in experiments.EXPERIMENTS.values() for run in some]
    assert len({run.name for run in every}) == len(every)
    for run in every:
        CPU.ppo_config(**run.settings, seed=run.seed)
        assert run.advantages in ADVANTAGES and (run.change is None or run.change in CHANGES)
        assert run.split == "test" or run.seed >= 100 or run.experiment == "base"  # dev is for choosing: seeds from 100
        assert run.split == "dev" or run.seed < 100


def test_gains_are_against_the_untrained_model_prompt_by_prompt(home):
    head = dict(condition="dev", seed=0)
    runs.write_log(
        experiments.log_file(experiments.Run("base", "dev", 0)), head, [], after(["a", "b", "c", "d"], [0.0, 1.0, 2.0, 4.0])
    )
    log = runs.Log({}, [], after(["a", "b"], [1.0, 5.0]))
    assert page.gain(log, "rewards").tolist() == [0.5, 2.0]


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_the_pages_say_what_the_logs_say(path):
    """`python tools/experiments.py` writes them."""
    text = path.read_text(encoding="utf-8")
    assert "<!-- end -->" in text and page.filled(text) == text


def test_every_experiment_with_logs_has_its_figure_on_the_page():
    text = page.PAGE.read_text(encoding="utf-8")
    for name in page.DRAWN:
        drawn = (page.PAGE.parent / "figures" / f"{name}.svg").is_file()
        assert drawn == bool(runs.logs_of(name)) == (f"(figures/{name}.svg)" in text), name


@pytest.mark.skipif(sys.platform != "linux", reason="other systems round the last digit of a path otherwise")
def test_the_figures_show_what_the_logs_say(tmp_path):
    page.draw(tmp_path)
    stored = {file.name: file.read_bytes() for file in (page.PAGE.parent / "figures").glob("*.svg")}
    assert {file.name for file in tmp_path.iterdir() if file.read_bytes() != stored.get(file.name)} == set()


def test_the_logs_are_small_enough_for_a_repository():
    files = list((page.HERE.parent / "data" / "runs").rglob("*"))
    assert sum(file.stat().st_size for file in files if file.is_file()) < 15e6


def test_logs_of_the_course_are_of_its_prompts_and_whole():
    for name in experiments.EXPERIMENTS:
        for log in runs.logs_of(name):
            prompts = load_prompts(page.HERE.parent / runs.SPLITS[log.after["split"]])
            assert len(log.after["responses"]) == len(log.after["rewards"]) == len(log.after["kl"])
            assert len(log.after["responses"]) % len(prompts) == 0, log.head
            json.dumps(log.steps, allow_nan=False)
            if name not in ("samplers", "dpo", "recipes_on_a_card"):  # on-policy to the last bit
                assert max((row["sampler_max_diff"] for row in log.steps), default=0.0) == 0.0


def test_the_prompts_are_those_that_the_logs_answer():
    """A log keeps answers without their prompts: another order would judge every one by the annotator's rule anew."""
    digest = lambda split: hashlib.sha256((page.HERE.parent / runs.SPLITS[split]).read_bytes()).hexdigest()[:16]
    assert {split: digest(split) for split in runs.SPLITS} == dict(dev="a5cbe8c4a1f35efb", test="07e354cae13a968f")


def test_no_test_pair_keeps_its_prompt_when_another_is_asked_for():
    pairs = load_preferences(ROOT / "data" / "pairwise_prefs_test.jsonl")
    moved = with_other_prompts(pairs)
    assert len(moved) == len(pairs) and not any(a["prompt"] == b["prompt"] for a, b in zip(pairs, moved))
    assert all(a["chosen"] == b["chosen"] and a["rejected"] == b["rejected"] for a, b in zip(pairs, moved))


@pytest.mark.slow
def test_the_course_s_reward_model_ranks_the_test_pairs_and_reads_the_prompt():
    model, other, *yardsticks = (accuracy for accuracy, _ in accuracies(ensure_reward_model()).values())
    assert model >= 0.85 and model - other >= 0.15
    *blind, parts = yardsticks  # the last knows two parts of the annotator's rule
    assert len(blind) == 2 and model > max(blind) and model > parts - 0.05
