"""The main job as a script: `python -m rlhf_helpers`. Models, reward model, PPO, and what it brought on held-out prompts."""

import argparse
import dataclasses
import json
import sys
import time
import types
import typing
from pathlib import Path

from rlhf_helpers.config import PPO_FIELDS, PROFILES, project_root, profile_named
from rlhf_helpers.data import load_prompts, save_jsonl

EPILOG = """\
The run writes into --output: summary.json (held-out reward and gold before and after, KL, seconds), history.jsonl (the stats of
every step), samples.jsonl (the same held-out prompts before and after), curves.png, and checkpoint/ (the adapters, which plain
PEFT loads, with everything needed to --resume).

examples:
  python -m rlhf_helpers                                   the course's run on two CPU cores, about 7 minutes
  python -m rlhf_helpers --check                           what will work on this machine
  python -m rlhf_helpers --steps 5 --output output/try     a short try
  python -m rlhf_helpers --init_kl_coef 0 --kl_budget inf --steps 80   no KL penalty, no budget: watch the gold
  python -m rlhf_helpers --profile gpu --model org/model   another model on a GPU
  accelerate launch --num_processes 2 -m rlhf_helpers      the same on two GPUs (also on two CPU cores: add --multi_gpu)
"""


OURS = ("value_learning_rate", "temperature", "max_new_tokens", "missing_eos_penalty", "kl_budget")  # the fields that TRL 0.11 did not have


def parser():
    """The command line: the run's own options, then one for every field of PPOConfig."""
    top = argparse.ArgumentParser(
        prog="python -m rlhf_helpers",
        description="Fine-tune a 4-bit language model with PPO against a reward model, and measure what it brought.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--check", action="store_true", help="look at this machine, say what will work, and stop")
    top.add_argument("--prepare", action="store_true", help="fetch the models, train the reward model, and stop")
    top.add_argument("--profile", default="cpu", metavar="NAME", help=f"{' or '.join(PROFILES)} (default: cpu)")
    top.add_argument("--model", help="the policy: a name the course knows, a folder, or org/model (default: the profile's)")
    top.add_argument("--prompts", metavar="FILE", help="JSON lines with a field prompt (default: the preference file)")
    top.add_argument("--heldout", metavar="FILE", help="JSON lines with the prompts to judge by (default: the course's 60)")
    top.add_argument("--reward-model", metavar="FOLDER", help="a sequence classifier (default: output/reward_model_pairwise)")
    top.add_argument("--steps", type=int, help="PPO steps (default: the profile's)")
    top.add_argument("--output", metavar="FOLDER", default="output/run", help="where the results go (default: output/run)")
    top.add_argument("--resume", metavar="FOLDER", help="go on from a checkpoint until --steps are done")
    fields = top.add_argument_group("PPOConfig", "where not given, the profile's value, else the default of TRL 0.11")
    for field in PPO_FIELDS:
        kinds = [kind for kind in typing.get_args(field.type) or [field.type] if kind is not types.NoneType]
        fields.add_argument(
            *dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]),
            dest=field.name,
            type=boolean if kinds[0] is bool else kinds[0],
            metavar=kinds[0].__name__.upper(),
            help=f"{field.metadata['help']} (TRL: {field.default})" if field.name not in OURS else field.metadata["help"],
        )
    return top


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected true or false")
    return text.lower() == "true"


