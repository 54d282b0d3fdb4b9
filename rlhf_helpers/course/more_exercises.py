"""The exercise checks of notebook 08: as in `exercises`, a tick, or a cross with the likely mistake in words."""

from rlhf_helpers.course.grading import as_letter, function, say


def check_share_between(answer):
    """A function (prompts, answers) of rewards -> the share of their variance that lies between prompts."""
    import torch

    k = lambda rewards: rewards.shape[1]
    within = lambda rewards: rewards.var(1).mean()
    between = lambda rewards: rewards.mean(1).var() - within(rewards) / k(rewards)
    right = lambda rewards: between(rewards) / (between(rewards) + within(rewards))
    population = lambda rewards: rewards.mean(1).var(unbiased=False) / rewards.var(unbiased=False)
    flat = lambda rewards: rewards.var(1, unbiased=False).mean()
    spread = lambda rewards: rewards.mean(1).var(unbiased=False) - flat(rewards) / k(rewards)
    over_n = lambda rewards: spread(rewards) / (spread(rewards) + flat(rewards))
    drawn = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    cases = [drawn + torch.arange(5.0)[:, None], 3 * drawn[:3, :2] + torch.tensor([[0.0], [3.0], [-1.0]])]
    by_prompts = lambda rewards: rewards.mean(1).var() - within(rewards) / len(rewards)
    hints = [
        (lambda r: by_prompts(r) / (by_prompts(r) + within(r)), "a mean of k answers scatters by within / k: k is rewards.shape[1], not the number of prompts"),
        (lambda r: r.mean(1).var() / r.var(), "the mean of a prompt's answers still scatters by within / answers, even if all prompts were alike: take that off"),
        (over_n, "variances over n - 1, as torch takes them"),
        (population, "the mean of a prompt's answers still scatters by within / answers, even if all prompts were alike: take that off"),
        (lambda r: r.mean(1).var() / (r.mean(1).var() + within(r)), "the mean of a prompt's answers still scatters by within / answers: take that off first"),
        (lambda r: 1 - right(r), "that is the share within prompts; the other one is asked for"),
        (lambda r: within(r) / r.var(), "that is about the share within prompts; the other one is asked for"),
        (lambda r: 1 - within(r) / r.var(), "that leaves the scatter of the means in: between is their variance less within / answers, the whole between + within"),
        (between, "that is the variance between prompts; divide it by between + within"),
        (lambda r: between(r) / within(r), "a share: divide by between + within, not by within alone"),
        (lambda r: r.var(0).mean() / r.var(), "rows are prompts: the variance within is taken along a row, dimension 1"),
    ]  # fmt: skip
    function(answer, [((case,), right(case)) for case in cases], hints, praise="what a baseline that knew each prompt's mean could take out")


def check_group_normalised(answer):
    """A function (prompts, answers) of returns -> GRPO's advantages, of the same shape."""
    import torch

    less_mean = lambda groups: groups - groups.mean(1, keepdim=True)
    right = lambda groups: less_mean(groups) / (groups.std(1, keepdim=True) + 1e-4)
    near_0 = lambda x: bool(x.abs().max() < 0.1)  # of a group that is equal up to rounding, whatever was added below the line
    near = lambda a, b: torch.allclose(a.to(b), b, rtol=1e-3, atol=1e-3, equal_nan=True)
    alike = lambda a, b: a.shape == b.shape and (near(a, b) or (near_0(a) and near_0(b)))
    drawn = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    cases = [torch.cat([drawn, torch.full((1, 4), 0.5)]), torch.tensor([[1.0, 0.0, 0.0], [2.0, -2.0, 0.5]])]
    cases.append(torch.full((2, 3), -0.34267085790634155))  # its mean rounds
    tiny = "answers that got the same differ from their mean by rounding, and that is blown up: add more than rounding, such as 1e-4"
    k = lambda groups: groups.shape[1]
    hints = [
        (less_mean, "that is the group's mean alone (Dr. GRPO); divide by the group's deviation as well"),
        (lambda g: less_mean(g) / g.std(1, keepdim=True), "a group whose answers all got the same has deviation 0, and 0/0 is NaN: add a little, such as 1e-4, below the line"),
        (lambda g: (less_mean(g) / g.std(1, keepdim=True)).nan_to_num(), tiny),
        (lambda g: less_mean(g) / (g.std(1, keepdim=True) + 1e-8), tiny),
        (lambda g: less_mean(g) / (g.std() + 1e-4), "one deviation for the whole batch; each group has its own, along dimension 1"),
        (lambda g: (g - g.mean()) / (g.std() + 1e-4), "that is over the whole batch; each group has its own mean and deviation, along dimension 1"),
        (lambda g: less_mean(g) / (g.std(1, keepdim=True, unbiased=False) + 1e-4), "the deviation over k - 1, as torch's std takes it, and as TRL does"),
        (lambda g: less_mean(g) / (g.var(1, keepdim=True) + 1e-4), "that is the variance; its root is the deviation"),
        (lambda g: right(g) * k(g) / (k(g) - 1), "the mean of the whole group, not of the others: GRPO leaves nobody out"),
        (lambda g: (g - g.mean(0)) / (g.std(0) + 1e-4), "rows are prompts: mean and deviation are taken along a row, dimension 1"),
        (lambda g: right(g)[:, 0], "one number a group came back; every answer has its own advantage"),
    ]  # fmt: skip
    function(answer, [((case,), right(case)) for case in cases], hints, alike, "and a group of equals gets 0, as it should")


def check_what_follows(answer):
    """A letter: what follows from an interval that has 0 in it."""
    crosses = {
        "A": "the interval has 0 in it: other seeds and prompts could have put PPO ahead",
        "B": "a tie is no proof that two are alike: the interval reaches down to three tenths of a point",
    }
    if answer is ...:
        return say(False, "no answer yet: put A, B or C where the three dots are")
    letter = as_letter(answer, ("A", "B", "C"))
    if letter == "C":
        return say(True, "not decided is a result: it says how much is still possible")
    say(False, crosses.get(letter, "expected one of the letters A, B and C"))
