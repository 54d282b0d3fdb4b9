"""Real updates by TRL 1.12's PPOTrainer and by ours, from the same weights, responses and scores: the same numbers where both
mean the same, both numbers and who is right where they do not. And TRL loads our checkpoint.

TRL's critic is a model of its own. Here it gets the policy's body and our value head, so that it says what our head says."""

import copy
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from rlhf_helpers import ppo
from rlhf_helpers.config import PPOConfig
from rlhf_helpers.models import quantization_config, response_logits
from rlhf_helpers.quirks import keep_gradients
from rlhf_helpers.sampling import pad_left
from tests import tiny
from tests.tiny import EOS, batch, llama, with_lora

trl = pytest.importorskip("trl", reason="TRL 1.12 is not installed (pip install trl==1.12.0)", exc_type=ImportError)
if not trl.__version__.startswith("1.12."):
    pytest.skip(f"TRL {trl.__version__} is installed; this is about 1.12", allow_module_level=True)
trl = pytest.importorskip("trl.experimental.ppo", reason="TRL's PPO cannot be imported", exc_type=ImportError)
ppo_trainer = sys.modules[trl.PPOTrainer.__module__]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TRL_NAMES = {"batch_size": "per_device_train_batch_size", "ppo_epochs": "num_ppo_epochs", "init_kl_coef": "kl_coef"}
PER_TOKEN = dict(  # a tensor of our Rollout, and its name in TRL's training loop
    logprobs="logprobs",
    ref_logprobs="ref_logprobs",
    values="values",
    kl="kl",
    non_score_rewards="non_score_reward",
    rewards="rewards",
    advantages="advantages",
    returns="returns",
)


# ---------------------------------------------------------------- the two runs


class KnownReward(nn.Module):
    """The scores, in the shape of a reward model that TRL takes: a backbone, and `score` on its last hidden state."""

    base_model_prefix = "backbone"

    def __init__(self, scores):
        super().__init__()
        self.scores, self.score = torch.tensor(scores), nn.Identity()

    def backbone(self, input_ids, **_):
        return SimpleNamespace(hidden_states=[self.scores.to(input_ids.device)[:, None, None].expand(*input_ids.shape, 1)])


def policy():
    """The language model that both start from; its adapters already differ from the reference."""
    return with_lora(llama(), b_scale=0.2)


def critic(value_head):
    """TRL's value model: the policy with its adapters merged, under our value head's weights."""
    lm = policy().merge_and_unload()
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).float().eval()
    model.model.load_state_dict(lm.model.state_dict())
    model.score.weight.data.copy_(value_head.summary.weight)
    return model


def record_optimizer(trainer, run):
    """Keep the adapters' gradients before, and their weights after, every optimizer step in `run`."""
    step, run.gradients, run.weights = trainer.optimizer.step, [], []
    lora = {name.partition(".")[2]: p for name, p in trainer.model.named_parameters() if "lora_" in name}

    def recorded():
        run.gradients.append({name: p.grad.cpu().clone() for name, p in lora.items()})
        step()
        run.weights.append({name: p.detach().cpu().clone() for name, p in lora.items()})

    trainer.optimizer.step = recorded


