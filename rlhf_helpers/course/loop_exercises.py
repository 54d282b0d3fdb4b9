"""The exercise checks of notebook 05, one with an answer that then trains: as in `exercises`, a tick, or a cross with the likely
mistake in words."""

from types import SimpleNamespace

from rlhf_helpers.course.grading import function, keeping, near_pairs, ticked


def batch_of_three():
    """A rollout of three responses of four, two and one tokens, as far as an advantage function reads it. The scores are what the
    rewards add up to without the price of KL."""
    import torch

    mask = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])
    rewards = torch.tensor([[-0.1, 0.0, 0.3, 1.4], [-0.2, 0.4, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    scores = torch.tensor([1.2, 0.9, -0.6])
    values = torch.tensor([[0.3, 0.3, 0.0, 0.3], [0.3, 0.3, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0]])
    return SimpleNamespace(rewards=rewards, mask=mask, values=values, kl=-rewards, scores=scores)  # real tokens may have 0


def own_advantages(rollout, config=None, total=None):
    """Each response's rewards added up, less the mean of that over the batch, on all its real tokens; and returns that ask nothing
    of the value head."""
    returns = rollout.rewards.sum(1)
    return (returns - returns.mean())[:, None] * rollout.mask, rollout.values


def check_own_advantages(answer):
    """A function (rollout, config, total) -> (advantages, returns), both (B, T), as `own_advantages`."""
    import torch

    def made(number, spread=lambda number, r: number[:, None] * r.mask):
        return lambda r, config=None, total=None: (spread(number(r), r), r.values)

    returns = lambda r: r.rewards.sum(1)
    centred = lambda r: returns(r) - returns(r).mean()
    rollout, right = batch_of_three(), own_advantages
    hints = [
        (made(returns), "no baseline yet: take the mean over the batch off, or every answer above 0 is praised"),
        (made(lambda r: r.scores - r.scores.mean()), "the scores alone leave the price on KL out: add up rollout.rewards"),
        (made(centred, lambda number, r: number[:, None].expand_as(r.mask)), "the pads have an advantage, too: multiply by rollout.mask"),
        *((made(centred, lambda number, r, of=of: number[:, None] * (getattr(r, of) != 0)), f"a real token may have 0 in rollout.{of}: use rollout.mask")
          for of in ("rewards", "values")),
        (made(lambda r: returns(r) - r.rewards.sum() / r.mask.sum()), "that baseline is the mean reward of a token; take the mean of the responses' sums"),
        (made(lambda r: r.rewards.sum(1) / r.mask.sum(1) - (r.rewards.sum(1) / r.mask.sum(1)).mean()), "that is a mean over tokens; a return is the sum of a row"),
        (made(lambda r: centred(r) * len(r.mask) / (len(r.mask) - 1)), "that is leave-one-out: a fine choice, but here the mean is over the whole batch"),
        (made(lambda r: -centred(r)), "the sign: better than the mean must come out positive"),
        (made(lambda r: centred(r) / returns(r).std()), "divided by the deviation, as GRPO does: a fine choice, but leave it out here"),
        (made(lambda r: centred(r) / r.mask.sum(1)), "divided by the length: then a long answer learns less from each token; leave that out here"),
        (lambda r, config=None, total=None: (r.rewards - returns(r).mean(), r.values), "that is a token's own reward; the score stands on the last token alone, so add the row up first"),
        (lambda r, config=None, total=None: right(r)[0], "two things are asked for: (advantages, returns)"),
        (lambda r, config=None, total=None: right(r)[::-1], "the other way round: the advantages first, then the returns"),
        *((lambda r, config=None, total=None, of=of: (right(r)[0], of(r)), "the second is what the value head should learn; with rollout.values it is asked nothing")
          for of in (lambda r: None, lambda r: torch.zeros_like(r.values), lambda r: right(r)[0])),
        (lambda r, config=None, total=None: (centred(r), r.values), "one number a response came back; the trainer wants one for each token, (B, T)"),
    ]  # fmt: skip
    praise = "each response against the batch, on all its tokens: REINFORCE with a baseline"
    function(keeping(answer), [((rollout, None, None), right(rollout))], hints, agree=near_pairs, praise=praise)


def trained_with(answer, train):
    """The history that `train(answer)` returns, an advantage function having passed the check; {} and a sentence before that."""
    if not ticked(check_own_advantages, answer):
        print("once the exercise has its tick, this cell trains with your function")
        return {}
    return train(answer)


def check_net_score(answer):
    """A function history -> for each PPO step the mean score minus what the KL took from a response, a list."""
    numbers = ((0.5, 4.0, 0.05, 40.0), (1.4, 9.0, 0.10, 50.0), (0.9, 6.0, 0.07, 45.0))
    names = ("ppo/mean_scores", "objective/kl", "objective/kl_coef", "tokens/responses_len_mean")
    history = [dict(zip(names, row)) for row in numbers]
    each = lambda f: lambda history: [f(*(row[name] for name in names)) for row in history]
    hints = [
        (each(lambda s, kl, c, n: s - kl), "the KL is in nats; kl_coef turns it into units of the score"),
        (each(lambda s, kl, c, n: s + c * kl), "the penalty is taken away, not added"),
        (
            each(lambda s, kl, c, n: s - c * kl * n),
            "objective/kl is a sum over the response already; do not multiply by its length",
        ),
        (each(lambda s, kl, c, n: s - c * kl / n), "objective/kl is a sum over the response, and the response pays all of it"),
        (each(lambda s, kl, c, n: s - 0.05 * kl), "the coefficient can change from step to step: take it from the same row"),
        (each(lambda s, kl, c, n: s), "that is the score alone; what does the KL cost?"),
    ]
    function(
        answer,
        [((history,), [s - c * kl for s, kl, c, _ in numbers])],
        hints,
        praise="score minus price times KL, step by step",
    )


def check_word_reward(answer):
    """A reward function (prompts, responses) -> minus a tenth of a point for every word beyond the twentieth, a list."""
    words = lambda n, between=" ": between.join(["word"] * n)
    texts = ["one two three", words(20), words(25) + " \n", words(22), words(21, "  "), "extraordinarily-long-words indeed"]
    prompts = ["a prompt of three words"] * len(texts)
    beyond = lambda free, split=str.split: lambda p, texts: [-0.1 * max(0, len(split(text)) - free) + 0.0 for text in texts]
    right = beyond(20)
    hints = [
        (lambda p, texts: [-0.1 * len(t.split()) for t in texts], "the first twenty words are free"),
        (lambda p, texts: [-0.1 * (len(t.split()) - 20) for t in texts], "a short answer gets a bonus here; use max(0, ...)"),
        (lambda p, texts: [0.1 * max(0, len(t.split()) - 20) for t in texts], "the sign: more words should be worse"),
        (
            lambda p, texts: [-0.1 * max(0, len(t) - 20) for t in texts],
            "len of a string counts letters; split it into words first",
        ),
        (beyond(20, lambda text: text.split(" ")), "split() without an argument: two spaces, or one at the end, make no word"),
        (
            lambda p, texts: [-0.1 * max(0, t.count(" ") - 20) for t in texts],
            "spaces are not words: 21 words may have 20, or 40; use split()",
        ),
        *((beyond(free), "the first twenty are free: twenty words cost nothing, and 21 a tenth") for free in (19, 21)),
        (
            lambda p, texts: [-1.0 * max(0, len(t.split()) - 20) for t in texts],
            "a tenth of a point for each word, not a whole one",
        ),
    ]
    function(
        answer,
        [((prompts, texts), right(prompts, texts))],
        hints,
        praise="one number for each response, and only length counts",
    )
