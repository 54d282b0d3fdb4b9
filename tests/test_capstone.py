"""The capstone: labels are read or refused in one sentence, runs keep their names to themselves, and points say what they count."""

import html

import numpy as np
import pytest

from rlhf_helpers import doctor
from rlhf_helpers.config import CPU, DATA_FILE, HELDOUT_FILE, TEST_FILE, project_root
from rlhf_helpers.course import capstone, compare, exercises
from rlhf_helpers.course import capstone_exercises as checks
from rlhf_helpers.course.runs import Log
from rlhf_helpers.data import load_preferences, load_prompts
from rlhf_helpers.evaluation import Evaluation
from rlhf_helpers.intervals import mean_interval

PAIRS = capstone.pairs_to_label()
A, B, C = "ABC"


def said(capsys):
    return capsys.readouterr().out.strip()


def log_of(kls, scores=None, texts=("Tea is warm.",), ended=1.0, length=20.0):
    """A Log whose steps have these means."""
    scores = scores or [0.0] * len(kls)
    steps = [
        dict(kl=kl, entropy=1.0, clipped=0.0, value_loss=0.1, length=length, ended=ended, sampler_kl=0.0, skipped=0.0,
             scores=[score - 0.5, score + 0.5], prompts=["What is tea?"] * len(texts), texts=list(texts))
        for kl, score in zip(kls, scores)
    ]  # fmt: skip
    return Log(dict(condition="secret"), steps, dict(split="dev", responses=[], rewards=[], kl=[]))


# ---------------------------------------------------------------- pairs


def test_there_are_50_pairs_on_50_training_prompts_and_the_same_at_every_call():
    assert capstone.pairs_to_label() == PAIRS
    prompts = {pair.prompt for pair in PAIRS}
    assert len(PAIRS) == len(prompts) == 50
    for file in (HELDOUT_FILE, TEST_FILE):
        assert not prompts & set(load_prompts(project_root() / file))


def test_the_stand_in_is_what_the_annotator_chose_and_its_letter_says_nothing():
    shipped = load_preferences(project_root() / DATA_FILE)
    assert all(pair in shipped for pair in capstone.stand_in(PAIRS).preferences(PAIRS))
    assert 15 <= sum(pair.annotator == "a" for pair in PAIRS) <= 35


def test_ten_pairs_are_shown_with_what_was_chosen_marked(capsys):
    shown = capstone.show(PAIRS, 2, "b" + 9 * ".")
    assert said(capsys) == "pairs 11 to 20: 1 of 10 labelled"
    for text in (repr(shown), shown._repr_html_()):
        assert f"11. {PAIRS[10].prompt.split()[0]}" in text and PAIRS[20].prompt not in text
    assert repr(shown).count("-> b:") == shown._repr_html_().count("yours &rarr;") == 1


def test_what_a_model_wrote_is_text_on_the_page():
    pair = capstone.Pair("a < b?", "<script>alert(1)</script>", "& so on", "a")
    assert "<script>" not in capstone.Shown([pair], 1, "")._repr_html_()


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "labels, letters",
    [
        ("", ""),
        (..., ""),
        (None, ""),
        ("abbabaabab", "abbabaabab"),
        ("ABBAB aabab", "abbabaabab"),
        ("abbab\n\taabab ", "abbabaabab"),
        ("abb.b..bab", "abb.b..bab"),
        (list("abbabaabab"), "abbabaabab"),
    ],
)
def test_labels_are_read_through_white_space_and_in_any_case(labels, letters):
    assert checks.letters_of(labels, 1) == (letters, None)


@pytest.mark.parametrize(
    "labels, words",
    [
        ("abbabaaba", "labels[2] has 9 letters; expected 10, one for each of the pairs 11 to 20"),
        ("a" * 49, "labels[2] has 49 letters; expected 10"),
        ("abcab aabab", "labels[2] has 'c' for pair 13; expected a, b, or . for a pair that you leave out"),
        ("abbab1abab", "'1' for pair 16"),
        (7, "labels[2] is 7; expected a string of 10 letters"),
        ([1, 0] * 5, "expected a string"),
    ],
)
def test_bad_labels_are_one_sentence_and_count_for_nothing(labels, words, capsys):
    letters, wrong = checks.letters_of(labels, 2)
    assert letters == "" and words in wrong and "\n" not in wrong
    filled = capstone.filled(PAIRS, {2: labels})
    assert words in said(capsys) and filled == capstone.stand_in(PAIRS)
    assert "yours &rarr;" not in capstone.show(PAIRS, 2, labels)._repr_html_() and words in said(capsys)


