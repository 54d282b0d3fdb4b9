"""`PPOTrainer.step`: one PPO update from one batch of responses, from log-probs to Adam. What is around it (`generate`, `train`,
`save`) is in `loop.py`.

Left out on purpose: a separate critic (the value head shares the policy's body), score scaling by running moments (scores
are standardised once, by the reward model), response masks with gaps, encoder-decoder models, uploading to a hub."""

import math
from types import SimpleNamespace

import torch

from rlhf_helpers import classic, fast, parts, ppo, sampling
from rlhf_helpers.loop import Loop
from rlhf_helpers.models import eos_ids, response_logits
from rlhf_helpers.quirks import accumulating_alone
from rlhf_helpers.rollout import checked_advantages, checked_batch, clipped_scores, collate, fill_rewards, gae_advantages
from rlhf_helpers.shard import everywhere
from rlhf_helpers.stats import Clock, minibatch_stats, sampler_stats, step_stats


class PPOTrainer(Loop):
    """PPO on a policy with a value head, after Ziegler et al. 2019 and TRL 0.11.4's trainer of the same name.

    `model` is a PolicyWithValueHead. `ref_model` is a causal LM or PolicyWithValueHead that is used as given, or None: the
    adapters switched off (a model without adapters is copied and frozen instead). `advantages` is what makes them of a
    rollout, by default GAE. After `step`, `rollout` holds every tensor of the step, (B, T) over response tokens; `history`
    holds the scalar stats of all steps. `permutation`, a function of n, orders the minibatches and may be replaced.

    Once a step has shown that the sampler's log-probs are the trainer's to the bit (`sampler_is_exact`), the next one trusts them:
    it takes them for its old log-probs and makes no scoring pass with the policy. The pass of its first optimizer step, made
    before anything moves, is compared with them; a difference brings the scoring pass back."""

    def __init__(self, config, model, ref_model=None, tokenizer=None, advantages=gae_advantages, **left_out):
        classic.refuse("PPOTrainer", left_out)
        parts.check_parts(config, model, ref_model, tokenizer, advantages)
        self.config, self.tokenizer, self.advantages = config, tokenizer, advantages
        self.accelerator = parts.processes(config)
        self.device = self.accelerator.device
        self.ref_model = parts.reference_of(model, ref_model, self.device)
        self.policy, self.optimizer = self.accelerator.prepare(model, parts.adam(model, config))
        self.model = self.accelerator.unwrap_model(self.policy)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.adapters = self.model.active_adapters()
        self.eos_ids = eos_ids(self.model.pretrained_model, tokenizer)
        self.generator = torch.Generator().manual_seed(config.seed + 1000 * self.accelerator.process_index)
        self.total = lambda number: self.accelerator.reduce(number, "sum")  # over processes; with one, the number itself
        self.permutation = lambda n: torch.randperm(n, generator=self.generator).tolist()
        self.kl_coef = config.init_kl_coef
        self.steps_done, self.history, self.rollout = 0, [], None
        self.sampler_is_exact = False

    # ------------------------------------------------------------ step

    def step(self, queries, responses, scores, prompts=None, **left_out):
        """One PPO update. `queries` and `responses`: batch_size 1-D LongTensors of token ids each, as they were sampled;
        `scores`: batch_size numbers. Returns the stats under TRL 0.11's keys. Bad input raises InputError before anything
        changes; RuntimeError if an adapter got no gradient."""
        classic.refuse("step", left_out)
        clock, size = Clock(), self.config.batch_size
        parts.check_still_learns(self.model, self.parameters, self.optimizer, self._in_use())
        trusts = self.sampler_is_exact and self.config.kl_penalty != "full"
        self.rollout = self._collect("step", queries, responses, scores, size, prompts, None, self.total, clock, trusts)
        half = parts.told_if_half(self.parameters, self.rollout.weights, self.steps_done + 1)
        with half, accumulating_alone(self.accelerator):
            stats = self._learn(self.rollout, trusts, clock)
        self.steps_done += 1
        scalars = {name: value for name, value in stats.items() if isinstance(value, (int, float))}
        self.history.append({"step": self.steps_done, **scalars})
        if self.config.log_with:
            self.accelerator.log(scalars, step=self.steps_done)
        return stats

    def _learn(self, rollout, trusts, clock):
        """The update and its stats, from a whole rollout."""
        config, updates = self.config, self._optimize(rollout)
        clock.lap("time/ppo/optimize_step")
        stats = step_stats(rollout, updates, self.kl_coef, self.total)
        compared = (rollout.first_logprobs, rollout.first_rows) if trusts else (rollout.logprobs,)
        stats |= sampler_stats(rollout, self.accelerator, *compared)
        self.sampler_is_exact = stats["objective/sampler_max_diff"] == 0
        clock.lap("time/ppo/calc_stats")
        stats |= {
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
            **clock.laps,
            "time/ppo/total": sum(clock.laps.values()),
        }
        if config.adap_kl_ctrl and math.isfinite(stats["objective/kl"]):
            n_samples = config.batch_size * self.accelerator.num_processes
            self.kl_coef = ppo.next_kl_coef(self.kl_coef, stats["objective/kl"], config.target, config.horizon, n_samples)
        return stats

    def inspect(self, queries, responses, scores=None, advantages=None):
        """The Rollout that `step` would learn from, without learning; for any number of responses (whole groups, if the trainer's
        `advantages` compare those; others can be given). Without scores, they are 0."""
        size = len(responses) if hasattr(responses, "__len__") else 0
        scores = torch.zeros(size) if scores is None else scores
        return self._collect("inspect", queries, responses, scores, size, None, advantages, ppo.alone, Clock())

    def _collect(self, call, queries, responses, scores, size, prompts, advantages, total, clock, trusts=False):
        """The rollout of one `call`, step or inspect: log-probs under policy and reference, values, rewards, advantages, returns. No
        gradients. `total` makes the whitening that of all processes; where it `trusts` the sampler, what that noted takes the
        place of the policy's pass."""
        config, tokenizer, text = self.config, self.tokenizer, self.model.config.get_text_config()
        expected = f"PPOConfig.batch_size = {size}" if call == "step" else f"{size}, one for each response"
        as_given, weights = responses, self._weights()
        given = checked_batch(call, queries, responses, scores, size, text, expected, prompts)
        queries, responses, scores, prompts = given
        notes = sampling.how_drawn(queries, as_given, config.temperature, weights)
        sampling.warn_of_slips(queries, responses, notes, self.eos_ids, tokenizer.pad_token_id)
        ended = sampling.ended(as_given, self.eos_ids)
        scores = clipped_scores(scores, ended, config)
        rollout = collate(queries, responses, scores, tokenizer.pad_token_id, self.device)
        rollout.ended, rollout.weights, rollout.texts = ended.to(self.device), weights, self.decode(responses)
        rollout.prompts = tokenizer.batch_decode(queries) if prompts is None else prompts
        rollout.sampler_logprobs, hidden = sampling.padded(notes, self.device)
        trusts = trusts and everywhere(hidden is not None, self.model.pretrained_model)  # one pass more, or less, is for all
        chunks = torch.arange(len(rollout), device=self.device).split(config.mini_batch_size)
        scored = [self._score_tokens(rollout, rows, hidden if trusts else None) for rows in chunks]
        rollout.logprobs, rollout.ref_logprobs, rollout.values, rollout.kl = (torch.cat(part) for part in zip(*scored))
        clock.lap("time/ppo/forward_pass")
        fill_rewards(rollout, self.kl_coef)
        clock.lap("time/ppo/compute_rewards")
        rollout.advantages, rollout.returns = checked_advantages(
            (advantages or self.advantages)(rollout, config, total), rollout
        )
        rollout.new_logprobs = torch.full_like(rollout.logprobs, math.nan)
        clock.lap("time/ppo/compute_advantages")
        return rollout

    @torch.no_grad()
    def _score_tokens(self, rollout, rows, hidden=None):
        """(logprobs, ref_logprobs, values, kl) of some rows, by the forward pass that training uses, at the same shapes; or, where
        the sampler's `hidden` states (B, T, H) are given, without the policy's pass."""
        ids, mask, temperature = rollout.response_ids[rows], rollout.mask[rows], self.config.temperature
        with self.model.without_dropout():
            if hidden is None:
                logits, values = self.model(*rollout.inputs(rows))
                logprobs, _ = fast.token_logprobs(logits, ids, mask, temperature)
            else:
                logits, values, logprobs = None, self.model.v_head(hidden[rows]), rollout.sampler_logprobs[rows]
            if self.config.kl_penalty != "full":
                del logits  # the largest tensor of all, (B, T, vocabulary)
            ref_logits = self._reference_logits(rollout, rows)
        ref_logprobs, _ = fast.token_logprobs(ref_logits, ids, mask, temperature)
        if self.config.kl_penalty == "full":
            kl = ppo.full_kl_per_token(logits, ref_logits, mask, temperature)
        else:
            kl = ppo.kl_per_token(logprobs, ref_logprobs, self.config.kl_penalty)
        return logprobs, ref_logprobs, torch.where(mask, values, 0.0), kl

    def _reference_logits(self, rollout, rows):
        if self.ref_model is not None:
            self.ref_model.eval()  # another trainer may train it, with dropout
            return response_logits(self.ref_model, *rollout.inputs(rows))
        with self.model.adapters_off():
            return response_logits(self.model.pretrained_model, *rollout.inputs(rows))

    def _group_size(self):
        """Responses of one optimizer step."""
        return self.config.mini_batch_size * self.config.gradient_accumulation_steps

    def _optimize(self, rollout):
        """All epochs of one step. Returns the stats of every minibatch, a list of dicts."""
        config, updates = self.config, []
        for _ in range(config.ppo_epochs):
            order = parts.checked_order(self.permutation(len(rollout)), len(rollout))
            for group in order.to(self.device).split(self._group_size()):
                updates += self._update(rollout, group)
                if rollout.first_logprobs is None:  # those of this group were taken before anything moved
                    rollout.first_logprobs, rollout.first_rows = rollout.new_logprobs.clone(), group
            if config.early_stopping and updates[-1]["policy/policykl"] > 1.5 * config.target_kl:
                break
        return updates

    def _update(self, rollout, group):
        """One optimizer step on the rows `group`, a minibatch at a time. A token counts the same in whichever minibatch, and
        on whichever process, it is, so that accumulation gives the gradient of the whole group."""
        updates, usable = [], True
        self.optimizer.zero_grad()  # an update before this one may have been interrupted
        tokens_per_process = self.total(rollout.mask[group].sum()) / self.accelerator.num_processes  # gradients are averaged
        with self.model.without_dropout(checkpointing=True), fast.keeping_less(self.model.pretrained_model):
            for rows in group.split(self.config.mini_batch_size):
                loss, stats = self._minibatch(rollout, rows)
                usable &= math.isfinite(stats["loss/total"]) and stats["policy/ratio_mean"] <= self.config.ratio_threshold
                self.accelerator.backward(loss * rollout.mask[rows].sum() / tokens_per_process)
                updates.append(stats)
        self.model.require_gradients()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        usable = usable and bool(torch.isfinite(norm))
        if usable:
            self.optimizer.step()
        self.optimizer.zero_grad()
        updates[-1].update({"grad_norm": float(norm), "skipped": float(not usable)})
        return updates

    def _minibatch(self, rollout, rows):
        """(loss, stats) of one minibatch, the loss with gradients."""
        config, mask, new = self.config, rollout.mask[rows], SimpleNamespace()
        logits, values = self.policy(*rollout.inputs(rows))
        new.values = torch.where(mask, values, 0.0)
        new.logprobs, new.entropy = fast.token_logprobs(logits, rollout.response_ids[rows], mask, config.temperature)
        new.policy_losses, new.policy_clipped = ppo.policy_losses(
            new.logprobs, rollout.logprobs[rows], rollout.advantages[rows], config.cliprange
        )
        new.value_losses, new.value_clipped = ppo.value_losses(
            new.values, rollout.values[rows], rollout.returns[rows], config.cliprange_value
        )
        policy_loss, value_loss = ppo.masked_mean(new.policy_losses, mask), ppo.masked_mean(new.value_losses, mask)
        loss = policy_loss + config.vf_coef * value_loss
        with torch.no_grad():
            rollout.new_logprobs[rows] = new.logprobs
            stats = minibatch_stats(rollout, rows, new, config.vf_coef, self.total)
        return loss, stats
