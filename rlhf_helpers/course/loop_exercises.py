"""The exercise checks of notebook 05, one with an answer that then trains: as in `exercises`, a tick, or a cross with the likely
mistake in words."""

from unittest import mock

from rlhf_helpers.course.grading import function, near_pairs, ticked


def clipped_losses(logprobs, old_logprobs, advantages, cliprange):
    """The policy's loss of every token, (B, T), as `ppo.policy_losses` gives it."""
    from rlhf_helpers import ppo

    return ppo.policy_losses(logprobs, old_logprobs, advantages, cliprange)[0]


def with_slopes(answer):
    """A loss function, made to give (losses, their slopes in the new log-probs); whatever else an answer may be, unchanged."""
    import torch

    if not callable(answer):
        return answer

    def both(logprobs, *others):
        logprobs = logprobs.clone().requires_grad_()
        losses = answer(logprobs, *others)
        if not isinstance(losses, torch.Tensor):
            return losses
        flat = torch.zeros_like(logprobs)
        slopes = torch.autograd.grad(losses.sum(), logprobs, allow_unused=True)[0] if losses.requires_grad else flat
        return losses.detach(), flat if slopes is None else slopes

    return both


def check_policy_losses(answer):
    """A function (logprobs, old_logprobs, advantages, cliprange) -> PPO's loss of every token, (B, T), with its gradient."""
    import torch

    advantages = torch.tensor([[1.0, 1.0, 1.0, 2.0], [-1.0, -1.0, -1.0, -0.5]])
    ratios = torch.tensor([[0.7, 1.05, 1.3, 1.5], [0.7, 0.95, 1.3, 0.55]])
    old = torch.tensor([[-1.0, -0.5, -2.0, -0.7], [-1.5, -0.1, -3.0, -0.4]])
    cases = [(old + ratios.log(), old, advantages, cliprange) for cliprange in (0.2, 0.4)]

    def made(how, ratio=lambda new, old: torch.exp(new - old)):
        return with_slopes(lambda new, old, A, c: how(A * ratio(new, old), A * ratio(new, old).clamp(1 - c, 1 + c)))

    right = lambda free, held: torch.max(-free, -held)
    within = lambda new, old, A, c: torch.max(-A * torch.exp(new - old), -A * torch.exp((new - old).clamp(-c, c)))
    hints = [
        (made(lambda free, held: torch.min(-free, -held)), "that is the better of the two losses, which lets a policy run; the clip needs the worse one: the max"),
        (made(lambda free, held: torch.min(free, held)), "that is what should grow; a loss falls: take its negative"),
        (made(lambda free, held: torch.max(free, held)), "the sign: a loss is minus the advantage times the ratio, and the worse of two is the max of these"),
        (made(lambda free, held: -free), "nothing is clipped yet: compare with the ratio held within 1 - cliprange and 1 + cliprange"),
        (made(lambda free, held: -held), "the clipped product alone: a token that moved the wrong way would get no gradient back; take the max of both"),
        (made(right, lambda new, old: torch.exp(old - new)), "the ratio is upside down: new over old"),
        (made(right, lambda new, old: new - old), "a difference of log-probs is the logarithm of the ratio: take exp"),
        (made(right, lambda new, old: new / old), "a ratio of log-probs is no ratio of probabilities: subtract, then take exp"),
        (with_slopes(within), "what is held within 1 - cliprange and 1 + cliprange is the ratio, not its logarithm within cliprange"),
        (made(lambda free, held: right(free, held).mean()), "one number came back; give one for each token: the trainer takes the mean itself, over real tokens"),
        (made(lambda free, held: right(free, held).sum(1)), "one number a response came back; give one for each token"),
        (made(lambda free, held: right(free, held).detach()), "the numbers are right, and no gradient comes back: nothing would be learnt (.item(), .detach(), no_grad?)"),
    ]  # fmt: skip
    expected = [(case, with_slopes(clipped_losses)(*case)) for case in cases]
    praise = "the worse of the two for each token, with its gradient: PPO's loss"
    function(with_slopes(answer), expected, hints, agree=near_pairs, praise=praise)


def trained_with(answer, train):
    """The history that `train()` returns with a loss function that has passed the check in the place of the package's; {} and a
    sentence before that."""
    from rlhf_helpers import ppo

    if not ticked(check_policy_losses, answer):
        print("once the exercise has its tick, this cell trains with your function")
        return {}
    package = ppo.policy_losses
    own = lambda *given: (answer(*given), package(*given)[1])  # which tokens are clipped, for the stats
    with mock.patch.object(ppo, "policy_losses", own):
        return train()


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