def test_what_is_not_labelled_is_filled_and_the_page_says_so(capsys):
    other = "".join("b" if pair.annotator == "a" else "a" for pair in PAIRS)
    labels = capstone.filled(PAIRS, {1: other[:10], 2: other[10:12] + 8 * "."})
    assert said(capsys) == "you labelled 12 of 50; the annotator's noisy choice stands in for the rest"
    assert labels.letters == other[:12] + capstone.stand_in(PAIRS).letters[12:] and sum(labels.own) == 12
    turned = labels.preferences(PAIRS)[0]
    assert (turned["rejected"], turned["chosen"]) == tuple(
        capstone.stand_in(PAIRS).preferences(PAIRS)[0][side] for side in ("chosen", "rejected")
    )
    assert all(capstone.filled(PAIRS, {n + 1: other[10 * n : 10 * n + 10] for n in range(5)}).own)
    assert said(capsys) == "you labelled 50 of 50"


def test_whoever_always_takes_the_longer_answer_agrees_with_length_alone(capsys):
    longer = "".join("a" if len(pair.a.split()) > len(pair.b.split()) else "b" for pair in PAIRS)
    rows = capstone.agreement(PAIRS, capstone.filled(PAIRS, {n + 1: longer[10 * n : 10 * n + 10] for n in range(5)}))
    assert [row["same"] == "100%" for row in rows] == [False, True, False, False, False, False]
    said(capsys)
    capstone.tell_taste("C", rows)
    assert said(capsys).startswith("you said C, it is A")
    capstone.tell_taste("C", [row | {"pairs that differ": 4} for row in rows])
    assert said(capsys).startswith("too few labels to tell")


def test_only_one_s_own_labels_are_compared_where_there_are_some():
    own = capstone.Labels(capstone.stand_in(PAIRS).letters, (True,) * 4 + (False,) * 46)
    assert capstone.agreement(PAIRS, own)[0]["pairs that differ"] == 4
    assert [row["pairs that differ"] for row in capstone.agreement(PAIRS, capstone.stand_in(PAIRS))][:2] == [0, 49]


def test_the_subject_hides_how_often_the_labels_go_along_with_warm_words():
    """Of two answers of which one names its subject the annotator takes that one, however warm the other is."""
    *_, warm, subject, alike = capstone.agreement(PAIRS, capstone.stand_in(PAIRS))
    assert (subject["same"], warm["same"], alike["same"]) == ("100%", "62%", "80%")
    assert alike["pairs that differ"] < warm["pairs that differ"]


# ---------------------------------------------------------------- runs without their names


def test_the_four_runs_are_there_and_do_not_say_what_they_are():
    runs = capstone.blind()
    assert set(runs) == set("ABCD") and set(checks.KEY.values()) == {"healthy", "misled", "bug", "hacked"}
    shown = capstone.samples(runs)
    text, page = repr(shown), shown._repr_html_()
    for log in runs.values():
        assert len(log.steps) >= 10 and log.head["condition"] not in text + page
        assert html.escape(" ".join(log.steps[-1]["texts"][1].split())) in page
    assert text.count("step 1 ") == page.count("step 1 ") == 8 and "C, step 11 " in text  # half-way of 23


def test_the_mended_run_differs_from_the_broken_one_in_that_line_alone():
    broken, mended = capstone.run_named("bug").head, capstone.run_named("mended bug").head
    assert broken["config"] == mended["config"] and broken["seed"] == mended["seed"] and broken["reward"] == mended["reward"]
    assert (broken["advantages"], mended["advantages"]) == ("score_on_the_first_token", "gae")


def test_the_misled_run_is_paid_more_and_earns_less_of_what_is_wanted():
    healthy, misled = capstone.run_named("healthy"), capstone.run_named("misled")
    score, gold = misled.course_of("score"), misled.course_of("gold")
    assert score[-4:].mean() > score[:4].mean() + 0.3 and gold[-4:].mean() < gold[:4].mean()
    _, (low, _) = mean_interval(healthy.by_prompt(healthy.gold).mean(1) - misled.by_prompt(misled.gold).mean(1))
    assert low > 0
    rows = capstone.gains({"misled": misled})
    assert float(rows["misled"]["warm words"]) < 0.5 * float(rows["untrained"]["warm words"])


def test_the_hacked_run_is_paid_more_within_its_budget_and_loses_gold():
    hacked, score = capstone.run_named("hacked"), capstone.run_named("hacked").course_of("score")
    assert score[-4:].mean() > score[:4].mean() + 0.3
    assert hacked.head["config"]["kl_budget"] == capstone.BUDGET and hacked.course_of("kl")[:-1].max() < 12
    _, (_, high) = mean_interval(compare.gain(hacked, "gold"))
    assert high < 0


def test_the_doctor_finds_the_healthy_run_the_healthiest():
    found = {what: doctor.examine(log.history, log.texts) for what, log in zip(checks.KEY.values(), capstone.blind().values())}
    assert all(len(found[ill]) > len(found["healthy"]) for ill in ("misled", "bug", "hacked"))


