"""TRL 0.11.4's own numbers for one or two steps of a tiny model (tests/oracle) against ours; where ours differ, both."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_helpers import ppo
from rlhf_helpers.config import PPOConfig
from rlhf_helpers.models import PolicyWithValueHead
from rlhf_helpers.trainer import PPOTrainer
from tests import tiny

FOLDER = Path(__file__).parent / "oracle"
AGREE = (
    "base",
    "epochs4_mb1",
    "two_steps",
    "seed_like",
    "left_pad",
    "lora",
    "kl_full",
    "whiten_rewards_left",
    "adaptive_kl_short_horizon",
)
PER_TOKEN = dict(
    logprobs="old_logprobs",
    ref_logprobs="ref_logprobs",
    values="old_values",
    kl="kls",
    rewards="rewards",
    non_score_rewards="non_score_rewards",
    advantages="advantages",
    returns="returns",
)
INPUTS = json.loads((FOLDER / "inputs.json").read_text())


def language_model(name):
    lm = LlamaForCausalLM(LlamaConfig(**json.loads((FOLDER / "config.json").read_text()))).float().eval()
    lm.load_state_dict(load_file(FOLDER / f"{name}.safetensors"), strict=False)  # the head is tied
    return lm


def make_trainer(case, **changes):
    """Our trainer as TRL's was at the start of a case."""
    known = {name: value for name, value in case["config"].items() if name in PPOConfig.__dataclass_fields__}
    lm, ref_model = language_model("policy"), language_model("ref")
    if case["lora"]:
        lm, ref_model = tiny.with_lora(lm), None
        parameters = dict(lm.named_parameters())
        for name, tensor in load_file(FOLDER / "lora_init.safetensors").items():
            parameters[name.removeprefix("pretrained_model.")].data.copy_(tensor)
    policy = PolicyWithValueHead(lm)
    policy.load_state_dict(load_file(FOLDER / "vhead.safetensors"), strict=False)
    return PPOTrainer(PPOConfig(**known | changes), policy, ref_model, tiny.tokenizer())


def on_responses(tensor, mask):
    """The numbers on response tokens, row by row."""
    return torch.cat([row[keep] for row, keep in zip(tensor, mask.bool())])


@functools.cache
def replay(name, **changes):
    """Run a case with TRL's recorded minibatches. Returns (case, tensors, steps, final parameters); a step holds our stats, our
    rollout, (rows, stats) of every minibatch, and the gradients at every optimizer step."""
    case, tensors = json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors")
    trainer, steps = make_trainer(case, **changes), []
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    minibatch, optimizer_step = trainer._minibatch, trainer.optimizer.step

    def recorded_minibatch(rollout, rows):
        loss, stats = minibatch(rollout, rows)
        steps[-1]["minibatches"].append((rows, dict(stats)))
        return loss, stats

    def recorded_step():
        steps[-1]["gradients"].append({names[id(p)]: p.grad.clone() for p in trainer.parameters if p.grad is not None})
        optimizer_step()

    trainer._minibatch, trainer.optimizer.step = recorded_minibatch, recorded_step
    for number, theirs in enumerate(case["steps"]):
        order = iter(theirs["permutations"])
        trainer.permutation = lambda n: next(order)
        steps.append(dict(minibatches=[], gradients=[]))
        ids = [torch.tensor(x) for x in INPUTS["queries"]], [torch.tensor(x) for x in INPUTS["responses"][number]]
        steps[-1] |= dict(stats=trainer.step(*ids, INPUTS["scores"][number]), rollout=trainer.rollout, kl_coef=trainer.kl_coef)
    return case, tensors, steps, {n: p.detach() for n, p in trainer.model.named_parameters()}


def close(ours, theirs, what):
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), what


def norms(gradients):
    return [torch.cat([g.flatten() for g in each.values()]).double().norm().item() for each in gradients]


@pytest.mark.parametrize("name", AGREE)
def test_every_scalar_stat_and_the_kl_coefficient_agree(name):
    case, _, steps, _ = replay(name)
    for theirs, ours in zip(case["steps"], steps, strict=True):
        scalars = {key: value for key, value in theirs["stats"].items() if isinstance(value, (int, float))}
        assert len(scalars) >= 25
        for key, value in scalars.items():
            close(ours["stats"][key], value, key)
        close(ours["kl_coef"], theirs["kl_coef_after"], "kl_coef")


