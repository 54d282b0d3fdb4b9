"""Intervals: how far a mean could have come out otherwise. All are 95 %, and the same at every call. Over prompts alone they are by
bootstrap (Efron 1979); where there are seeds, of which there are few, by Student's t."""

import math
from functools import lru_cache

import numpy as np

DRAWS = 10_000
KEPT = 1_000  # of more values the draws are not kept for another call: they would take a gigabyte for ten thousand
ANGLES = 20_000  # steps of the integral under Student's t


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


def student(dof):
    """The 97.5 % quantile of Student's t. In the angle a, t = sqrt(dof) tan(a), its density is cos(a) ** (dof - 1)."""
    step = math.pi / 2 / ANGLES
    mass = np.cumsum(np.cos((np.arange(ANGLES) + 0.5) * step) ** (dof - 1))
    return dof**0.5 * math.tan(np.interp(0.95 * mass[-1], mass, np.arange(1, ANGLES + 1) * step))


def two_level_interval(values, control=None):
    """(mean, (low, high)) of (seeds, prompts), where seeds and prompts were both chosen by chance; with a `control`, (other seeds, the
    same prompts), of the difference of the two means. Student's t: the variance of a mean over two crossed factors is what its seeds'
    means give, and what its prompts' means give, less the noise, which is in both (never less than one of them alone); its degrees of
    freedom are Satterthwaite's (1946).
    (Westfall, Kenny & Judd 2014, doi:10.1037/xge0000014.) Two groups of seeds need not have one variance (Welch 1947). Of one seed,
    or of one prompt, only the other level is in it."""
    groups = [np.asarray(group, dtype=float) for group in (values, control) if group is not None]
    by_prompt = groups[0].mean(0) - (groups[1].mean(0) if control is not None else 0.0)
    mean, prompts = float(by_prompt.mean()), len(by_prompt)
    # each part of the variance, with its degrees of freedom
    terms = [(by_prompt.var(ddof=1) / prompts, prompts - 1)] if prompts > 1 else []
    for seeds, group in ((len(group), group) for group in groups if len(group) > 1):
        terms.append((group.mean(1).var(ddof=1) / seeds, seeds - 1))
        if prompts > 1:
            noise = group - group.mean(0) - group.mean(1, keepdims=True) + group.mean()
            free = (seeds - 1) * (prompts - 1)
            terms.append((-(noise**2).sum() / free / (seeds * prompts), free))
    variance = max(sum(part for part, _ in terms), *(part for part, _ in terms), 0.0)
    if variance == 0:
        return mean, (mean, mean)
    freedom = max(1.0, variance**2 / sum(part**2 / free for part, free in terms))
    half = student(freedom) * variance**0.5
    return mean, (float(mean - half), float(mean + half))