def run_trl(data, value_head, tokenizer, steps, generation_dtype, **settings):
    """Train with TRL. `loop` holds, for every backward pass, the tensors of TRL's training loop; `metrics` what it logs."""
    queries, responses, scores = data
    pad, temperature = tokenizer.pad_token_id, settings["temperature"]
    queries, responses = pad_left(queries, pad)[0], pad_sequence(responses, batch_first=True, padding_value=pad)

    @torch.no_grad()
    def batch_generation(model, queries, *_):
        """What TRL's own gives: prompts with responses, and the scores of `generate`, from which it takes the old log-probs."""
        whole = torch.cat([queries, responses.to(queries.device)], 1)
        logits = ppo_trainer.forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits.to(generation_dtype).float() / (temperature + 1e-7)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ppo_trainer, "batch_generation", batch_generation):
        args = trl.PPOConfig(
            output_dir=folder,
            total_episodes=steps * len(scores),
            response_length=responses.shape[1],
            stop_token="eos",
            gradient_checkpointing=False,
            bf16=False,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{TRL_NAMES.get(name, name): value for name, value in settings.items()},
        )
        reward_model, value_model = KnownReward(scores), critic(value_head)
        trainer = trl.PPOTrainer(args, tokenizer, policy(), None, reward_model, range(len(scores)), value_model)
        trainer.dataloader = [{"input_ids": queries}]  # TRL's own would shuffle
        run = SimpleNamespace(loop=[], metrics=[])
        trainer.log = run.metrics.append
        backward = trainer.accelerator.backward

        def recorded(loss):
            names = sys._getframe(1).f_locals  # of TRL's `train`, one function that does everything
            run.loop.append({name: x.detach().cpu().clone() for name, x in names.items() if isinstance(x, torch.Tensor)})
            run.loop[-1]["rows"] = torch.as_tensor(names["micro_batch_inds"])
            backward(loss)

        trainer.accelerator.backward = recorded
        record_optimizer(trainer, run)
        trainer.train()
    return run


def both(data, trl_only={}, tokenizer=tiny.tokenizer(), steps=1, generation_dtype=torch.float32, **settings):
    """The same updates by each, in one minibatch: (TRL's run, ours). `settings` are PPOConfig's, by our names."""
    shared = dict(batch_size=len(data[2]), ppo_epochs=1, learning_rate=1e-2, init_kl_coef=0.05, temperature=1.0) | settings
    trainer = tiny.trainer(policy(), tokenizer=tokenizer, mini_batch_size=len(data[2]), adap_kl_ctrl=False, **shared)
    theirs = run_trl(data, trainer.model.v_head, tokenizer, steps, generation_dtype, **shared | trl_only)
    ours = SimpleNamespace()
    record_optimizer(trainer, ours)
    trainer.permutation = range
    ours.stats = [trainer.step(*data) for _ in range(steps)]
    ours.rollout, ours.mask = trainer.rollout, trainer.rollout.mask
    return theirs, ours


def responses_of(*lengths, ended=True):
    """(queries, responses, scores), one for each length; all but the longest end in EOS, if `ended`."""
    queries, responses, scores = batch(len(lengths), lengths=lengths)
    for response in responses:
        if ended and len(response) < max(lengths):
            response[-1] = EOS
    return queries, responses, scores


FULL = responses_of(8, 8, 8, 8)  # none ends: no pads
ENDED = responses_of(6, 3, 8, 5)


def close(ours, theirs, tolerance=1e-5):
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, check_dtype=False)


def norm(tensors):
    return torch.cat([x.flatten() for x in tensors.values()]).norm().item()


# ---------------------------------------------------------------- where both mean the same


SAME = {
    "the defaults": {},
    "discounting": dict(gamma=0.9, lam=0.8),
    "temperature 0.7": dict(temperature=0.7),
    "a penalty for a missing EOS": dict(missing_eos_penalty=1.0),
    "a dearer KL": dict(init_kl_coef=1.0),
    "a narrow clip": dict(cliprange_value=0.01),
}


@pytest.mark.parametrize("case", SAME)
def test_responses_of_one_length_give_the_same_numbers(case):
    theirs, ours = both(FULL, **SAME[case])
    for field, name in PER_TOKEN.items():
        close(getattr(ours.rollout, field), theirs.loop[0][name])
    close(ours.rollout.scores, theirs.loop[0]["scores"])
    close(ours.stats[0]["ppo/policy/ratio"], theirs.loop[0]["ratio"].flatten())
    for stat, name in {"ppo/loss/policy": "pg_loss", "ppo/loss/value": "vf_loss", "ppo/loss/total": "loss"}.items():
        close(ours.stats[0][stat], theirs.loop[0][name].item())
    stats = {"kl": "objective/kl", "entropy": "objective/entropy", "scores": "ppo/mean_scores"}
    for name, stat in stats.items():
        close(ours.stats[0][stat], theirs.metrics[0][f"objective/{name}"])
    for name, stat in {"policy/entropy_avg": "ppo/policy/entropy", "val/clipfrac_avg": "ppo/val/clipfrac"}.items():
        close(ours.stats[0][stat], theirs.metrics[0][name])