def test_a_budget_cuts_a_log_where_it_would_have_ended_the_run():
    log = log_of([0, 1, 2, 20, 20, 20, 20, 20])  # means of up to four: 0, .5, 1, 5.75, 10.75
    cut, budget = capstone.stopped(log, CPU.ppo_config(kl_budget=10.0))
    assert (len(cut.steps), budget) == (5, 10.0) and len(log.steps) == 8
    assert capstone.stopped(log, CPU.ppo_config(kl_budget=None))[1] == capstone.stopped(log, ...)[1] == 9.0
    assert len(capstone.stopped(log, CPU.ppo_config(kl_budget=50.0))[0].steps) == 8


def test_the_curves_name_every_run_at_its_end():
    figure = capstone.curves({"one": log_of([0, 1, 2, 2]), "two": log_of([0, 1, 2, 2], ended=0.5), "short": log_of([0, 1])})
    for axis in figure.axes:
        named = {text.get_text().strip(): text.xy for text in axis.texts if not text.get_text().startswith("budget")}
        assert set(named) == {"one", "two", "short"}
        assert named["one"][1] != named["two"][1]  # equal ends are moved apart
        assert named["short"] in [tuple(line.get_xydata()[-1]) for line in axis.lines]  # and one far from them is not


# ---------------------------------------------------------------- checks that the page's own tests do not reach


@pytest.mark.parametrize("letter", checks.KEY)
def test_every_wrong_diagnosis_has_a_lesson_of_its_own_and_does_not_give_the_right_one_away(letter, capsys):
    lessons = set()
    for wrong in set(checks.LESSONS) - {checks.KEY[letter]}:
        exercises.check_diagnosis(checks.KEY | {letter: wrong.upper() + " "})
        first, second = said(capsys).splitlines()
        assert first == "✗ 3 of 4 right" and second.strip().startswith(f"{letter} is not {wrong}: ")
        lessons.add(second)
    assert len(lessons) == 3


@pytest.mark.parametrize("field, words", checks.ALONE.items())
def test_a_setting_that_only_changes_the_pace_is_told_so(field, words, capsys):
    config = CPU.ppo_config(init_kl_coef=0.0, kl_budget=None, gradient_accumulation_steps=1)
    value = getattr(config, field)
    other = 0.5 if value is None else value * 2 if field in ("batch_size", "gradient_accumulation_steps") else value + 1
    setattr(config, field, other)
    exercises.check_one_setting(config)
    assert words in said(capsys)


# ---------------------------------------------------------------- the gold revealed


def evaluation(golds):
    n = len(golds)
    return Evaluation([f"p{i}" for i in range(n)], ["x"] * n, np.zeros(n), np.array(golds, dtype=float), np.zeros(n))


@pytest.mark.parametrize("after, letter", [([3] * 20, A), ([0, 2] * 10, B), ([0] * 20, C)])
def test_gold_rose_or_fell_only_where_its_interval_says_so(after, letter):
    before = evaluation([1] * 20)
    was, became, gain, (low, high), happened = capstone.gold_of_run(before, evaluation(after))
    assert happened == letter and was == 1 and became == np.mean(after) and low <= gain <= high


def points(*arguments):
    return [row["points"] for row in capstone.scorecard(PAIRS, *arguments)]


def test_untouched_cells_earn_what_the_stand_in_s_reward_model_does_and_nothing_else():
    unsaid = dict(A=..., B=..., C=..., D=...)
    assert points(capstone.stand_in(PAIRS), 0.69, 0.88, ..., "B", unsaid) == [
        "0 of 25",
        "12 of 25",
        "0 of 10",
        "0 of 40",
        "12 of 100",
    ]


def test_all_points_are_earned_by_the_rule_s_own_labels_and_all_diagnoses():
    rule = "".join("a" if capstone.gold_reward(p.prompt, p.a) > capstone.gold_reward(p.prompt, p.b) else "b" for p in PAIRS)
    assert points(capstone.Labels(rule, (True,) * 50), 0.9, 0.88, "b ", "B", dict(checks.KEY))[-1] == "100 of 100"
    half = points(capstone.Labels(rule, (True,) * 25 + (False,) * 25), 0.5, 0.88, "A", "B", checks.KEY | dict(A="healthy"))
    card = capstone.scorecard(PAIRS, capstone.Labels(rule, (True,) * 50), 0.9, 0.88, ..., "B", {})
    assert max(len(value) for row in card for value in row.values()) < 50  # pandas cuts what is longer
    assert half == ["12 of 25", "0 of 25", "0 of 10", "30 of 40", "42 of 100"]


def test_best_of_four_of_the_untrained_model_is_better_by_a_better_judge():
    prompts = load_prompts(project_root() / HELDOUT_FILE)[:6]
    judge = lambda asked, texts: [capstone.gold_reward(*one) for one in zip(asked, texts)]
    best, single = capstone.best_of_four(judge, prompts)
    alike, same = capstone.best_of_four(lambda asked, texts: [0.0] * len(texts), prompts)
    assert best > single == same and best > alike