@pytest.mark.parametrize("name", AGREE)
def test_every_number_per_token_agrees(name):
    _, tensors, steps, _ = replay(name)
    for number, ours in enumerate(steps):
        for field, theirs in PER_TOKEN.items():
            expected = on_responses(tensors[f"step{number}/{theirs}"], tensors[f"step{number}/old_mask"])
            torch.testing.assert_close(
                on_responses(getattr(ours["rollout"], field), ours["rollout"].mask), expected, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("name", AGREE)
def test_every_minibatch_agrees(name):
    case, tensors, steps, _ = replay(name)
    for number, (theirs, ours) in enumerate(zip(case["steps"], steps)):
        for place, (expected, (rows, stats)) in enumerate(zip(theirs["minibatch_losses"], ours["minibatches"], strict=True)):
            for key, value in expected.items():
                close(stats[key], value, f"step {number}, minibatch {place}, {key}")
            mine = f"step{number}/mb{place}/"
            log_ratio = on_responses(tensors[mine + "logprobs"] - tensors[mine + "old_logprobs"], tensors[mine + "mask"])
            torch.testing.assert_close(torch.tensor(stats["policy/ratio"]), log_ratio.exp(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", AGREE)
def test_gradients_and_their_norms_agree(name):
    case, tensors, steps, _ = replay(name)
    for theirs, ours in zip(case["steps"], steps):
        for mine, expected in zip(norms(ours["gradients"]), theirs["grad_norms_at_optimizer_step"], strict=True):
            assert mine == pytest.approx(expected, rel=1e-4)
    for call, mine in enumerate(steps[-1]["gradients"][:2]):
        prefix = f"step{len(steps) - 1}/opt_after_mb{call}/grad/"
        expected = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        assert expected.keys() == mine.keys()
        for parameter, tensor in expected.items():
            torch.testing.assert_close(mine[parameter], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", AGREE)
def test_the_final_weights_agree(name):
    _, tensors, _, ours = replay(name)
    theirs = {key.removeprefix("final/"): tensor for key, tensor in tensors.items() if key.startswith("final/")}
    assert theirs.keys() == ours.keys()
    for parameter, tensor in theirs.items():
        torch.testing.assert_close(ours[parameter], tensor, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- where we differ on purpose


def test_trl_lets_whitened_pads_leak_into_advantages_on_the_right_and_we_do_not():
    """TRL whitens rewards over all positions, so a pad gets -mean / deviation + mean instead of 0, and GAE carries it back from
    behind the response. Ours are what TRL itself computes where the pads stand on the left, before the prompt."""
    _, right, steps, _ = replay("whiten_rewards")
    _, left, _, _ = replay("whiten_rewards_left")
    ours = on_responses(steps[0]["rollout"].returns, steps[0]["rollout"].mask)
    trl_right, trl_left = (on_responses(t["step0/returns"], t["step0/old_mask"]) for t in (right, left))
    torch.testing.assert_close(ours, trl_left, atol=1e-5, rtol=1e-5)
    assert (trl_right - trl_left).abs().max() > 0.1  # padding side alone changes TRL's returns

    rollout = steps[0]["rollout"]
    white = ppo.whiten(rollout.rewards, rollout.mask, shift_mean=False)
    for row, n in enumerate(rollout.lengths.tolist()):  # each response by itself, with no pads at all
        alone = ppo.gae(
            white[row : row + 1, :n], rollout.values[row : row + 1, :n], torch.ones(1, n, dtype=torch.bool), 1.0, 0.95
        )
        torch.testing.assert_close(rollout.returns[row, :n], alone[1][0], atol=1e-6, rtol=0)


def test_trl_averages_minibatch_means_and_we_give_the_gradient_of_the_group():
    """Responses of unequal length, one a minibatch, two a group: TRL's gradient is the mean of the two means, ours that of all
    tokens of the group, the same as with both in one minibatch."""
    case, tensors, steps, _ = replay("epochs4_mb2_ga2")
    _, _, together, _ = replay("epochs4_mb2_ga2", mini_batch_size=2, gradient_accumulation_steps=1)
    ours, whole = steps[0]["gradients"][0], together[0]["gradients"][0]
    prefix = "step0/opt_after_mb1/grad/"  # TRL's first optimizer step, after two minibatches
    theirs = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    assert theirs.keys() == ours.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(ours[name], whole[name], atol=1e-5, rtol=1e-4)
    assert norms([theirs])[0] == pytest.approx(case["steps"][0]["grad_norms_at_optimizer_step"][0], rel=1e-5)
    assert norms([theirs])[0] == pytest.approx(5.5096, abs=1e-3)
    assert norms([ours])[0] == pytest.approx(norms([whole])[0], rel=1e-5) == pytest.approx(5.9596, abs=1e-3)


def test_trl_clips_the_gradient_once_and_we_clip_it_at_every_optimizer_step():
    case, tensors, steps, _ = replay("max_grad_norm")
    theirs, ours = case["steps"][0]["grad_norms_at_optimizer_step"], norms(steps[0]["gradients"])
    assert len(theirs) == len(ours) == 4
    assert theirs[0] == pytest.approx(0.05, rel=1e-4) and all(norm > 0.4 for norm in theirs[1:])
    assert ours == [pytest.approx(0.05, rel=1e-4)] * 4
    for name, gradient in steps[0]["gradients"][0].items():  # up to there, the same numbers
        torch.testing.assert_close(gradient, tensors[f"step0/opt_after_mb0/grad/{name}"], atol=1e-5, rtol=1e-4)
    first = steps[0]["rollout"]
    for field, name in PER_TOKEN.items():
        expected = on_responses(tensors[f"step0/{name}"], tensors["step0/old_mask"])
        torch.testing.assert_close(on_responses(getattr(first, field), first.mask), expected, atol=1e-5, rtol=1e-5)