def test_whitened_rewards_of_one_length_are_the_same():
    theirs, ours = both(responses_of(*[8] * 8), whiten_rewards=True)  # TRL wants minibatches of 8 for it
    close(ppo.whiten(ours.rollout.rewards, ours.mask, shift_mean=False), theirs.loop[0]["rewards"])
    close(ours.rollout.advantages, theirs.loop[0]["advantages"])
    close(ours.rollout.returns, theirs.loop[0]["returns"])


def test_kl_log_probs_and_scores_are_the_same_at_unequal_lengths():
    theirs, ours = both(ENDED, missing_eos_penalty=1.0)
    for field in ("logprobs", "ref_logprobs", "values", "kl", "non_score_rewards"):
        close(getattr(ours.rollout, field)[ours.mask], theirs.loop[0][PER_TOKEN[field]][ours.mask])
    close(ours.rollout.scores, theirs.loop[0]["scores"])
    assert (torch.tensor(ENDED[2]) - ours.rollout.scores).tolist() == [0, 0, 1, 0]  # the third alone does not end


def test_four_epochs_on_unequal_lengths_move_the_adapters_alike():
    """With gamma = lambda = 1, TRL's late score (below) reaches every token undiminished, and without a value loss our adapters
    learn from the policy's loss alone, as TRL's always do."""
    theirs, ours = both(ENDED, gamma=1.0, lam=1.0, vf_coef=0.0, ppo_epochs=4)
    close(ours.rollout.advantages, theirs.loop[0]["advantages"])
    close(ours.rollout.returns[ours.mask], theirs.loop[0]["returns"][ours.mask])
    ratios = torch.as_tensor(ours.stats[0]["ppo/policy/ratio"]).split(int(ours.mask.sum()))
    for epoch, loop in enumerate(theirs.loop):
        close(ratios[epoch], loop["ratio"][loop["rows"].argsort()][ours.mask])
        for name, gradient in ours.gradients[epoch].items():
            close(gradient, theirs.gradients[epoch][name])
            close(ours.weights[epoch][name], theirs.weights[epoch][name])
    assert ratios[0].eq(1).all() and ratios[3].max() > 2  # the clip was at work
    close(ours.stats[0]["ppo/loss/policy"], theirs.metrics[0]["loss/policy_avg"])
    close(ours.stats[0]["ppo/policy/clipfrac"], theirs.metrics[0]["policy/clipfrac_avg"])


# ---------------------------------------------------------------- where they differ


def test_trl_pays_a_finished_response_one_slot_late():
    """TRL puts the score on the first pad behind EOS, so its return is discounted once more than that of a response which was
    cut at the length limit. Ours come with the last token: nothing follows it, so it is worth the whole score."""
    theirs, ours = both(ENDED, gamma=0.5, lam=1.0, init_kl_coef=0.0)
    rows, last, scores = torch.arange(4), ours.rollout.lengths - 1, torch.tensor(ENDED[2])
    close(ours.rollout.returns[rows, last], scores)
    close(theirs.loop[0]["returns"][rows, last], scores * torch.tensor([0.5, 0.5, 1, 0.5]))


def test_so_trls_returns_depend_on_the_neighbours_in_the_batch_and_ours_do_not():
    """A finished response has a pad to be paid on only if a longer one is beside it."""
    pick = lambda *rows: tuple([column[row] for row in rows] for column in ENDED)
    theirs, ours = zip(*(both(pick(*rows)) for rows in ((0, 0), (0, 0, 2))))
    close(ours[0].rollout.returns[0, :6], ours[1].rollout.returns[0, :6])
    alone, beside = (run.loop[0]["returns"][0, :6] for run in theirs)
    close(alone, ours[0].rollout.returns[0, :6])
    close((beside - alone).abs().max(), 0.0237, 1e-3)