def main(arguments=None):
    """Run the command line. Returns the exit status: 0, or 2 after one sentence on what is wrong with the input."""
    options = parser().parse_args(arguments)
    try:
        if options.check:
            from rlhf_helpers.machine import check

            return check()
        return run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options):
    """The whole job. Input is read and checked before anything is made or written."""
    started = time.perf_counter()
    root = project_root()
    profile = profile_named(options.profile)
    if options.model:
        profile = dataclasses.replace(profile, model=options.model)
    config = profile.ppo_config(**{field.name: getattr(options, field.name) for field in PPO_FIELDS})
    steps = profile.steps if options.steps is None else options.steps
    if steps < 1:
        raise ValueError(f"--steps is {steps}; expected a whole number from 1")
    prompts = load_prompts(options.prompts or root / profile.prompts)
    heldout = load_prompts(options.heldout or root / profile.heldout_prompts)
    prompts = [prompt for prompt in prompts if prompt not in set(heldout)]
    if not prompts:
        raise ValueError(f"{options.prompts or profile.prompts}: every prompt is held out in {options.heldout or profile.heldout_prompts}")
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is a file; expected a folder")
    if options.resume and not (Path(options.resume) / "trainer.json").is_file():
        raise ValueError(f"--resume {options.resume}: no checkpoint here; expected a folder made by an earlier run")

    import torch
    from accelerate import PartialState

    from rlhf_helpers.evaluation import evaluate
    from rlhf_helpers.models import device_and_dtype, load_policy, resolve
    from rlhf_helpers.reward import RewardModel, ensure_reward_model
    from rlhf_helpers.trainer import PPOTrainer

    reward_folder = options.reward_model or root / profile.reward_model
    if options.reward_model:
        RewardModel.load(reward_folder)  # a wrong folder is reported before the models are fetched
    device, dtype = device_and_dtype()
    processes = PartialState(cpu=device.type == "cpu")  # one, unless `accelerate launch` started more: the main one prepares and reports
    say = processes.print
    if dtype == torch.float16:
        say("this card has no native bf16 (compute capability below 8.0): computing in fp16, which ends at 65,504")
    if processes.num_processes > 1 and not Path(reward_folder).exists():  # transformers' Trainer would join these processes
        raise ValueError(f"{reward_folder}: no reward model yet; expected one: run `python -m rlhf_helpers --prepare` first")
    with processes.main_process_first():
        resolve(profile.model)
        reward = ensure_reward_model(reward_folder)
    if options.prepare:
        say(f"ready: {profile.model}, {reward_folder}")
        processes.destroy_process_group()
        return 0

    policy, tokenizer = load_policy(profile, seed=config.seed)
    trainer = PPOTrainer(config=config, model=policy, ref_model=None, tokenizer=tokenizer)
    if reward.std == 1.0 and reward.mean == 0.0:  # a reward model from elsewhere: standardise it as ours is
        standardise_on_base(trainer, reward, prompts)
    output.mkdir(parents=True, exist_ok=True)

    say(f"held-out: {len(heldout)} prompts, 2 samples each, before training", flush=True)
    before = evaluate(trainer, heldout, reward)
    if options.resume:
        trainer.resume(options.resume)
        say(f"resumed at step {trainer.steps_done}")
    budget = f", at most {config.kl_budget:g} nats of KL" if config.kl_budget else ""
    many = f" on {processes.num_processes} processes" if processes.num_processes > 1 else ""
    say(f"PPO: {steps} steps of {config.batch_size} responses{many}{budget}, profile {profile.name}, {profile.model}", flush=True)
    ppo_started = time.perf_counter()
    progress = Progress(steps, output / "history.jsonl") if processes.is_main_process else None
    trainer.train(prompts, reward, steps=max(0, steps - trainer.steps_done), on_step=progress)
    ppo_seconds = time.perf_counter() - ppo_started
    if trainer.steps_done < steps:
        say(f"stopped after step {trainer.steps_done}: the KL budget of {config.kl_budget:g} nats is spent")
    after = evaluate(trainer, heldout, reward)

    trainer.save(output / "checkpoint")
    processes.wait_for_everyone()
    trainer.accelerator.end_training()  # also closes the process group: a process that exits with it open may crash (gloo)
    if not processes.is_main_process:
        return 0
    save_jsonl(output / "history.jsonl", trainer.history)
    samples = [{**a, "before": b["response"], "reward_before": b["reward"], "gold_before": b["gold"]}
               for a, b in zip(after.records(), before.records())]  # fmt: skip
    save_jsonl(output / "samples.jsonl", samples)
    from rlhf_helpers.course.plots import save_figure, training_curves

    save_figure(training_curves(trainer.history), output / "curves.png")
    summary = summarize(before, after, reward_std=before.rewards.std(ddof=1), seconds=time.perf_counter() - started)
    summary |= dict(ppo_seconds=round(ppo_seconds, 1), steps=trainer.steps_done, seed=config.seed, processes=processes.num_processes)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    report(summary, samples, output)
    return 0


