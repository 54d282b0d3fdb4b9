"""Intervals: how far a mean could have come out otherwise, by bootstrap (Efron 1979). All are 95 %, and the same at every call."""

from functools import lru_cache

import numpy as np

DRAWS = 10_000
KEPT = 1_000  # of more values the draws are not kept for another call: they would take a gigabyte for ten thousand
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # the 97.5 % quantile of t for so many seeds


def quantiles(draws):
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values, draws=DRAWS, seed=0):
    """(mean, (low, high)) of independent values, (n,), such as one number a prompt."""
    values = np.asarray(values, dtype=float)
    if len(values) <= KEPT:
        means = values[drawn(len(values), draws, seed)].mean(1)
    else:  # the same draws, a few at a time
        rng, some = np.random.default_rng(seed), [min(100, draws - done) for done in range(0, draws, 100)]
        means = np.concatenate([values[rng.integers(0, len(values), (n, len(values)))].mean(1) for n in some])
    return float(values.mean()), quantiles(means)


def share_interval(hits):
    """(share, (low, high)) of yes and no, (n,): Wilson's (1927), which has a width where all are alike, too. A bootstrap has none."""
    n, share, z2 = len(hits), float(np.mean(hits)), 1.96**2
    middle, half = share + z2 / (2 * n), 1.96 * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5
    return share, (max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n)))


@lru_cache(maxsize=4)  # the same at every call, and drawing them takes longer than all that is done with them
def drawn(n, draws, seed):
    """(draws, n): which of n values each resample has."""
    return np.random.default_rng(seed).integers(0, n, (draws, n))


@lru_cache(maxsize=4)
def shares(seeds, prompts, draws, seed):
    """(draws, seeds) and (draws, prompts): what share of each resample each seed and each prompt is."""
    rng = np.random.default_rng(seed)
    counts = lambda n: rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    return counts(seeds), counts(prompts)


def two_level_interval(values, draws=DRAWS, seed=0):
    """(mean, (low, high)) of (seeds, prompts): both the seeds and the prompts are drawn anew, since both were chosen by chance and
    others would have given other numbers. (A crossed, or "pigeonhole", bootstrap: Owen 2007, arXiv:0712.1111.) Of fewer than six
    seeds a bootstrap hardly leaves what they span; there its ends are moved out by Student's t over the normal, and by the root of
    n / (n - 1), since the spread within n drawn seeds is too small by that."""
    values = np.asarray(values, dtype=float)
    seeds, prompts = values.shape
    of_seeds, of_prompts = shares(seeds, prompts, draws, seed)
    resampled = ((of_seeds @ values) * of_prompts).sum(1)
    mean, (low, high) = float(values.mean()), quantiles(resampled)
    wider = STUDENT[seeds] / 1.96 * (seeds / (seeds - 1)) ** 0.5 if seeds in STUDENT else 1.0
    return mean, (mean + wider * (low - mean), mean + wider * (high - mean))