def test_trl_also_trains_the_value_of_the_state_behind_the_end():
    """There, TRL wants the value to be the score; but the response is over and nothing is still to come, so ours is 0 by
    definition, neither predicted nor trained. Where gamma = lambda = 1, that slot is all that differs."""
    theirs, ours = both(ENDED, gamma=1.0, lam=1.0)
    loop, behind = theirs.loop[0], ~theirs.loop[0]["padding_mask_p1"] & ~ours.mask
    assert (int(behind.sum()), int(ours.mask.sum())) == (3, 22)
    close(loop["returns"][behind], torch.tensor(ENDED[2])[[0, 1, 3]])
    assert loop["values"][behind].abs().min() > 0.1 and (ours.rollout.values[behind] == 0).all()
    extra = 0.5 * ((loop["values"] - loop["returns"])[behind] ** 2).sum()
    close(loop["vf_loss"], (22 * ours.stats[0]["ppo/loss/value"] + extra) / 25)
    close(ours.stats[0]["ppo/loss/value"], 0.8263, 1e-3)
    close(loop["vf_loss"], 0.8247, 1e-3)


def test_given_that_slot_our_functions_give_trls_advantages_returns_and_losses():
    """GAE, whitening (mean and unbiased variance over real tokens) and both losses are the same functions."""
    theirs, ours = both(ENDED, gamma=0.9, lam=0.8)
    loop, with_slot = theirs.loop[0], ~theirs.loop[0]["padding_mask_p1"]
    advantages, returns = ppo.gae(loop["rewards"], loop["values"], with_slot, 0.9, 0.8)
    close(returns, loop["returns"])
    close(ppo.whiten(advantages, ours.mask), loop["advantages"])
    order = loop["rows"]
    losses, _ = ppo.value_losses(loop["vpred"], loop["values"][order], returns[order], 0.2)
    close(ppo.masked_mean(losses, with_slot[order]), loop["vf_loss"])
    losses, _ = ppo.policy_losses(loop["new_logprobs"], loop["logprobs"][order], loop["advantages"][order], 0.2)
    close(ppo.masked_mean(losses, ours.mask[order]), loop["pg_loss"])
    assert (loop["returns"] - ours.rollout.returns)[ours.mask].abs().max() > 0.4  # but without it, ours are others


def test_trl_whitens_rewards_with_the_slot_and_we_over_real_tokens():
    theirs, ours = both(responses_of(6, 3, 8, 5, 6, 3, 8, 5), whiten_rewards=True)
    loop = theirs.loop[0]
    rewards = loop["non_score_reward"].clone()
    rewards[loop["actual_start"], loop["actual_end"]] += loop["scores"]
    whitened = ppo.whiten(rewards, ~loop["padding_mask_p1"], shift_mean=False)
    close(whitened, loop["rewards"])
    close(ppo.masked_var(whitened, ~loop["padding_mask_p1"]), 1.0)
    own = ppo.whiten(ours.rollout.rewards, ours.mask, shift_mean=False)
    close(ppo.masked_var(own, ours.mask), 1.0)
    assert not torch.allclose(own.sum(1), whitened.sum(1), atol=0.05)


def test_trl_adds_a_tenth_of_a_millionth_to_the_temperature():
    """So that 0 divides by nothing; PPOConfig refuses 0 instead. At 0.7 the difference is lost in fp32's rounding (see above);
    at 0.001 the log-probs of TRL are those of 0.0010001."""
    theirs, ours = both(FULL, temperature=1e-3)
    with torch.no_grad():
        logits = response_logits(llama(), *ours.rollout.inputs(slice(None)))
    at = lambda temperature: ppo.logprobs_from_logits(logits, ours.rollout.response_ids, ours.mask, temperature)
    close(ours.rollout.ref_logprobs, at(1e-3), 1e-6)
    close(theirs.loop[0]["ref_logprobs"], at(1e-3 + 1e-7), 1e-6)
    assert (theirs.loop[0]["ref_logprobs"] - ours.rollout.ref_logprobs).abs().max() > 0.4
    with pytest.raises(ValueError, match="temperature"):
        PPOConfig(temperature=0.0)


