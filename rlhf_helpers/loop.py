"""The loop around a PPO step: sampling, repeating it, saving, resuming."""

import functools

import torch

from rlhf_helpers import classic, fast, parts, progress, sampling
from rlhf_helpers.checkpoint import load_checkpoint, save_checkpoint
from rlhf_helpers.interrupts import Interrupted, finishing
from rlhf_helpers.rollout import checked_call
from rlhf_helpers.sampling import Drawn, digest
from rlhf_helpers.stats import Clock


class Loop:
    """The part of `trainer.PPOTrainer` that is not PPO. Its state is made in `PPOTrainer.__init__`, but for `unpacked`, made at first
    use; and each response carries how it was drawn (`sampling.Drawn`), which `step` compares."""

    def __getattr__(self, name):
        if name in classic.TRAINER:
            raise AttributeError(f"PPOTrainer has no {name}{classic.instead(name, classic.TRAINER)}")
        return object.__getattribute__(self, name)  # raises what is raised without this method

    # ------------------------------------------------------------ generate

    def generate(self, queries, max_new_tokens=None, temperature=None, greedy=False, batch_size=None, return_prompt=False,
                 reference=False, generator=None, **kwargs):  # fmt: skip
        """Sample one response per query (1-D LongTensors in, 1-D LongTensors out), cut after its first EOS.

        The policy's own distribution at the config's temperature is sampled, whole: an option that would change it (top_k,
        top_p, penalties, another temperature) raises InputError. `reference=True` samples from the reference. What is returned carries
        how it was drawn, its `eos_token_id` too; with `return_prompt`, or cut out of a tensor, it does not."""
        parts.check_still_there("generate", self.model, self.parameters)
        kwargs = dict(eos_token_id=self.eos_ids, pad_token_id=self.tokenizer.pad_token_id) | kwargs
        text, asked = self.model.config.get_text_config(), (max_new_tokens, batch_size, temperature, greedy)
        queries, batches, asked, greedy = checked_call(queries, self.config, text, *asked, **kwargs)
        length, ends, _, temperature = asked
        weights = None if reference or greedy else self._weights()  # only the policy's own draws can replace a scoring pass
        source, responses = reference and (self.ref_model or True), []
        bar = progress.bar(length * len(batches), "sampling", "tokens", len(queries) > 16 and self.accelerator.is_main_process)
        with bar, sampling.reader_of(self.model, source, self._fast_way()) as (lm, reader):
            for number, rows in enumerate(batches, 1):
                drawn = sampling.sample(lm, rows, *asked, generator or self.generator, greedy, reader, bar.update)
                bar.update(length * number - bar.n)  # all of them may have ended before
                responses += drawn.responses
                for query, response, logprobs, hidden in zip(rows, drawn.responses, drawn.logprobs, drawn.hidden):
                    response.drawn = Drawn(query.clone(), response.clone(), logprobs, hidden, temperature, weights, ends)
        return [torch.cat([q, r]) for q, r in zip(queries, responses)] if return_prompt else responses

    def decode(self, responses):
        """The texts of responses, without special tokens: what the reward function reads."""
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)

    @functools.cached_property
    def unpacked(self):
        """What makes sampling fast on a CPU, made at first use; None where the plain way is taken."""
        lm = self.model.pretrained_model
        return fast.Unpacked(lm) if fast.can_unpack(lm) else None

    def _fast_way(self):
        """`unpacked`, made anew where the model has got other weights; None while adapters are a part of them."""
        lm = self.model.pretrained_model
        if (made := self.__dict__.get("unpacked")) and not (made.is_current() and fast.can_unpack(lm)):
            del self.unpacked
        return None if self.model.adapters_merged() else self.unpacked

    def _weights(self):
        """A digest of the policy's weights; None while its adapters are not in use."""
        return digest(self.parameters) if self._in_use() else None

    def _in_use(self):
        """Whether the adapters that learn are on, beside the weights, and the active ones."""
        model = self.model
        return not (model.adapters_are_off() or model.adapters_merged() or model.active_adapters() != self.adapters)

    # ------------------------------------------------------------ train

    def train(self, prompts, reward_fn, steps=None, on_step=None):
        """`steps` more PPO steps (by default what one pass takes with a response a prompt), fewer if the KL
        budget is spent. `reward_fn(prompts, responses)` takes two lists of str and returns a number for each;
        `on_step(trainer, stats)` is called after every step. Returns the history. Ctrl-C, or a notebook's stop
        button, is heard after a whole step (`interrupts.Interrupted`); the next call goes on from there."""
        parts.check_loop(steps, reward_fn, on_step)
        prompts, queries = self.encode(prompts)
        once = max(1, len(prompts) // (self.config.batch_size * self.accelerator.num_processes))
        steps = once if steps is None else steps
        alone = on_step is None and self.accelerator.is_main_process  # else whoever is called shows how far it is
        with finishing() as asked, progress.bar(steps, "PPO", "steps", alone) as done:
            for _ in range(steps):
                if self.kl_budget_spent():
                    break
                rows = self.next_rows(len(prompts))
                batch, batch_queries = [prompts[i] for i in rows], [queries[i] for i in rows]
                clock, before, number = Clock(), self.generator.get_state(), self.steps_done
                try:
                    responses = self.generate(batch_queries)
                    clock.lap("time/generate")
                    scores = reward_fn(list(batch), self.decode(responses))
                    clock.lap("time/reward")
                    stats = self.step(batch_queries, responses, scores, batch) | clock.laps
                except BaseException:
                    if self.steps_done == number:
                        self.generator.set_state(before)  # the next call draws what this one would have
                    raise
                self.history[-1] |= clock.laps
                done.update()
                if on_step:
                    on_step(self, stats)
                self._stop_if(asked)
            self._stop_if(asked)  # while the last step asked
        return self.history

    def _stop_if(self, asked):
        """Raises Interrupted on all processes if one of them is asked to stop."""
        if signum := self._largest(asked.signum or 0):
            raise Interrupted(signum)

    def _largest(self, number):
        """The largest of a whole number over all processes."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.device)).max())

    def kl_budget_spent(self):
        """Whether the mean KL of the last 4 steps is above PPOConfig.kl_budget."""
        last = [stats["objective/kl"] for stats in self.history[-4:]]
        return self.config.kl_budget is not None and bool(last) and sum(last) / len(last) > self.config.kl_budget

    def encode(self, prompts):
        """(prompts, queries): those that leave room for a response, and their token ids, after the config's system turn. The
        others are counted in a warning."""
        room = sampling.positions_in(self.model.config.get_text_config()) - self.config.max_new_tokens
        return parts.encode_prompts(self.tokenizer, prompts, room, self.config.system)

    def next_rows(self, n):
        """Which of n prompts the next step uses. It depends on the seed and the number of steps done alone, so a resumed run goes
        on where it was."""
        batch = self.steps_done * self.accelerator.num_processes + self.accelerator.process_index
        return parts.rows_of(batch, self.config.batch_size, n, self.config.seed, self.config.num_generations)

    # ------------------------------------------------------------ save and resume

    def save(self, folder, extra=None):
        """Keep everything in one folder: the adapters (plain PEFT loads them), the value head (where TRL looks for it), Adam,
        KL coefficient, random states, history. The folder appears whole or not at all. `extra`: what else JSON can hold."""
        parts.check_still_there("save", self.model, self.parameters)
        save_checkpoint(self, folder, extra)
        self.accelerator.wait_for_everyone()

    def resume(self, folder, strict=True):
        """Go on from a folder made by `save`, bitwise on a CPU. Raises InputError, changing nothing, if it does not fit: by default
        its settings must be those of this trainer."""
        load_checkpoint(self, folder, strict)
        last = self.history[-1] if self.history else {}
        exact = last.get("step") == self.steps_done and last.get("objective/sampler_max_diff") == 0
        self.sampler_is_exact = strict and exact  # minibatches of another size have other bits
