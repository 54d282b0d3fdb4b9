"""`PPOTrainer`: generate, score, step. One step is one PPO update from one batch of responses.

Left out on purpose: a separate critic (the value head shares the policy's body), score scaling by running moments (scores
are standardised once, by the reward model), response masks with gaps, encoder-decoder models, uploading to a hub."""

import contextlib
import copy
import math
import time
import warnings

import numpy as np
import torch
from accelerate import Accelerator

from rlhf_helpers import ppo
from rlhf_helpers.checkpoint import load_checkpoint, save_checkpoint
from rlhf_helpers.config import project_root
from rlhf_helpers.models import (
    PolicyWithValueHead,
    device_and_dtype,
    encode_prompt,
    give_back_large_blocks,
    is_4bit,
    response_logits,
)
from rlhf_helpers.rollout import collate, fill_advantages, fill_rewards
from rlhf_helpers.sampling import MergedCopy, can_merge, sample
from rlhf_helpers.stats import minibatch_stats, step_stats

# What `generate` takes so that calls written for TRL keep working; any other value would change what is sampled.
NEUTRAL = {
    "top_k": (0, None), "top_p": (1.0, None), "typical_p": (1.0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None),
    "min_length": (-1, 0, None), "min_new_tokens": (0, None), "num_beams": (1, None), "no_repeat_ngram_size": (0, None),
}  # fmt: skip


