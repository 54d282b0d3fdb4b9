"""The checks of exercises that build a part which then works in the notebook: an adapter, a padded batch, the advantages of a
trainer. As in `exercises`, a tick, or a cross with the likely mistake in words."""

from dataclasses import replace
from types import SimpleNamespace

from rlhf_helpers.config import CPU
from rlhf_helpers.course.grading import function, keeping, near_pairs, same


def check_lora(answer):
    """A function (x, W, A, B, alpha) -> W x + alpha / r B A x, for a vector x."""
    import torch

    def case(inputs, outputs, rank, alpha, seed):
        draw = torch.Generator().manual_seed(seed)
        shapes = (inputs,), (outputs, inputs), (rank, inputs), (outputs, rank)
        return *(torch.randn(shape, generator=draw) for shape in shapes), alpha

    right = lambda x, W, A, B, alpha: W @ x + alpha / len(A) * (B @ (A @ x))
    hints = [
        (lambda x, W, A, B, alpha: W @ x + B @ (A @ x), "the detour is weighed: alpha / r"),
        (lambda x, W, A, B, alpha: W @ x + alpha * (B @ (A @ x)), "alpha is divided by the rank r, the number of rows of A"),
        (lambda x, W, A, B, alpha: W @ x + alpha / len(x) * (B @ (A @ x)), "divide by the rank r, the number of rows of A, not by the inputs"),
        (lambda x, W, A, B, alpha: W @ x + alpha / len(B) * (B @ (A @ x)), "B has a row for each output; the rank r is the number of rows of A"),
        (lambda x, W, A, B, alpha: alpha / len(A) * (B @ (A @ x)), "that is the detour alone; the frozen W x goes beside it"),
        (lambda x, W, A, B, alpha: alpha / len(A) * (W @ x + B @ (A @ x)), "only the detour is weighed, W x stays as it is"),
    ]
    cases = [(case(6, 4, 2, 16.0, 0),), (case(3, 5, 4, 3.0, 1),)]
    function(answer, [(arguments, right(*arguments)) for (arguments,) in cases], hints, praise="and with B = 0 it is the frozen layer, to the bit")


def check_pad_left(answer):
    """A function (rows, pad) -> (ids, mask), both (B, L): 1-D LongTensors of different length, padded on the left."""
    import torch

    def padded(rows, pad, left=True, ones=False):
        width = max(map(len, rows))
        fill = lambda row, what: [torch.full((width - len(row),), what), row][:: 1 if left else -1]
        ids = torch.stack([torch.cat(fill(row, pad)) for row in rows])
        mask = torch.stack([torch.cat(fill(torch.ones_like(row), int(ones))) for row in rows])
        return ids, mask

    hints = [
        (lambda rows, pad: padded(rows, pad, left=False), "those pads are on the right: the last place of each row must be a real token"),
        (lambda rows, pad: padded(rows, pad, ones=True), "the mask is 1 on pads, too: they would be read as text"),
        (lambda rows, pad: padded(rows, pad)[0], "those are the ids; return the mask, too"),
        (lambda rows, pad: padded(rows, pad)[::-1], "the other way round: the ids first, then the mask"),
        (lambda rows, pad: (padded(rows, pad)[0], (padded(rows, pad)[0] != pad).long()), "a row may hold the pad's id as a real token: make the mask from lengths"),
        (lambda rows, pad: tuple(part.float() for part in padded(rows, pad)), "ids and mask are whole numbers: two LongTensors, dtype torch.long"),
        (lambda rows, pad: tuple(part.int() for part in padded(rows, pad)), "right but for the dtype: two LongTensors, dtype torch.long"),
        *(((lambda rows, pad, to=to: (padded(rows, pad)[0], padded(rows, pad)[1].to(to))), "the mask is a LongTensor, too: dtype torch.long")
          for to in (torch.float32, torch.bool, torch.int)),
        (lambda rows, pad: tuple(part.tolist() for part in padded(rows, pad)), "those are lists; two LongTensors are wanted"),
        (lambda rows, pad: (padded(rows, 0)[0], padded(rows, pad)[1]), "fill with the pad that was given, which need not be 0"),
    ]  # fmt: skip
    tensors = lambda *rows: [torch.tensor(row) for row in rows]
    cases = [(tensors([8], [6, 7, 4, 9], [7, 5]), 7), (tensors([5, 6], [9]), 3)]
    function(answer, [(case, padded(*case)) for case in cases], hints, agree=pairs_agree, praise="now put it to work below")


