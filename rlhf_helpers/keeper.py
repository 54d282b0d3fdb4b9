"""A run of the script as it grows: what it keeps on disk, and the line that it prints for a step."""

import time

import torch

from rlhf_helpers import progress
from rlhf_helpers.data import save_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.evaluation import Evaluation, evaluate
from rlhf_helpers.run import append_json, remove_results


class Keeper:
    """Keeps a run on disk as it grows, and prints one line a step. All processes have one, the main one writes."""

    def __init__(self, job, trainer):
        self.job, self.trainer, self.times, self.saved_at = job, trainer, [], None
        self.main = trainer.accelerator.is_main_process
        self.checkpoint, self.log = job.output / "checkpoint", job.output / "history.jsonl"

    def begin(self, reward):
        """A new run: measures the base policy and saves step 0. Only then what an earlier run left is gone."""
        job, trainer = self.job, self.trainer
        if reward.std == 1.0 and reward.mean == 0.0:  # a reward model from elsewhere: standardise it as ours is
            standardise_on_base(trainer, reward, job.prompts, batch_size=at_once(trainer, 32))
        trainer.accelerator.print(f"held-out prompts: {len(job.heldout)}, with 4 samples each, before training", flush=True)
        before = evaluate(trainer, job.heldout, reward, samples=4, reference=True, batch_size=at_once(trainer))
        if job.resume is not None:
            trainer.resume(job.resume)
            trainer.accelerator.print(f"resumed at step {trainer.steps_done}", flush=True)
        self.extra = dict(
            settings=job.settings | {"--resume": job.resume},
            standardisation=[reward.mean, reward.std],
            before=before.records(),
        )
        self.save()
        if self.main:
            remove_results(job.output)
            save_jsonl(self.log, trainer.history)
        return before

    def go_on(self, saved, reward):
        """The run in the checkpoint; steps after it in the log were lost, and are cut. Results of fewer steps are gone."""
        try:
            before = Evaluation.of_records(saved["extra"]["before"])
        except InputError as error:
            raise InputError(f"{self.checkpoint}: extra before, {error}") from None
        self.trainer.resume(self.checkpoint)
        self.extra, self.saved_at = saved["extra"], self.trainer.steps_done
        reward.mean, reward.std = self.extra["standardisation"]
        self.job.seconds_before = self.extra["seconds"]
        if self.main:
            if self.saved_at < self.job.steps:
                remove_results(self.job.output)
            save_jsonl(self.log, self.trainer.history)
            done = f"{self.saved_at} of {self.job.steps}"
            print(f"going on from step {done} in {self.job.output}; --fresh begins anew", flush=True)
        return before

    def seconds(self):
        """Of all starts of this run together."""
        return self.job.seconds_before + time.perf_counter() - self.job.started

    def save(self):
        """Keep this step, unless it is kept already."""
        if self.saved_at != self.trainer.steps_done:
            now = dict(seconds=self.seconds(), budget_spent=self.trainer.kl_budget_spent())
            self.trainer.save(self.checkpoint, extra=self.extra | now)
            self.saved_at = self.trainer.steps_done

    def __call__(self, trainer, stats):
        if self.main:
            append_json(self.log, trainer.history[-1])
            print(self.line(stats), flush=True)
        if trainer.steps_done % self.job.save_every == 0:
            self.save()

    def line(self, stats):
        """What a step came to."""
        seconds = stats["time/generate"] + stats["time/reward"] + stats["time/ppo/total"]
        self.times.append(seconds)
        left = sum(self.times) / len(self.times) * (self.job.steps - self.trainer.steps_done) / 60
        return (
            f"step {self.trainer.steps_done:3d}/{self.job.steps}  score {stats['ppo/mean_scores']:+.2f}  "
            f"kl {stats['objective/kl']:6.2f}  entropy {stats['ppo/policy/entropy']:.2f}  "
            f"value loss {stats['ppo/loss/value']:.3f}  "
            f"length {stats['tokens/responses_len_mean']:.0f}  {seconds:.1f} s  {left:.1f} min left"
        )


def at_once(trainer, most=40):
    """How many held-out responses are sampled at a time: more than a step's, which are kept for learning, but in proportion."""
    return min(most, 4 * trainer.config.batch_size)


def standardise_on_base(trainer, reward, prompts, count=64, batch_size=32):
    """Measure the reward model's mean and deviation on `count` samples of the base policy on training prompts."""
    prompts, queries = ((part * count)[:count] for part in trainer.encode(prompts))
    generator, responses = torch.Generator().manual_seed(0), []
    with progress.bar(len(queries), "standardising the reward", "samples", trainer.accelerator.is_main_process) as done:
        for start in range(0, len(queries), batch_size):
            responses += trainer.generate(queries[start : start + batch_size], reference=True, generator=generator)
            done.update(len(responses) - done.n)
    reward.standardise(prompts, trainer.decode(responses))
    found = f"mean {reward.mean:.3f}, deviation {reward.std:.3f}"
    trainer.accelerator.print(f"reward model: standardised on {len(prompts)} samples of the base model, {found}")
