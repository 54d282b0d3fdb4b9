"""The exercise checks of notebook 00, which has no model: as in `exercises`, a tick, or a cross with the likely mistake in words."""

from rlhf_helpers.course.grading import function


def check_leave_one_out(answer):
    """A function scores -> each score less the mean of the others, a list."""
    mean = lambda scores: sum(scores) / len(scores)
    right = lambda scores: [s - (sum(scores) - s) / (len(scores) - 1) for s in scores]
    groups = ([1.0, 0.0, 2.0, 5.0], [-1.0, 0.5, 0.5], [3.0, 1.0])
    hints = [
        (lambda scores: [s - mean(scores) for s in scores], "that is the mean of all: an answer is compared with itself, too"),
        (lambda scores: [s - (sum(scores) - s) / len(scores) for s in scores], "the others are one fewer: divide by n - 1"),
        (lambda scores: [s - (sum(scores) - s) for s in scores], "that is the sum of the others, not their mean"),
        (lambda scores: [-a for a in right(scores)], "the sign: better than the others must come out positive"),
        (lambda scores: [(sum(scores) - s) / (len(scores) - 1) for s in scores], "that is the baseline; the advantage is the score less it"),
        (lambda scores: right(scores)[0], "one number came back; every answer has its own advantage"),
    ]
    function(answer, [((group,), right(group)) for group in groups], hints, praise="each score, less what the others got")


def check_mean_under_new(answer):
    """A function (values, old, new), of draws from the old policy -> the mean value under the new one."""
    cases = [([1.0, 0.0, 2.0], [0.5, 0.4, 0.1], [0.25, 0.6, 0.3]), ([4.0, -1.0], [0.8, 0.2], [0.4, 0.6])]
    weigh = lambda w: lambda v, o, n: sum(x * w(a, b) for x, a, b in zip(v, o, n)) / len(v)
    right = weigh(lambda o, n: n / o)
    hints = [
        (weigh(lambda o, n: o / n), "the other way round: what the new policy says more often must count more"),
        (weigh(lambda o, n: 1.0), "that is the mean under the old policy, from which they were drawn"),
        (weigh(lambda o, n: n), "the draws came by the old probabilities already: divide by them"),
        (lambda v, o, n: sum(x * b for x, b in zip(v, n)), "that would be right for all answers once; these are draws, and likely ones came more often"),
        (lambda v, o, n: right(v, o, n) * len(v), "a mean: divide by the number of draws"),
        (lambda v, o, n: right(v, o, n) * len(v) / sum(b / a for a, b in zip(o, n)), "divided by the sum of the ratios it is steadier, and biased: divide by the number of draws"),
    ]
    function(answer, [(case, right(*case)) for case in cases], hints, praise="each draw counts by its ratio, new / old")
