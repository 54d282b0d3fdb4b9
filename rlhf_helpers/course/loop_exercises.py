"""The exercise checks whose answer then trains: as in `exercises`, a tick, or a cross with the likely mistake in words."""

from types import SimpleNamespace

from rlhf_helpers.course.grading import function, keeping, same


def batch_of_three():
    """A rollout of three responses of four, two and one tokens, as far as an advantage function reads it. The scores are what the
    rewards add up to without the price of KL."""
    import torch

    mask = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])
    rewards = torch.tensor([[-0.1, 0.2, 0.1, 1.4], [-0.2, 0.4, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    scores = torch.tensor([1.2, 0.9, -0.6])
    return SimpleNamespace(rewards=rewards, mask=mask, values=torch.where(mask, 0.3, 0.0), kl=-rewards, scores=scores)


def own_advantages(rollout, config=None, total=None):
    """Each response's rewards added up, less the mean of that over the batch, on all its real tokens; and returns that ask nothing
    of the value head."""
    returns = rollout.rewards.sum(1)
    return (returns - returns.mean())[:, None] * rollout.mask, rollout.values


def check_own_advantages(answer):
    """A function (rollout, config, total) -> (advantages, returns), both (B, T), as `own_advantages`."""

    def made(number, spread=lambda number, r: number[:, None] * r.mask):
        return lambda r, config=None, total=None: (spread(number(r), r), r.values)

    returns = lambda r: r.rewards.sum(1)
    centred = lambda r: returns(r) - returns(r).mean()
    rollout, right = batch_of_three(), own_advantages
    hints = [
        (made(returns), "no baseline yet: take the mean over the batch off, or every answer above 0 is praised"),
        (made(lambda r: r.scores - r.scores.mean()), "the scores alone leave the price on KL out: add up rollout.rewards"),
        (made(centred, lambda number, r: number[:, None].expand_as(r.mask)), "the pads have an advantage, too: multiply by rollout.mask"),
        (made(lambda r: returns(r) - r.rewards.sum() / r.mask.sum()), "that baseline is the mean reward of a token; take the mean of the responses' sums"),
        (made(lambda r: -centred(r)), "the sign: better than the mean must come out positive"),
        (made(lambda r: centred(r) / returns(r).std()), "divided by the deviation, as GRPO does: a fine choice, but leave it out here"),
        (made(lambda r: centred(r) / r.mask.sum(1)), "divided by the length: then a long answer learns less from each token; leave that out here"),
        (lambda r, config=None, total=None: (r.rewards - returns(r).mean(), r.values), "that is a token's own reward; the score stands on the last token alone, so add the row up first"),
        (lambda r, config=None, total=None: right(r)[0], "two things are asked for: (advantages, returns)"),
        (lambda r, config=None, total=None: (right(r)[0], right(r)[0]), "the second is what the value head should learn; with rollout.values it is asked nothing"),
        (lambda r, config=None, total=None: (centred(r), r.values), "one number a response came back; the trainer wants one for each token, (B, T)"),
    ]  # fmt: skip
    praise = "each response against the batch, on all its tokens: REINFORCE with a baseline"
    function(keeping(answer), [((rollout, None, None), right(rollout))], hints, praise=praise)


def trained_with(answer, train):
    """The history that `train(answer)` returns, an advantage function having passed the check; {} and a sentence before that."""
    rollout = batch_of_three()
    try:
        ready = same(tuple(answer(rollout, None, None)), own_advantages(rollout))
    except Exception:  # whatever a learner may have put there
        ready = False
    if not ready:
        print("once the exercise has its tick, this cell trains with your function")
        return {}
    return train(answer)
