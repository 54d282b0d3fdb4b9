"""Guesses that count: what a learner expected, beside what came out. A wrong guess is told what it teaches, never that it failed.

`recall` asks for what earlier notebooks taught, from memory (retrieval practice: Roediger and Karpicke 2006, "Test-enhanced
learning")."""

import math

from rlhf_helpers.course.grading import as_letter, as_number, shown
from rlhf_helpers.course.recall import QUESTIONS

INVITATION = "Put your guess where the dots are next time, before you look."


def number(guess, truth, unit="", hints=(), within=0.25):
    """One line: the guess beside the result. `hints` are pairs (a wrong value, a sentence on what it teaches); the nearest is given
    if it lies nearer than the result does, and within the relative tolerance `within`. `...` means no guess yet."""
    truth = float(truth)
    result = f"it is {plain(truth)} {unit}".rstrip()
    if guess is ...:
        return print(f"{result}. {INVITATION}")
    given = as_number(guess, truth)
    if given is None:
        return print(f"{shown(guess)} is no number; {result}.")
    if unit.startswith(("%", "percent")) and 0 < given < 1 < truth and not (isinstance(guess, str) and "%" in guess):
        given *= 100  # a share
    far = lambda x: abs(given - x)
    wrong, lesson = min(hints, key=lambda hint: far(hint[0]), default=(truth, ""))
    lesson = f" {lesson}" if far(wrong) <= within * abs(wrong) and far(wrong) < far(truth) else ""
    verdict = "too small" if given < truth else "too large"
    if far(truth) <= within * abs(truth):
        verdict = "that is it" if plain(given) == plain(truth) else "close"
    print(f"you guessed {plain(given)}, {result}: {verdict}.{lesson}")


def choice(guess, right, lessons):
    """One line for a guess among letters. `lessons` is {letter: what follows from that answer}, each to be read after a colon."""
    if guess is ...:
        return print(f"It is {right}: {lessons[right]} {INVITATION}")
    letter = as_letter(guess, lessons)
    if letter is None:
        return print(f"{shown(guess)} is none of {', '.join(sorted(lessons))}. It is {right}: {lessons[right]}")
    print(
        f"you said {letter}, and so it is: {lessons[right]}"
        if letter == right
        else f"you said {letter}, it is {right}: {lessons[letter]}"
    )


def recall(notebook, *letters):
    """Three answers to the questions at the start of a notebook, named by its number, a line each: what a wrong letter mixes up,
    and where that was. The right letter is not given away: one can try again."""
    questions = QUESTIONS[notebook]
    if len(letters) == 1 and letters[0] is not ...:  # "BBA", "B B A" or ["B", "B", "A"]
        together = list(letters[0]) if isinstance(letters[0], (list, tuple)) else [c for c in str(letters[0]) if c.isalpha()]
        letters = together if len(together) == len(questions) else letters
    given = [*letters, *[...] * len(questions)][: len(questions)]
    if all(letter is ... for letter in given):
        return print("From memory first: put a letter for each question where the dots are, and run the cell again.")
    for n, (question, guess) in enumerate(zip(questions, given), 1):
        letter = as_letter(guess, question.answers)
        if letter is None:
            print(f"{n}: " + ("no letter yet" if guess is ... else f"{shown(guess)} is none of {', '.join(question.answers)}"))
        elif letter == question.right:
            print(f"{n} {letter}: yes. {question.answers[letter].lesson}")
        else:
            _, lesson, (where, section) = question.answers[letter]
            print(f"{n} {letter}: {lesson} Look again at notebook {where}, section {section}.")


def plain(x):
    """A number as one would write it: whole ones whole, others to three figures, thousands parted."""
    if not math.isfinite(x):
        return str(x)
    return f"{x + 0.0:,.0f}" if x == int(x) or abs(x) >= 1000 else f"{x:.3g}"
