"""Guesses: whatever a learner puts there, one calm line comes back, and every lesson is reached by the answer that it belongs to."""

import math

import numpy as np
import pytest
import torch

from rlhf_helpers.course import guesses, recall
from tests import test_notebooks as pages


class Rude:
    def __float__(self):
        raise RuntimeError("no")

    def __repr__(self):
        raise RuntimeError("no")


SILLY = [
    None,
    "",
    "8",
    "two words",
    math.nan,
    [],
    [1, 2],
    {},
    object(),
    Rude(),
    lambda: 1,
    3 + 4j,
    np.arange(3),
    torch.ones(2),
    print,
    "é" * 900,
]
HINTS = ((8.0, "Four bits are half of that."), (4.5, "That is without double quantization."))


def said(capsys):
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "guess, expected",
    [
        (4, "you guessed 4, it is 4.13 bits: close."),
        (4.127, "you guessed 4.13, it is 4.13 bits: that is it."),
        (torch.tensor(4.1), "you guessed 4.1, it is 4.13 bits: close."),
        (np.float32(2), "you guessed 2, it is 4.13 bits: too small."),
        (8, "you guessed 8, it is 4.13 bits: too large. Four bits are half of that."),
        (9.9, "you guessed 9.9, it is 4.13 bits: too large. Four bits are half of that."),
        (5.5, "you guessed 5.5, it is 4.13 bits: too large. That is without double quantization."),
        (4.5, "you guessed 4.5, it is 4.13 bits: close. That is without double quantization."),
        (math.inf, "you guessed inf, it is 4.13 bits: too large."),
        (1_000_000, "you guessed 1,000,000, it is 4.13 bits: too large."),
        (..., "it is 4.13 bits. Put your guess where the dots are next time, before you look."),
        ("8", "you guessed 8, it is 4.13 bits: too large. Four bits are half of that."),
        ("4,13 bits", "you guessed 4.13, it is 4.13 bits: that is it."),
        ((4, 13), "you guessed 4.13, it is 4.13 bits: that is it."),
        ("4,127", "you guessed 4.13, it is 4.13 bits: that is it."),
        ((4, 127), "you guessed 4.13, it is 4.13 bits: that is it."),
        ("0,127", "you guessed 0.127, it is 4.13 bits: too small."),
        ("4,127,000", "you guessed 4,127,000, it is 4.13 bits: too large."),
        ("1,000,000", "you guessed 1,000,000, it is 4.13 bits: too large."),
        ("eight", "'eight' is no number; it is 4.13 bits."),
        (True, "True is no number; it is 4.13 bits."),
    ],
)
def test_a_number_stands_beside_the_result(guess, expected, capsys):
    guesses.number(guess, 4.127, "bits", HINTS)
    assert said(capsys) == expected + "\n"


@pytest.mark.parametrize("guess", [(24, 960), "24,960", (25, 0), "25,000", 24960])
def test_thousands_may_be_written_as_the_page_does(guess, capsys):
    guesses.number(guess, 24_960)
    assert said(capsys).endswith((": that is it.\n", ": close.\n"))
    guesses.number((5, 0), 5000)
    assert said(capsys).endswith("that is it.\n")
    guesses.number("1,000", 125)
    assert "too large" in said(capsys)
    guesses.number("\N{MINUS SIGN}5", -5.0)
    assert said(capsys).endswith("that is it.\n")


def test_a_share_where_percent_are_asked_for_is_taken_for_one(capsys):
    for guess in (0.93, "0.93", "93 %"):
        guesses.number(guess, 93.5, "% of the tokens")
        assert said(capsys) == "you guessed 93, it is 93.5 % of the tokens: close.\n"
    guesses.number("0.5 %", 6.0, "%")
    assert said(capsys) == "you guessed 0.5, it is 6 %: too small.\n"
    guesses.number(0.5, 0.4, "percent")
    assert said(capsys).startswith("you guessed 0.5,")


def test_three_letters_in_one_are_three_letters(capsys):
    guesses.recall("07", "A", "B", "C")
    apart = said(capsys)
    for together in ("ABC", "a b c", "A, B, C", ["A", "B", "C"]):
        guesses.recall("07", together)
        assert said(capsys) == apart


def test_the_nearest_of_two_hints_is_given(capsys):
    guesses.number(8.5, 4.0, hints=((8.0, "eight"), (9.5, "nine and a half")))
    assert "eight" in said(capsys)


