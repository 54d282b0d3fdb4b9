"""Bootstrap intervals (Efron 1979): how far a mean could have come out otherwise. All are 95 %, and the same at every call."""

import numpy as np

DRAWS = 10_000
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # the 97.5 % quantile of t for so many seeds


def quantiles(draws):
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values, draws=DRAWS, seed=0):
    """(mean, (low, high)) of independent values, (n,), such as one number a prompt."""
    values = np.asarray(values, dtype=float)
    resampled = np.random.default_rng(seed).choice(values, (draws, len(values))).mean(1)
    return float(values.mean()), quantiles(resampled)


def two_level_interval(values, draws=DRAWS, seed=0):
    """(mean, (low, high)) of (seeds, prompts): both the seeds and the prompts are drawn anew, since both were chosen by chance and
    others would have given other numbers. (A crossed, or "pigeonhole", bootstrap: Owen 2007, arXiv:0712.1111.) Of fewer than six
    seeds a bootstrap hardly leaves what they span; there its ends are moved out as Student's t is wider than the normal."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    seeds, prompts = values.shape
    counts = lambda n: rng.multinomial(n, np.full(n, 1 / n), size=draws) / n  # how often each was drawn, (draws, n)
    resampled = np.einsum("ds,sp,dp->d", counts(seeds), values, counts(prompts))
    mean, (low, high) = float(values.mean()), quantiles(resampled)
    wider = STUDENT[seeds] / 1.96 * (seeds / (seeds - 1)) ** 0.5 if seeds in STUDENT else 1.0
    return mean, (mean + wider * (low - mean), mean + wider * (high - mean))