def test_where_pad_is_eos_trl_does_not_train_eos_and_does_not_read_it_in_the_prompt():
    """TRL's masks are `ids != pad`. Ours come from lengths: the model learns to stop, and a chat template may hold EOS."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    queries, responses, scores = ENDED
    queries = [torch.tensor([5, EOS, 6, 7]), *queries[1:]]
    theirs, ours = both((queries, responses, scores), tokenizer=tokenizer)
    trained = ~theirs.loop[0]["padding_mask"]
    assert trained.sum(1).tolist() == [5, 2, 8, 4] and ours.mask.sum(1).tolist() == [6, 3, 8, 5]
    error = ((theirs.loop[0]["ref_logprobs"] - ours.rollout.ref_logprobs).abs() * trained).amax(1)
    assert error[0] > 0.1 and error[1:].max() < 1e-5
    with torch.no_grad():  # the truth: that row by itself, without any pad
        alone = llama()(torch.cat([queries[0], responses[0]])[None]).logits[:, 3:-1]
    alone = ppo.logprobs_from_logits(alone, responses[0][None], torch.ones(1, 6, dtype=torch.bool))
    close(ours.rollout.ref_logprobs[0, :6], alone[0])


def test_trls_k3_is_never_negative_but_inside_the_reward_it_hardly_pulls():
    """Ours refuse it. Over the whole vocabulary, at every position: with k1 in the reward, the policy gradient is exactly the
    gradient of KL(policy || reference); with k3, near the reference, next to nothing is left of it."""
    theirs, ours = both(ENDED, trl_only=dict(kl_estimator="k3"))
    k1, k3 = ours.rollout.kl[ours.mask], theirs.loop[0]["kl"][ours.mask]
    close(k3, torch.exp(-k1) - 1 + k1)
    assert k1.min() < -0.5 and k3.min() >= 0
    with pytest.raises(ValueError, match="kl_penalty is 'k3'"):
        PPOConfig(kl_penalty="k3")

    inputs = ours.rollout.inputs(slice(None))
    with torch.no_grad():
        logits, ref_logits = (response_logits(lm, *inputs).double() for lm in (with_lora(llama(), b_scale=0.02), llama()))
    log, ref = logits.requires_grad_().log_softmax(-1), ref_logits.log_softmax(-1)
    gradient = lambda objective: torch.autograd.grad(objective.sum(), logits, retain_graph=True)[0]
    pull = lambda penalty: gradient(log.exp().detach() * penalty.detach() * log)  # E[penalty * grad log pi]
    true = gradient(log.exp() * (log - ref))
    close(pull(log - ref), true, 1e-12)
    close(pull(torch.exp(ref - log) - 1 - (ref - log)).norm() / true.norm(), 0.0588, 1e-3)


def test_trl_averages_approxkl_ratio_and_entropy_over_pads_as_well():
    """22 of 32 positions are tokens. On pads the ratio is 1, so TRL's figures look the tamer the more pads there are."""
    theirs, ours = both(ENDED, gamma=1.0, lam=1.0, vf_coef=0.0, ppo_epochs=2)
    metrics, stats, share = theirs.metrics[0], ours.stats[0], 22 / 32
    close(metrics["policy/approxkl_avg"], stats["ppo/policy/approxkl"] * share)
    close(metrics["val/ratio"] - 1, (stats["ppo/policy/ratio_mean"] - 1) * share)
    close([metrics["policy/approxkl_avg"], stats["ppo/policy/approxkl"]], [0.0441, 0.0641], 1e-3)
    close([metrics["val/ratio"], stats["ppo/policy/ratio_mean"]], [1.081, 1.118], 1e-3)
    close([metrics["policy/entropy_avg"], stats["ppo/policy/entropy"]], [4.279, 4.247], 1e-3)


def test_trl_logs_the_kl_reward_per_response_and_we_per_token_as_trl_011_did():
    theirs, ours = both(ENDED)
    close(theirs.metrics[0]["objective/non_score_reward"], ours.stats[0]["ppo/mean_non_score_reward"] * 22 / 4)


