"""How an exercise check grades an answer: a number, a function or a PPOConfig, whatever a learner may have put there."""

import copy
import math

from rlhf_helpers.config import PPOConfig


def say(ok, words):
    """One line on the page: a tick or a cross, and what it means."""
    print(f"{'✓' if ok else '✗'} {words}")


def number(answer, right, hints=(), within=0.005, praise="right"):
    """Check a number. `hints` are pairs (wrong answer, likely mistake), of which the nearest is given; `within` is the relative
    tolerance."""
    if answer is ...:
        return say(False, "no answer yet: put your number where the three dots are")
    try:
        given = math.nan if isinstance(answer, str) else float(answer)
    except Exception:  # whatever a learner may put there
        given = math.nan
    if math.isnan(given):
        return say(False, f"{shown(answer)} is not a number")
    if math.isclose(given, right, rel_tol=within):
        return say(True, praise)
    near = [(abs(given - wrong), hint) for wrong, hint in hints if math.isclose(given, wrong, rel_tol=within)]
    say(False, min(near)[1] if near else f"{given:g} is too {'small' if given < right else 'large'}")


def function(answer, cases, hints=(), agree=None, praise="right"):
    """Check a function on `cases`, a list of (arguments, expected). `hints` are pairs (a wrong function, likely mistake): the
    hint is given where the answer does what the wrong function does. `agree(a, b)` compares two results."""
    if answer is ...:
        return say(False, "no answer yet: put your function where the three dots are")
    if not callable(answer):
        return say(False, f"{shown(answer)} is not a function")

    def agrees(a, b):
        try:
            return bool((agree or same)(a, b))
        except Exception:  # things that cannot be compared do not agree
            return False

    def results(function):
        return [function(*copy.deepcopy(arguments)) for arguments, _ in cases]  # it may change its arguments

    try:
        given = results(answer)
    except Exception as error:
        return say(False, f"your function stopped with {type(error).__name__}: {error}")
    if all(result is ... or result is None for result in given):
        return say(False, "no answer yet: the function returns nothing")
    right = [agrees(result, expected) for result, (_, expected) in zip(given, cases)]
    if all(right):
        return say(True, praise)
    for wrong, hint in hints:
        if all(map(agrees, given, results(wrong))):
            return say(False, hint)
    first = right.index(False)
    arguments, expected = cases[first]
    say(False, f"for {', '.join(map(shown, arguments))}\n  expected {shown(expected)}\n  got      {shown(given[first])}")


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
        return f"a {type(answer).__name__} is no PPOConfig; start from CPU.ppo_config(...)"
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
