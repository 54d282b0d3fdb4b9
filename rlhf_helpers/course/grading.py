"""How an exercise check grades an answer: a number, a function or a PPOConfig, whatever a learner may have put there."""

import contextlib
import copy
import io
import math
import re

from rlhf_helpers.config import PPOConfig


def say(ok, words):
    """One line on the page: a tick or a cross, and what it means."""
    print(f"{'✓' if ok else '✗'} {words}")


def ticked(check, answer):
    """Whether a check gives an answer its tick, without a word."""
    with contextlib.redirect_stdout(io.StringIO()) as page:
        check(answer)
    said = page.getvalue()  # an answer may print what it likes, without a line end, too; the check speaks last
    return said.rfind("✓ ") > said.rfind("✗ ")


def number(answer, right, hints=(), within=0.005, praise="right"):
    """Check a number. `hints` are pairs (wrong answer, likely mistake), of which the nearest is given; `within` is the relative
    tolerance."""
    if answer is ...:
        return say(False, "no answer yet: put your number where the three dots are")
    given = as_number(answer, right)
    if given is None:
        return say(False, f"{shown(answer)} is not a number")
    if math.isclose(given, right, rel_tol=within):
        return say(True, praise)
    near = [(abs(given - wrong), hint) for wrong, hint in hints if math.isclose(given, wrong, rel_tol=within)]
    say(False, min(near)[1] if near else f"{given:g} is too {'small' if given < right else 'large'}")


def as_number(answer, near=math.inf):
    """A float of a number, or of a text or a pair that is one to a reader: "93 %", "1,024", "93,5" and (93, 5), which Python makes of
    93,5; of the two readings of "4,127" the one nearer to `near`. None for what is none, whatever it is."""
    try:
        if isinstance(answer, (bool, bytes)):
            return None
        if isinstance(answer, tuple) and len(answer) == 2 and all(type(part) is int for part in answer) and answer[1] >= 0:
            thousands = answer[1] == 0 and answer[0] != 0 or 100 <= answer[1] <= 999  # 25,000 is (25, 0) to Python
            answer = f"{answer[0]},{answer[1]:03d}" if thousands else f"{answer[0]}.{answer[1]}"
        if isinstance(answer, str):
            answer = answer.replace("\N{MINUS SIGN}", "-")  # as pages print it
            (answer,) = re.fullmatch(r"\s*([-+]?[\d.,]*\d(?:[eE][-+]?\d+)?)\s*[^\d.,]*", answer).groups()
            grouped = re.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", answer)
            readings = [answer.replace(",", "")] if grouped else []
            readings += [answer.replace(",", ".")] if answer.count(",") + answer.count(".") <= 1 else []
            answer = min(map(float, readings or [answer]), key=lambda reading: times_apart(reading, near))
        given = float(answer)
    except Exception:  # whatever a learner may put there
        return None
    return None if math.isnan(given) else given


def as_letter(guess, letters):
    """One of `letters` for "b", " B " or "(b)"; None for all else."""
    letter = guess.strip(" \t\n().:,;[]'\"").upper() if isinstance(guess, str) else None
    return letter if letter in letters else None


def times_apart(reading, near):
    """How far two numbers are from each other: by their ratio, where there is one."""
    return abs(math.log(reading / near)) if 0 < reading < math.inf and 0 < near < math.inf else abs(reading - near)


def function(answer, cases, hints=(), agree=None, praise="right"):
    """Check a function on `cases`, a list of (arguments, expected). `hints` are pairs (a wrong function, likely mistake): the
    hint is given where the answer does what the wrong function does. `agree(a, b)` compares two results."""
    if answer is ...:
        return say(False, "no answer yet: put your function where the three dots are")
    if not callable(answer):
        return say(False, f"{shown(answer)} is not a function")

    def agrees(a, b, how=agree or same):
        try:
            return bool(how(a, b))
        except Exception:  # things that cannot be compared do not agree
            return False

    def results(function):
        return [function(*copy.deepcopy(arguments)) for arguments, _ in cases]  # it may change its arguments

    given = []
    for arguments, _ in cases:
        try:
            given.append(answer(*copy.deepcopy(arguments)))
        except Exception as error:
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            return say(False, f"your function stopped with {why}\n  for {', '.join(map(shown, arguments))}")
    if any(hasattr(result, "__next__") for result in given):
        return say(False, "an iterator came back, which can be read once: wrap it in list(...)")
    if all(result is ... or result is None for result in given):
        return say(False, "no answer yet: the function returns nothing")
    right = [agrees(result, expected) for result, (_, expected) in zip(given, cases)]
    if all(right):
        return say(True, praise)
    for wrong, hint in hints:
        if all(map(agrees, given, results(wrong))):
            return say(False, hint)
    first = right.index(False)
    wanted, got = kind(cases[first][1]), kind(given[first])
    if wanted != got and all(agrees(result, expected, same) for result, (_, expected) in zip(given, cases)):
        return say(False, f"the numbers are right; expected a {wanted}, got a {got}")
    arguments, expected = cases[first]
    say(False, f"for {', '.join(map(shown, arguments))}\n  expected {shown(expected)}\n  got      {shown(given[first])}")


def kind(thing):
    """What holds the numbers of an answer, in words: "Tensor of torch.float32", "tuple (list, list)"."""
    if isinstance(thing, (tuple, list)) and any(hasattr(part, "dtype") or isinstance(part, (tuple, list)) for part in thing):
        return f"{type(thing).__name__} ({', '.join(map(kind, thing))})"
    return f"{type(thing).__name__} of {thing.dtype}" if hasattr(thing, "dtype") else type(thing).__name__


def keeping(answer):
    """An advantage function, held to leaving its rollout as it was; whatever else an answer may be, unchanged."""
    if not callable(answer):
        return answer

    def kept(rollout, *others):
        before = copy.deepcopy(vars(rollout))
        found = answer(rollout, *others)
        for name in ("rewards", "values", "mask"):
            if not same(getattr(rollout, name), before[name]):
                raise ValueError(f"it changed rollout.{name}, which others read after it: work on a copy")
        return found

    return kept


def not_a_config(answer):
    """What keeps an answer from being a PPOConfig, in words; None for one."""
    if answer is ...:
        return "no answer yet: put a PPOConfig where the three dots are"
    if not isinstance(answer, PPOConfig):
        return f"{shown(answer)} is no PPOConfig; start from CPU.ppo_config(...)"
    try:
        answer.__post_init__()  # its fields may have been set by hand
    except Exception as error:
        return str(error)


def shown(thing):
    """`repr`, cut short, for anything at all."""
    try:
        text = repr(thing)
    except Exception:
        text = f"a {type(thing).__name__}"
    return text if len(text) <= 400 else text[:400] + "…"


def same(a, b):
    """Whether two results agree: numbers, lists of numbers or tensors alike, up to rounding."""
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else x
    a, b = plain(a), plain(b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) or (a != a and b != b)
    except TypeError:
        return type(a) is type(b) and a == b


def near_pairs(a, b):
    """Whether two results, tensors or pairs of them, agree up to rounding, and up to a 1e-4 that guards a division by 0."""
    import torch

    if a is None or b is None:
        return a is b
    if isinstance(b, torch.Tensor) or isinstance(a, torch.Tensor):
        return (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and a.shape == b.shape
            and torch.allclose(a.float(), b, atol=1e-3)
        )
    return len(a) == len(b) == 2 and all(near_pairs(x, y) for x, y in zip(a, b))