class PPOTrainer:
    """PPO on a policy with a value head, after Ziegler et al. 2019 and TRL 0.11.4's trainer of the same name.

    `model` is a PolicyWithValueHead. `ref_model` is a causal LM or PolicyWithValueHead that is used as given, or None: the
    adapters switched off (a model without adapters is copied and frozen instead). After `step`, `rollout` holds every tensor
    of the step, (B, T) over response tokens; `history` holds the scalar stats of all steps. `permutation`, a function of n,
    orders the minibatches of each epoch and may be replaced."""

    def __init__(self, config, model, ref_model=None, tokenizer=None):
        if not isinstance(model, PolicyWithValueHead):
            raise TypeError(f"model is a {type(model).__name__}; expected PolicyWithValueHead(your_causal_lm)")
        if tokenizer is None or tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: expected one with a pad token (models.load_tokenizer gives one)")
        if is_4bit(model) and not model.has_adapters:
            raise ValueError(
                "the policy has 4-bit weights and no adapters: 4-bit weights get no gradient, so only scraps of it would train; "
                "expected a PEFT model, e.g. peft.get_peft_model(model, LoraConfig(task_type='CAUSAL_LM'))"
            )
        self.config, self.tokenizer = config, tokenizer
        on_cpu = device_and_dtype()[0].type == "cpu"  # said aloud, else Accelerate would not join several processes on a CPU
        if on_cpu:
            give_back_large_blocks()
        self.accelerator = Accelerator(cpu=on_cpu, log_with=config.log_with, project_dir=project_root() / "output" / "tracking")
        if config.log_with:
            self.accelerator.init_trackers("rlhf-ppo", config={k: v for k, v in vars(config).items() if v is not None})
        if ref_model is None and not model.has_adapters:
            ref_model = copy.deepcopy(model.pretrained_model)
        if isinstance(ref_model, PolicyWithValueHead):
            ref_model = ref_model.pretrained_model
        if ref_model is model.pretrained_model:
            raise ValueError("ref_model is the policy itself; expected None (its adapters switched off) or another model")
        self.ref_model = None if ref_model is None else self._frozen(ref_model)

        policy_params = [p for p in model.pretrained_model.parameters() if p.requires_grad]
        value_lr = config.value_learning_rate or config.learning_rate
        optimizer = torch.optim.Adam(
            [dict(params=policy_params, lr=config.learning_rate), dict(params=list(model.v_head.parameters()), lr=value_lr)]
        )
        self.policy, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model = self.accelerator.unwrap_model(self.policy)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.accelerator.device
        self.generator = torch.Generator().manual_seed(config.seed + 1000 * self.accelerator.process_index)
        self.total = lambda number: self.accelerator.reduce(number, "sum")  # over processes; with one, the number itself
        self.permutation = lambda n: torch.randperm(n, generator=self.generator).tolist()
        self.kl_coef = config.init_kl_coef
        self.steps_done, self.history, self.rollout = 0, [], None
        self._merged = None  # the copy that samples on a CPU, made at first use

    def _frozen(self, lm):
        """The reference as it is given: no gradients, no dropout, on the policy's device."""
        return (lm if is_4bit(lm) else lm.to(self.accelerator.device)).requires_grad_(False).eval()

    # ------------------------------------------------------------ generate

    def generate(self, queries, max_new_tokens=None, temperature=None, greedy=False, batch_size=None, return_prompt=False,
                 reference=False, generator=None, **kwargs):  # fmt: skip
        """Sample one response per query (1-D LongTensors in, 1-D LongTensors out), cut after its first EOS.

        The policy's own distribution at the config's temperature is sampled, whole: an option that would change it (top_k,
        top_p, penalties, another temperature) raises ValueError. `reference=True` samples from the reference."""
        temperature = self.config.temperature if temperature is None else temperature
        greedy = greedy or kwargs.pop("do_sample", True) is False
        if not greedy and temperature != self.config.temperature:
            raise ValueError(
                f"generate: temperature {temperature} is not PPOConfig.temperature {self.config.temperature}, at which log-probs are taken"
            )
        eos_id = kwargs.pop("eos_token_id", self.tokenizer.eos_token_id)
        if not isinstance(eos_id, int):
            raise ValueError(f"generate: eos_token_id={eos_id!r}; expected one token id")
        pad_id = kwargs.pop("pad_token_id", self.tokenizer.pad_token_id)
        for name, value in kwargs.items():
            if name not in NEUTRAL:
                raise ValueError(f"generate: unknown option {name}={value!r}")
            if value not in NEUTRAL[name]:
                raise ValueError(
                    f"generate: {name}={value!r} would sample from another distribution than the one that is scored; expected {NEUTRAL[name][0]}"
                )
        queries = self._sequences("query", queries)
        size = batch_size or len(queries)
        responses = []
        with self._sampler(reference) as lm:
            for start in range(0, len(queries), size):
                responses += sample(
                    lm, queries[start : start + size], max_new_tokens or self.config.max_new_tokens, eos_id, pad_id,
                    temperature, generator or self.generator, greedy,
                )  # fmt: skip
        return [torch.cat([q, r]) for q, r in zip(queries, responses)] if return_prompt else responses

    @contextlib.contextmanager
    def _sampler(self, reference):
        """Gives the model to sample from: on a CPU a merged copy of a 4-bit policy, else the policy itself."""
        if reference and self.ref_model is not None:
            yield self.ref_model
        elif self.device.type == "cpu" and is_4bit(self.model) and can_merge(self.model.pretrained_model):
            self._merged = self._merged or MergedCopy(self.model.pretrained_model)
            yield self._merged.refresh(adapters=not reference)
        else:
            adapters = self.model.adapters_off() if reference else contextlib.nullcontext()
            with self.model.without_dropout(), adapters:
                yield self.model.pretrained_model

    def decode(self, responses):
        """The texts of responses, without special tokens: what the reward function reads."""
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)

    # ------------------------------------------------------------ train

    def train(self, prompts, reward_fn, steps=None, on_step=None):
        """`steps` more PPO steps (by default one pass over the prompts), fewer if the KL budget is spent. `reward_fn(prompts,
        responses)` takes two lists of str and returns a number for each; `on_step(trainer, stats)` is called after every
        step. Returns the history."""
        prompts, queries = self.encode(prompts)
        for _ in range(max(1, len(prompts) // self.config.batch_size) if steps is None else steps):
            if self.kl_budget_spent():
                break
            rows = self.next_rows(len(prompts))
            batch, batch_queries = [prompts[i] for i in rows], [queries[i] for i in rows]
            clock = time.perf_counter()
            responses = self.generate(batch_queries)
            generated = time.perf_counter()
            scores = reward_fn(batch, self.decode(responses))
            scored = time.perf_counter()
            stats = self.step(batch_queries, responses, scores)
            stats |= {"time/generate": generated - clock, "time/reward": scored - generated}
            self.history[-1] |= {"time/generate": generated - clock, "time/reward": scored - generated}
            if on_step:
                on_step(self, stats)
        return self.history

    def kl_budget_spent(self):
        """Whether the mean KL of the last 4 steps is above PPOConfig.kl_budget."""
        last = [stats["objective/kl"] for stats in self.history[-4:]]
        return self.config.kl_budget is not None and bool(last) and sum(last) / len(last) > self.config.kl_budget

    def encode(self, prompts):
        """(prompts, queries): those that leave room for a response, and their token ids. The others are counted in a warning."""
        room = (self.model.config.get_text_config().max_position_embeddings or math.inf) - self.config.max_new_tokens
        queries = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        kept = [(prompt, query) for prompt, query in zip(prompts, queries) if len(query) <= room]
        if len(kept) < len(prompts):
            warnings.warn(f"skipped {len(prompts) - len(kept)} of {len(prompts)} prompts: longer than {room} tokens", stacklevel=2)
        if not kept:
            raise ValueError(f"prompts: none of {len(prompts)} fits into {room} tokens")
        return [prompt for prompt, _ in kept], [query for _, query in kept]

    def next_rows(self, n):
        """Which of n prompts the next step uses: batch_size numbers from an endless row of shuffled passes over them. It
        depends on the seed and the number of steps done alone, so a resumed run goes on where it was."""
        world, size = self.accelerator.num_processes, self.config.batch_size
        first = (self.steps_done * world + self.accelerator.process_index) * size
        rows = []
        for place in range(first, first + size):
            shuffle = torch.Generator().manual_seed(1_000_003 * (self.config.seed + 1) + place // n)
            rows.append(torch.randperm(n, generator=shuffle)[place % n].item())
        return rows

    # ------------------------------------------------------------ step

    def step(self, queries, responses, scores):
        """One PPO update. `queries` and `responses`: batch_size 1-D LongTensors of token ids each, as they were sampled;
        `scores`: batch_size numbers. Returns the stats under TRL 0.11's keys. Bad input raises ValueError before anything
        changes; RuntimeError if an adapter got no gradient."""
        started = time.perf_counter()
        rollout = self._collect(*self._checked(queries, responses, scores), total=self.total)
        self.rollout = rollout
        collected = time.perf_counter()
        updates = self._optimize(rollout)
        optimized = time.perf_counter()
        stats = step_stats(rollout, updates, self.kl_coef, self.tokenizer.eos_token_id, self.total)
        stats |= {"ppo/learning_rate": self.config.learning_rate, **self._times}
        if self.config.adap_kl_ctrl:
            n_samples = self.config.batch_size * self.accelerator.num_processes
            self.kl_coef = ppo.next_kl_coef(self.kl_coef, stats["objective/kl"], self.config.target, self.config.horizon, n_samples)
        ended = time.perf_counter()
        stats["time/ppo/optimize_step"] = optimized - collected
        stats["time/ppo/calc_stats"] = ended - optimized
        stats["time/ppo/total"] = ended - started
        self.steps_done += 1
        scalars = {name: value for name, value in stats.items() if isinstance(value, (int, float))}
        self.history.append({"step": self.steps_done, **scalars})
        if self.config.log_with:
            self.accelerator.log(scalars, step=self.steps_done)
        return stats

    def inspect(self, queries, responses, scores=None):
        """The Rollout that `step` would learn from, without learning; for any number of responses. Without scores, they are 0."""
        scores = torch.zeros(len(responses)) if scores is None else scores
        return self._collect(*self._checked(queries, responses, scores, size=len(queries)))

    def _collect(self, queries, responses, scores, total=ppo.alone):
        """The rollout: log-probs under policy and reference, values, rewards, advantages, returns. No gradients. `total`
        makes the whitening that of all processes."""
        config, clock = self.config, time.perf_counter()
        if config.score_clip is not None:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        if config.missing_eos_penalty is not None:
            unfinished = torch.tensor([self.tokenizer.eos_token_id not in response for response in responses])
            scores = scores - config.missing_eos_penalty * unfinished
        rollout = collate(queries, responses, scores, self.tokenizer.pad_token_id, self.device)
        chunks = torch.arange(len(rollout), device=self.device).split(config.mini_batch_size)
        parts = [self._score_tokens(rollout, rows) for rows in chunks]
        rollout.logprobs, rollout.ref_logprobs, rollout.values, rollout.kl = (torch.cat(part) for part in zip(*parts))
        self._times = {"time/ppo/forward_pass": time.perf_counter() - clock}
        clock = time.perf_counter()
        fill_rewards(rollout, self.kl_coef)
        self._times["time/ppo/compute_rewards"] = time.perf_counter() - clock
        clock = time.perf_counter()
        fill_advantages(rollout, config.gamma, config.lam, config.whiten_rewards, total)
        self._times["time/ppo/compute_advantages"] = time.perf_counter() - clock
        return rollout

    @torch.no_grad()
    def _score_tokens(self, rollout, rows):
        """(logprobs, ref_logprobs, values, kl) of some rows, by the forward pass that training uses, at the same shapes."""
        ids, mask, temperature = rollout.response_ids[rows], rollout.mask[rows], self.config.temperature
        with self.model.without_dropout():
            logits, values = self.model(*rollout.inputs(rows))
            logprobs = ppo.logprobs_from_logits(logits, ids, mask, temperature)
            if self.config.kl_penalty != "full":
                del logits  # the largest tensor of all, (B, T, vocabulary)
            ref_logits = self._reference_logits(rollout, rows)
        ref_logprobs = ppo.logprobs_from_logits(ref_logits, ids, mask, temperature)
        if self.config.kl_penalty == "full":
            kl = ppo.full_kl_per_token(logits, ref_logits, mask, temperature)
        else:
            kl = ppo.kl_per_token(logprobs, ref_logprobs, self.config.kl_penalty)
        return logprobs, ref_logprobs, torch.where(mask, values, 0.0), kl

    def _reference_logits(self, rollout, rows):
        if self.ref_model is not None:
            return response_logits(self.ref_model, *rollout.inputs(rows))
        with self.model.adapters_off():
            return response_logits(self.model.pretrained_model, *rollout.inputs(rows))

    def _optimize(self, rollout):
        """All epochs of one step. Returns the stats of every minibatch, a list of dicts."""
        config, updates = self.config, []
        for _ in range(config.ppo_epochs):
            order = torch.as_tensor(np.asarray(self.permutation(len(rollout))), device=self.device)
            for group in order.split(config.mini_batch_size * config.gradient_accumulation_steps):
                updates += self._update(rollout, group)
            if config.early_stopping and updates[-1]["policy/policykl"] > 1.5 * config.target_kl:
                break
        return updates

    def _update(self, rollout, group):
        """One optimizer step on the rows `group`, a minibatch at a time. A token counts the same in whichever minibatch, and
        on whichever process, it is, so that accumulation gives the gradient of the whole group."""
        updates, usable = [], True
        tokens_per_process = self.total(rollout.mask[group].sum()) / self.accelerator.num_processes  # gradients are averaged
        with self.model.without_dropout(checkpointing=True):
            for rows in group.split(self.config.mini_batch_size):
                loss, stats = self._minibatch(rollout, rows)
                usable &= math.isfinite(stats["loss/total"]) and stats["policy/ratio_mean"] <= self.config.ratio_threshold
                self.accelerator.backward(loss * rollout.mask[rows].sum() / tokens_per_process)
                updates.append(stats)
        self._require_gradients()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        if usable := usable and bool(torch.isfinite(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad()
        updates[-1].update({"grad_norm": float(norm), "skipped": float(not usable)})
        return updates

    def _minibatch(self, rollout, rows):
        """(loss, stats) of one minibatch, with gradients."""
        config, mask = self.config, rollout.mask[rows]
        old_logprobs, old_values = rollout.logprobs[rows], rollout.values[rows]
        advantages, returns = rollout.advantages[rows], rollout.returns[rows]

        logits, values = self.policy(*rollout.inputs(rows))
        values = torch.where(mask, values, 0.0)
        logprobs = ppo.logprobs_from_logits(logits, rollout.response_ids[rows], mask, config.temperature)
        policy_losses, policy_clipped = ppo.policy_losses(logprobs, old_logprobs, advantages, config.cliprange)
        value_losses, value_clipped = ppo.value_losses(values, old_values, returns, config.cliprange_value)
        policy_loss, value_loss = ppo.masked_mean(policy_losses, mask), ppo.masked_mean(value_losses, mask)
        loss = policy_loss + config.vf_coef * value_loss

        with torch.no_grad():
            stats = minibatch_stats(
                losses=(policy_losses, value_losses),
                clipped=(policy_clipped, value_clipped),
                entropy=ppo.entropy_from_logits(logits, mask, config.temperature),
                logprobs=(logprobs, old_logprobs),
                values=(values, old_values),
                advantages=advantages,
                returns=returns,
                mask=mask,
                vf_coef=config.vf_coef,
                total=self.total,
            )
        return loss, stats

    def _require_gradients(self):
        for name, parameter in self.model.pretrained_model.named_parameters():
            if parameter.requires_grad and "lora_" in name and parameter.grad is None:
                self.optimizer.zero_grad()
                raise RuntimeError(
                    f"adapter {name} got no gradient: it would never train. Was the 4-bit model run outside PolicyWithValueHead "
                    "and repacked by bitsandbytes? See models.keep_gradients"
                )

    # ------------------------------------------------------------ save and resume

    def save(self, folder):
        """Keep everything in one folder: the adapters (plain PEFT loads them), the value head (where TRL looks for it), Adam,
        KL coefficient, random states, history. The folder appears whole or not at all."""
        save_checkpoint(self, folder)
        self.accelerator.wait_for_everyone()

    def resume(self, folder):
        """Go on from a folder made by `save`, bitwise on a CPU. Raises ValueError, changing nothing, if it does not fit."""
        load_checkpoint(self, folder)

    # ------------------------------------------------------------ checks

    def _checked(self, queries, responses, scores, size=None):
        """(queries, responses, scores) as lists of CPU LongTensors and one float tensor, or ValueError."""
        expected = f"{size}" if size else f"PPOConfig.batch_size = {self.config.batch_size}"
        size = size or self.config.batch_size
        for name, given in (("queries", queries), ("responses", responses), ("scores", scores)):
            if len(given) != size:
                raise ValueError(f"step: {len(given)} {name}; expected {expected}")
        scores = torch.stack([torch.as_tensor(score).detach().float().cpu().reshape(-1) for score in scores])
        if scores.shape[1] != 1:
            raise ValueError(f"step: a score with {scores.shape[1]} values; expected one number a response")
        scores = scores[:, 0]
        for row in (~torch.isfinite(scores)).nonzero().flatten().tolist():
            raise ValueError(f"step: scores[{row}] is {scores[row].item()}; expected a finite number")
        return self._sequences("query", queries), self._sequences("response", responses), scores

    def _sequences(self, name, sequences):
        """Token ids as 1-D LongTensors on the CPU, each checked."""
        vocabulary, checked = self.model.config.get_text_config().vocab_size, []
        for row, ids in enumerate(sequences):
            ids = torch.as_tensor(ids).detach().cpu()
            if ids.dim() != 1 or ids.dtype not in (torch.long, torch.int):
                raise ValueError(f"{name} {row} is {tuple(ids.shape)} {ids.dtype}; expected a 1-D LongTensor of token ids")
            if len(ids) == 0:
                raise ValueError(f"{name} {row} is empty; expected at least one token")
            if ids.min() < 0 or ids.max() >= vocabulary:
                wrong = ids[(ids < 0) | (ids >= vocabulary)][0].item()
                raise ValueError(f"{name} {row} has token id {wrong}; expected 0 to {vocabulary - 1}")
            checked.append(ids.long())
        return checked