def test_trl_takes_old_log_probs_from_generate_and_we_from_the_pass_that_trains():
    """Kernels differ between decoding and training (here: bf16 logits), so TRL's ratio is off before anything has moved."""
    theirs, ours = both(FULL, generation_dtype=torch.bfloat16)
    assert (theirs.loop[0]["ratio"] - 1).abs().max() > 1e-3
    assert (ours.stats[0]["ppo/policy/ratio"] == 1).all()


def test_trls_adamw_is_our_adam_until_weights_decay():
    """By default nothing decays. Decay would pull the adapters, and so the policy, towards the reference, beside the KL."""
    start = {name: p for name, p in policy().named_parameters() if "lora_" in name}
    theirs, ours = both(FULL, vf_coef=0.0)
    decayed, _ = both(FULL, vf_coef=0.0, trl_only=dict(weight_decay=0.1))
    for name, weight in ours.weights[0].items():
        close(weight, theirs.weights[0][name])
        close(weight - decayed.weights[0][name], 1e-2 * 0.1 * start[name].detach())


def test_trls_learning_rate_falls_to_zero_over_the_run_and_ours_stays():
    theirs, ours = both(FULL, steps=2)
    assert [metrics["lr"] for metrics in theirs.metrics] == [0.01, 0.005]
    assert [stats["ppo/learning_rate"] for stats in ours.stats] == [0.01, 0.01]


def test_trl_never_clips_the_gradient_whatever_max_grad_norm_says():
    theirs, ours = both(FULL, vf_coef=0.0, max_grad_norm=0.05)
    close(norm(theirs.gradients[0]), 2.4365, 1e-3)
    close(norm(ours.gradients[0]), 0.05, 1e-4)


def test_our_value_loss_reaches_the_adapters_and_trls_does_not():
    """Neither is wrong: our value head sits on the policy's body, TRL's critic has one of its own (and trains all of it)."""
    theirs, ours = both(FULL, vf_coef=0.1)
    _, policy_only = both(FULL, vf_coef=0.0)
    for name, gradient in policy_only.gradients[0].items():
        close(gradient, theirs.gradients[0][name])
    close([norm(theirs.gradients[0]), norm(ours.gradients[0])], [2.4365, 2.4391], 1e-4)


# ---------------------------------------------------------------- TRL and PEFT load what we save


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_trls_value_head_model_and_plain_peft_load_our_checkpoint_and_say_the_same(kind, llama_folder, tmp_path):
    options = dict(dtype=torch.float32, attn_implementation="eager")
    if kind == "nf4":
        options |= dict(dtype=torch.bfloat16, quantization_config=quantization_config(), device_map={"": "cpu"})
    base = lambda: AutoModelForCausalLM.from_pretrained(llama_folder, **options).requires_grad_(False)
    trainer = tiny.trainer(with_lora(base(), b_scale=0.2))
    trainer.step(*batch())
    trainer.save(tmp_path / "checkpoint")
    ids, attention, width = trainer.rollout.inputs(slice(None))
    responses = slice(-width - 1, -1)
    with torch.no_grad():
        logits, values = trainer.model(ids, attention, width)
    assert values.std() > 0.1 and trainer.model.v_head.summary.bias != 0

    whole = dict(input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0))
    loaded = trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "checkpoint"), **options).eval()
    plain = PeftModel.from_pretrained(base(), tmp_path / "checkpoint").eval()
    for model in (loaded, plain):
        keep_gradients(model)  # else an AVX512-BF16 CPU takes another 4-bit kernel
    with torch.no_grad():
        their_logits, _, their_values = loaded(**whole)
        close(their_values[:, responses][trainer.rollout.mask], values[trainer.rollout.mask])
        close(their_logits[:, responses][trainer.rollout.mask], logits[trainer.rollout.mask])
        close(plain(**whole).logits[:, responses][trainer.rollout.mask], logits[trainer.rollout.mask])
    assert isinstance(loaded.pretrained_model, PeftModel)
