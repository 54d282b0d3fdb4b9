"""What each process of tests/test_processes.py runs: `accelerate launch ... -m tests.worker FOLDER JOB ...`. A job that leaves the
other processes is the last."""

import contextlib
import faulthandler
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from rlhf_helpers.advantages import batch_mean
from rlhf_helpers.evaluation import evaluate
from rlhf_helpers.quirks import leave_processes
from rlhf_helpers.rollout import gae_advantages
from rlhf_helpers.sampling import Drawn
from tests import tiny

ORDERS = {4: [0, 2, 1, 3], 2: [0, 1]}  # of the rows: either way the first minibatch is made of rows 0 and 2


def my_share(trainer, sequence):
    """This process's rows of the batch, as PPOTrainer.train deals them: neighbours stay together."""
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    size = len(sequence) // world
    return sequence[rank * size : (rank + 1) * size]


def stepped(steps=2, lm=None, sharded=False, **config):
    """A trainer after `steps` steps on fixed batches, one optimizer step per epoch; each process has its share of the rows."""
    world = PartialState(cpu=True).num_processes
    settings = dict(batch_size=4 // world, mini_batch_size=2 // world, gradient_accumulation_steps=2, ppo_epochs=2)
    trainer = tiny.trainer(
        lm, sharded=sharded, **settings | dict(max_grad_norm=0.5, whiten_rewards=True, cliprange=0.05) | config
    )
    trainer.permutation = ORDERS.get
    for step in range(steps):
        trainer.step(*(my_share(trainer, part) for part in tiny.batch(4, seed=step)))
    return trainer


def update(folder):
    trainer = stepped()
    if trainer.accelerator.is_main_process:
        save_file(
            {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}, folder / "weights"
        )
        torch.save({k: v for k, v in trainer.history[-1].items() if not k.startswith("time/")}, folder / "stats")


def resume(folder):
    """Two and two steps with a save between them, or four in a row: the adapters are bitwise the same."""
    prompts, reward = [f"t{i} t{i + 1}" for i in range(4, 12)], lambda prompts, texts: [len(text.split()) % 5 for text in texts]
    make = lambda: tiny.trainer(batch_size=2, mini_batch_size=2)
    whole = make()
    whole.train(prompts, reward, steps=4)
    first = make()
    first.train(prompts, reward, steps=2)
    first.save(folder / "checkpoint")
    second = make()
    second.resume(folder / "checkpoint")
    second.train(prompts, reward, steps=2)
    assert tiny.same(tiny.state(whole), tiny.state(second)), "the resumed run differs"
    responses = [row["tokens/responses_len_mean"] for row in whole.history]
    state = PartialState(cpu=True)
    print(f"process {state.process_index} of {state.num_processes}: resumed bitwise, {responses}", flush=True)


def shares(folder):
    """What each process has for itself, and what all have in common: prompts, random numbers, steps, held-out prompts."""
    make = lambda: tiny.trainer(batch_size=2, mini_batch_size=2)
    prompts, seen = [f"t{i} t{i + 1}" for i in range(4, 16)], []
    reward = lambda given, texts: seen.extend(given) or [len(text.split()) % 5 for text in texts]
    trainer = make()
    trainer.train(prompts, reward)  # one pass
    judged = evaluate(trainer, prompts[:1], lambda given, texts: [1.0] * len(texts), samples=1)
    rank = PartialState(cpu=True).process_index
    about = dict(
        seen=seen,
        steps=trainer.steps_done,
        drawn=make().generator.initial_seed(),
        judged=judged.prompts,
        texts=judged.responses,
    )
    (folder / f"{rank}.json").write_text(json.dumps(about))


def baseline(folder):
    """As `update`, without a critic: the batch's mean is that of all processes. And what responses were noted to be likelier than
    they are, by 0.1 nats a token, makes of the sampler's KL."""
    trainer = stepped(steps=0)
    trainer.advantages = batch_mean
    queries, responses, scores = (my_share(trainer, part) for part in tiny.batch(4, seed=0))
    for query, response in zip(queries, responses):
        rollout = trainer.inspect([query], [response], advantages=gae_advantages)
        digest = trainer._weights()
        response.drawn = Drawn(query, response.clone(), rollout.logprobs[0] + 0.1, torch.zeros(len(response), 1), 1.0, digest)
    stats = trainer.step(queries, responses, scores)
    if trainer.accelerator.is_main_process:
        save_file({name: p.detach().clone() for name, p in tiny.adapters(trainer, "lora_").items()}, folder / "baseline")
        (folder / "sampler_kl.json").write_text(json.dumps(stats["objective/sampler_kl"]))


def unlucky(folder):
    """One process gets scores beyond all bounds: both leave the update out, and both have the same weights."""
    trainer = tiny.trainer(batch_size=2, mini_batch_size=2)
    queries, responses, scores = tiny.batch(2, seed=trainer.accelerator.process_index)
    before = [p.detach().clone() for p in trainer.parameters]
    stats = trainer.step(queries, responses, [3e38, -3e38] if trainer.accelerator.process_index == 1 else scores)
    assert all(torch.equal(p, old) for p, old in zip(trainer.parameters, before)), "a weight moved"
    print(f"process {trainer.accelerator.process_index}: skipped {stats['ppo/skipped_updates']:.0f}", flush=True)


def threads_of_gloo():
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended since
            names.append((task / "comm").read_text().strip())
    return [name for name in names if "gloo" in name]


def in_the_end(looks=5_000):
    """The same, once a thread that was joined has left the list as well."""
    return next((names for _ in range(looks) if not (names := threads_of_gloo())), threads_of_gloo())


def left(_, leave=leave_processes):
    """Which of gloo's threads are there after a step and `leave`; the trainer is there all the while."""
    trainer = stepped(steps=1)
    leave(trainer)
    there = in_the_end()
    trainer.policy = trainer.model
    trainer.accelerator.free_memory()
    print(f"threads {there}, then {in_the_end()}", flush=True)


def destroyed(_):
    """As `left`, with the group destroyed as accelerate does it."""
    left(_, lambda trainer: trainer.accelerator.end_training())


JOBS = {job.__name__: job for job in (update, baseline, resume, shares, unlucky, left, destroyed)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *jobs = sys.argv[1:]
    for job in jobs:
        faulthandler.dump_traceback_later(200, exit=True)  # processes that wait for each other say where
        JOBS[job](Path(folder))