def standardise_on_base(trainer, reward, prompts, count=64):
    """Measure the reward model's mean and deviation on `count` samples of the base policy on training prompts."""
    prompts = (prompts * count)[:count]
    prompts, queries = trainer.encode(prompts)
    import torch

    responses = trainer.generate(queries, batch_size=32, reference=True, generator=torch.Generator().manual_seed(0))
    reward.standardise(prompts, trainer.decode(responses))
    trainer.accelerator.print(f"reward model: standardised on {count} samples of the base model, mean {reward.mean:.3f}, deviation {reward.std:.3f}")


class Progress:
    """Prints one line a step, and keeps the history on disk as it grows."""

    def __init__(self, steps, log):
        self.steps, self.log, self.times = steps, log, []
        self.log.write_text("", encoding="utf-8")

    def __call__(self, trainer, stats):
        seconds = stats["time/generate"] + stats["time/reward"] + stats["time/ppo/total"]
        self.times.append(seconds)
        left = sum(self.times) / len(self.times) * (self.steps - trainer.steps_done) / 60
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trainer.history[-1]) + "\n")
        print(
            f"step {trainer.steps_done:3d}/{self.steps}  score {stats['ppo/mean_scores']:+.2f}  kl {stats['objective/kl']:6.2f}  "
            f"entropy {stats['ppo/policy/entropy']:.2f}  value loss {stats['ppo/loss/value']:.3f}  "
            f"length {stats['tokens/responses_len_mean']:.0f}  {seconds:.1f} s  {left:.1f} min left",
            flush=True,
        )


def summarize(before, after, reward_std, seconds):
    """What summary.json says of two Evaluations."""
    from rlhf_helpers.evaluation import paired_gain
    from rlhf_helpers.machine import peak_megabytes

    _, reward_interval = paired_gain(before.prompts, before.rewards, after.rewards)
    _, gold_interval = paired_gain(before.prompts, before.gold, after.gold)
    numbers = dict(
        heldout_reward_before=before.rewards.mean(),
        heldout_reward_after=after.rewards.mean(),
        heldout_reward_gain_ci95=reward_interval,
        heldout_gold_before=before.gold.mean(),
        heldout_gold_after=after.gold.mean(),
        heldout_gold_gain_ci95=gold_interval,
        base_reward_std=reward_std,
        mean_kl=after.kl.mean(),
        distinct2_before=before.distinct2,
        distinct2_after=after.distinct2,
        seconds=seconds,
        peak_rss_mb=peak_megabytes(),
    )
    return {k: [round(x, 4) for x in v] if isinstance(v, tuple) else round(float(v), 4) for k, v in numbers.items()}


def report(summary, samples, output):
    """The last screen of a run."""
    interval = lambda name: "{:+.2f} to {:+.2f}".format(*summary[name])
    print(f"\nheld-out prompts, before -> after {summary['steps']} PPO steps (95 % interval of the gain, bootstrap over prompts)")
    for name in ("reward", "gold"):
        b, a = summary[f"heldout_{name}_before"], summary[f"heldout_{name}_after"]
        print(f"  {name:7s} {b:+.2f} -> {a:+.2f}   gain {a - b:+.2f} ({interval(f'heldout_{name}_gain_ci95')})")
    gain = summary["heldout_reward_after"] - summary["heldout_reward_before"]
    print(f"  the reward's gain is {gain / summary['base_reward_std']:.2f} deviations of the base model's reward")
    print(f"  KL {summary['mean_kl']:.2f} nats a response; distinct word pairs {summary['distinct2_before']:.2f} -> {summary['distinct2_after']:.2f}")
    print(f"  {summary['ppo_seconds'] / 60:.1f} minutes of PPO, {summary['seconds'] / 60:.1f} in all, peak memory {summary['peak_rss_mb']:.0f} MB\n")
    for sample in samples[:: len(samples) // 3][:3]:
        print(f"{sample['prompt']}\n  before ({sample['reward_before']:+.2f}): {' '.join(sample['before'].split())}")
        print(f"  after  ({sample['reward']:+.2f}): {' '.join(sample['response'].split())}\n")
    print(f"figure  {output / 'curves.png'}\nlog     {output / 'history.jsonl'}\nadapter {output / 'checkpoint'}\nsummary {output / 'summary.json'}")


if __name__ == "__main__":
    sys.exit(main())