def test_a_result_of_0_is_met_by_0_alone(capsys):
    for guess, words in ((0, "that is it"), (0.0, "that is it"), (1e-9, "too large"), (-0.1, "too small")):
        guesses.number(guess, 0.0, "nats")
        assert words in said(capsys)


LESSONS = {"A": "more would train.", "B": "they have no gradient.", "C": "none is in fp32."}


@pytest.mark.parametrize("guess", ["b", " B ", "(b)", "B.", "B,", "[B]", "'B'"])
def test_a_right_letter_may_be_written_in_several_ways(guess, capsys):
    guesses.choice(guess, "B", LESSONS)
    assert said(capsys) == "you said B, and so it is: they have no gradient.\n"


def test_a_wrong_letter_gets_what_follows_from_it(capsys):
    for letter in "AC":
        guesses.choice(letter, "B", LESSONS)
        assert said(capsys) == f"you said {letter}, it is B: {LESSONS[letter]}\n"


def test_without_a_letter_the_result_is_told_all_the_same(capsys):
    guesses.choice(..., "B", LESSONS)
    assert said(capsys).startswith("It is B: they have no gradient. Put your guess")
    guesses.choice("D", "B", LESSONS)
    assert said(capsys) == "'D' is none of A, B, C. It is B: they have no gradient.\n"


@pytest.mark.parametrize("silly", SILLY, ids=lambda thing: type(thing).__name__)
def test_nothing_that_a_learner_may_put_there_raises_or_takes_more_than_a_line(silly, capsys):
    guesses.number(silly, 2.0, "nats", HINTS)
    guesses.choice(silly, "B", LESSONS)
    lines = said(capsys).splitlines()
    assert len(lines) == 2 and "it is 2 nats" in lines[0] and "It is B" in lines[1]
    guesses.recall("04", silly, "A", silly)
    assert len(said(capsys).splitlines()) == 3


def test_no_guess_is_marked_as_a_failure(capsys):
    guesses.number(8, 4.0), guesses.choice("A", "B", LESSONS), guesses.recall("01", "A", "A", "B")
    assert not set("✗✓") & set(said(capsys))


# ---------------------------------------------------------------- three questions back

EVERY = [
    (notebook, n, letter)
    for notebook, asked in recall.QUESTIONS.items()
    for n, one in enumerate(asked)
    for letter in one.answers
]


def test_each_notebook_but_the_first_asks_three_questions_of_three_answers():
    assert list(recall.QUESTIONS) == [f"{n:02d}" for n in range(1, 10)]
    for asked in recall.QUESTIONS.values():
        assert [list(question.answers) for question in asked] == [["A", "B", "C"]] * 3
        assert {question.right for question in asked} == {"A", "B", "C"}  # no letter is always right


@pytest.mark.parametrize("notebook, n, letter", EVERY)
def test_every_answer_reaches_its_own_sentence_and_a_wrong_one_says_where_it_was(notebook, n, letter, capsys):
    question = recall.QUESTIONS[notebook][n]
    answer = question.answers[letter]
    guesses.recall(notebook, *(letter if i == n else ... for i in range(3)))
    line = said(capsys).splitlines()[n]
    assert answer.lesson in line
    right = letter == question.right
    assert (": yes." in line) == right and (f"notebook {answer.where[0]}, section {answer.where[1]}" in line) != right


def test_answers_are_not_given_away_before_they_were_tried(capsys):
    guesses.recall("02", ..., ..., ...)
    guesses.recall("02")
    guesses.recall("02", "X", ...)
    text = said(capsys)
    assert text.count("From memory first") == 2 and "3: no letter yet" in text
    assert not any(answer.lesson in text for question in recall.QUESTIONS["02"] for answer in question.answers.values())


def test_they_ask_about_earlier_notebooks_in_sections_that_exist():
    headings = {path.name[:2]: pages.headings(pages.markdown(path)) for path in pages.NOTEBOOKS}
    for notebook, n, letter in EVERY:
        where, section = recall.QUESTIONS[notebook][n].answers[letter].where
        assert where < notebook
        assert any(heading.startswith(section) for heading in headings[where]), (notebook, where, section)


@pages.each_notebook
def test_the_page_asks_what_the_table_says(notebook):
    number = notebook.name[:2]
    if number not in recall.QUESTIONS:
        return
    found = [i for i, cell in pages.cells(notebook, "markdown") if cell["source"] == recall.markdown(number)]
    assert len(found) == 1, f"put recall.markdown({number!r}) into a cell of its own"
    after = dict(pages.cells(notebook, "code"))[found[0] + 1]["source"]
    assert after.splitlines()[-1] == f'guesses.recall("{number}", ..., ..., ...)'