def pairs_agree(a, b):
    """Whether two pairs of tensors are the same, whole numbers both."""
    if not (isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b) == 2):
        return type(a) is type(b) and bool((a == b).all())
    kinds = lambda pair: [getattr(part, "dtype", type(part)) for part in pair]  # an embedding takes LongTensors alone
    return kinds(a) == kinds(b) and all(map(same, a, b))


def check_advantages(answer):
    """A function (rollout, config) -> (advantages, returns), both (B, T), as PPOTrainer(advantages=...) takes it."""
    import torch

    from rlhf_helpers import ppo

    def made(lam=None, whiten=ppo.whiten, after=False):
        """The right function, or with one change a wrong one."""

        def advantages(rollout, config, *_):
            raw, returns = ppo.gae(rollout.rewards, rollout.values, rollout.mask, config.gamma, config.lam if lam is None else lam)
            found = whiten(raw, rollout.mask)
            return found, (found + rollout.values if after else returns)

        return advantages

    on_real = lambda x, mask: (x - x[mask].mean()) / x[mask].std()  # and the pads are no longer 0
    everywhere = lambda x, mask: ppo.whiten(x, torch.ones_like(mask))
    on_mask = lambda x, mask: torch.where(mask, everywhere(x, mask), 0.0)
    population = lambda x, mask: ppo.whiten(x, mask) * torch.rsqrt(1 - 1 / mask.sum())
    by_row = lambda x, mask: torch.cat([ppo.whiten(one[None], real[None]) for one, real in zip(x, mask)])
    right = made()
    hints = [
        (made(whiten=population), "the deviation over n - 1, as torch's std takes it"),
        (made(whiten=lambda x, mask: x), "those are not whitened yet: less their mean, over their deviation, on real tokens"),
        (made(whiten=on_mask), "padding has been counted: mean and deviation are over the mask alone"),
        (made(whiten=on_real), "mean and deviation are right, but padding must stay 0: torch.where(mask, ..., 0.0)"),
        (made(whiten=everywhere), "padding has been whitened, too: it must stay 0, and not count"),
        (made(whiten=lambda x, mask: x * torch.rsqrt(ppo.masked_var(x, mask))), "subtract the mean, too"),
        (made(whiten=lambda x, mask: ppo.whiten(x, mask) * torch.rsqrt(ppo.masked_var(x, mask))), "divide by the deviation, not by the variance"),
        (made(whiten=by_row), "mean and deviation are over all real tokens of the batch, not row by row"),
        (made(after=True), "the returns are the raw advantages + values: whitened ones have another unit"),
        (lambda rollout, config, *_: right(rollout, replace(config, gamma=1.0)), "gamma is missing: it stands in the config, beside lam"),
        (lambda *args: (right(*args)[0], right(*args)[1] - args[0].values), "those returns are the raw advantages alone; add the values"),
        (made(lam=1.0), "lam is missing: it stands in the config, beside gamma"),
        (lambda *args: right(*args)[0], "those are the advantages; return the returns, too"),
        (lambda *args: right(*args)[::-1], "the other way round: the advantages first, then the returns"),
        (lambda *args: (right(*args)[0], args[0].values), "those are the values; a return is what the value should have been"),
    ]
    mask = ppo.response_mask(torch.tensor([4, 2, 3]), 4)
    draw = lambda seed: torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)), 0.0)
    rollout = SimpleNamespace(rewards=draw(0), values=draw(1), mask=mask, lengths=mask.sum(1))
    config = CPU.ppo_config(gamma=0.95, lam=0.9)
    function(keeping(answer), [((rollout, config, ppo.alone), right(rollout, config))], hints, agree=near_pairs, praise="the trainer below will take it")
