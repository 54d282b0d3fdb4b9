"""The main job as a script: `python -m rlhf_helpers`. Models, reward model, PPO, and what it brought on held-out prompts."""

import argparse
import dataclasses
import os
import signal
import sys
import time
import types
import typing
import warnings
from pathlib import Path

import rlhf_helpers
from rlhf_helpers.config import PPO_FIELDS, PROFILES, course_file, profile_named, project_root
from rlhf_helpers.data import load_prompts, save_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import check_own, is_full, is_no_place, shown
from rlhf_helpers.interrupts import Interrupted, finishing, terminable

EPILOG = """\
The run writes into --output: summary.json (held-out reward and gold before and after, KL, seconds), history.jsonl (the stats of
every step), samples.jsonl (the same held-out prompts before and after), curves.png, and checkpoint/ (the adapters, which plain
PEFT loads, with everything needed to go on), saved every --save_every steps.

Nothing is lost: Ctrl-C finishes the step and saves, and the same command goes on where it was, to the last bit, after a kill or
a power cut too. Other settings in the same folder are refused, except --steps, --kl_budget, --log_with,
--save_every, --shard. --fresh begins anew.
The exit status is 0, 2 after bad input or a full disk, 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads the output any
more (a pipe), 1 after a fault of the program; of --check, 1 where this machine lacks something.

examples:
  python -m rlhf_helpers                                   the course's run on two CPU cores, 5 to 15 minutes
  python -m rlhf_helpers --check                           what will work on this machine
  python -m rlhf_helpers --steps 5 --output output/try     a short try
  python -m rlhf_helpers --init_kl_coef 0 --kl_budget none --steps 80 --output output/free   neither penalty nor budget
  python -m rlhf_helpers --profile gpu --model org/model   another model on a GPU
  accelerate launch --num_processes 2 -m rlhf_helpers      the same on two GPUs (also on two CPU cores: add --multi_gpu)
  accelerate launch --num_processes 2 -m rlhf_helpers --shard   the same, each with half of the base model's weights
"""


# The fields that TRL 0.11 did not have.
OURS = ("value_learning_rate", "temperature", "max_new_tokens", "missing_eos_penalty", "kl_budget", "system", "num_generations")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence, as for any other bad input; argparse would print all options first."""
        short = message if len(message) < 300 else f"{message[:150]} ... {message[-100:]}"  # a number of a thousand digits
        self.exit(2, f"error: {short}; --help lists the options\n")


def parser():
    """The command line: the run's own options, then one for every field of PPOConfig (left out of the result if not given)."""
    top = Parser(
        prog="python -m rlhf_helpers",
        description="Fine-tune a 4-bit language model with PPO against a reward model, and measure what it brought.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=rlhf_helpers.__version__)
    top.add_argument("--check", action="store_true", help="look at this machine, say what will work, and stop")
    top.add_argument("--prepare", action="store_true", help="fetch the models, train the reward model, and stop")
    top.add_argument("--profile", default="cpu", metavar="NAME", help=f"{' or '.join(PROFILES)} (default: cpu)")
    top.add_argument("--model", help="the policy: a name the course knows, a folder, or org/model (default: the profile's)")
    top.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines with a field prompt, or preference pairs, of which the prompts are taken (default: the preference file)",
    )
    top.add_argument("--heldout", metavar="FILE", help="JSON lines with the prompts to judge by (default: the course's 60)")
    top.add_argument("--reward-model", metavar="FOLDER", help="a sequence classifier (default: output/reward_model_pairwise)")
    top.add_argument("--steps", type=int, help="PPO steps (default: the profile's)")
    top.add_argument("--output", metavar="FOLDER", default="output/run", help="where the results go (default: output/run)")
    top.add_argument("--save_every", "--save-every", type=int, default=5, metavar="N", help="save every N steps (default: 5)")
    top.add_argument("--fresh", action="store_true", help="begin anew in --output instead of going on there")
    top.add_argument("--resume", metavar="FOLDER", help="begin with the checkpoint of another run")
    top.add_argument(
        "--shard", action="store_true", help="the base model in slices, one for each process of `accelerate launch`"
    )
    fields = top.add_argument_group("PPOConfig", "where not given, the profile's value, else the default of TRL 0.11")
    for field in PPO_FIELDS:
        kinds = typing.get_args(field.type) or [field.type]
        fields.add_argument(
            *dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]),
            dest=field.name,
            default=argparse.SUPPRESS,
            type=optional(kinds[0]) if types.NoneType in kinds else boolean if kinds[0] is bool else kinds[0],
            metavar=kinds[0].__name__.upper(),
            help=f"{field.metadata['help']} (TRL: {field.default})" if field.name not in OURS else field.metadata["help"],
        )
    return top


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected true or false")
    return text.lower() == "true"


def optional(kind):
    """The type of an option that may be "none"."""

    def parse(text):
        try:
            return None if text.lower() == "none" else kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a number or none") from None

    return parse


def main(arguments=None):
    """Run the command line. Returns the exit status: 0; 2 after one sentence on what is wrong with the input or the disk; 130
    after Ctrl-C, 143 after SIGTERM, 141 after a pipe that nobody reads. Anything else that is raised is a fault of the program."""
    for stream in (sys.stdout, sys.stderr):  # a file or a pipe in another encoding gets ? for what that lacks, and no error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    try:
        with terminable():
            if options.check:
                from rlhf_helpers.machine import check

                status = check()
            else:
                status = run(options)
            if sys.stdout:  # None where it was closed
                sys.stdout.flush()
            return status
    except InputError as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("stopped; what was saved stays, and the same command goes on from there", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    except BrokenPipeError:
        if is_read(sys.stdout, ""):
            raise  # it was another pipe
        is_read(sys.stderr, "stopped: nobody reads this output any more; what was saved stays, and the same command goes on")
        return 128 + 13
    except OSError as error:
        if is_full(error) and error.filename is None:  # of what is printed, most likely; files say more (`files.NotWritten`)
            said = (
                f"error: what is printed, or another file: {error.strerror}; what was saved stays, and the same command goes on"
            )
            try:
                sys.stdout.flush()
            except OSError:
                leads_nowhere(sys.stdout)
            print(said, file=sys.stderr)
            return 2
        if not is_no_place(error):
            raise
        print(f"error: {shown(error.filename)}: {error.strerror}; expected a place to read or write", file=sys.stderr)
        return 2


def is_read(stream, text):
    """Says a text, unless the reader of a pipe is gone, as after `... | head -1`: then the stream leads nowhere."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        leads_nowhere(stream)
        return False
    return True


def leads_nowhere(stream):
    """From now on; Python flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@dataclasses.dataclass
class Job:
    """A command whose input was read and checked."""

    profile: object
    config: object
    prompts: list
    prompts_file: object
    heldout: list
    heldout_file: object
    steps: int
    save_every: int
    output: Path
    fresh: bool
    resume: str | None
    reward_folder: object
    started: float
    shard: bool
    settings: dict | None = None
    seconds_before: float = 0.0  # of the earlier starts of this run


def checked(options):
    """The Job of these options. Nothing is made or written; torch is not needed."""
    started, profile = time.perf_counter(), profile_named(options.profile)
    if options.model is not None:
        profile = dataclasses.replace(profile, model=options.model)
    config = profile.ppo_config(**{field.name: getattr(options, field.name) for field in PPO_FIELDS if field.name in options})
    steps = profile.steps if options.steps is None else options.steps
    for name, number in (("--steps", steps), ("--save_every", options.save_every)):
        if number < 1:
            raise InputError(f"{name} is {number}; expected a whole number from 1")
    given = lambda name, default: default() if getattr(options, name) is None else getattr(options, name)
    prompts_file = given("prompts", lambda: course_file(profile.prompts))
    heldout_file = given("heldout", lambda: course_file(profile.heldout_prompts))
    prompts, heldout = load_prompts(prompts_file), load_prompts(heldout_file)
    kept_back = set(heldout)
    prompts = [prompt for prompt in prompts if prompt not in kept_back]
    if not prompts:
        raise InputError(f"{prompts_file}: every prompt is held out in {heldout_file}; expected others to train on")
    output = Path(options.output)
    if not options.output.strip():
        raise InputError(f"--output is {options.output!r}; expected a folder")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; expected a folder")
    check_own(output / "checkpoint", "trainer.json")
    reward_folder = given("reward_model", lambda: project_root() / profile.reward_model)
    if output.resolve() == Path(reward_folder).resolve():
        raise InputError(f"--output {output}: is the reward model's folder; expected one of its own")
    how = (options.save_every, output, options.fresh, options.resume, reward_folder, started, options.shard)
    return Job(profile, config, prompts, prompts_file, heldout, heldout_file, steps, *how)


def run(options):
    """The whole job. Input is read and checked before anything is made or written."""
    job = checked(options)
    import torch
    from accelerate import PartialState

    from rlhf_helpers.checkpoint import read_settings
    from rlhf_helpers.machine import device_and_dtype
    from rlhf_helpers.models import resolve
    from rlhf_helpers.quirks import leave_processes
    from rlhf_helpers.reward import RewardModel, ensure_reward_model
    from rlhf_helpers.run import alone_in, finished, saved_run, settings
    from rlhf_helpers.shard import several_processes

    device, dtype = device_and_dtype()
    processes = PartialState(cpu=device.type == "cpu")  # one, unless `accelerate launch` started more; the main one speaks
    if dtype == torch.float16:
        processes.print("this card has no native bf16 (compute capability below 8.0): computing in fp16, which ends at 65,504")
    if job.shard:
        several_processes()
    # several processes do not train it: transformers' Trainer would join them
    if options.reward_model is None and processes.num_processes > 1 and not Path(job.reward_folder).exists():
        raise InputError(f"{job.reward_folder}: no reward model yet; expected one from `python -m rlhf_helpers --prepare`")
    # wrong folders are reported before the models are fetched
    reward = RewardModel.load(options.reward_model) if options.reward_model is not None else None
    if job.resume is not None:
        read_settings(job.resume, job.config, processes.num_processes)
    with processes.main_process_first():
        model_folder = resolve(job.profile.model)
        reward = reward or ensure_reward_model(job.reward_folder)
    if options.prepare:
        processes.print(f"ready: {job.profile.model}, {job.reward_folder}")
        leave_processes()
        return 0
    inputs = (job.prompts, job.heldout, job.reward_folder, processes.num_processes, model_folder)
    job.settings = settings(job.profile, job.config, *inputs)
    with alone_in(job.output, needed=processes.is_main_process):
        saved = None if job.fresh else saved_run(job.output, job.settings, job.resume)
        done = saved and finished(job.output, saved, job.steps, job.config)
        if text := done and last_screen(*done, job, saved):
            processes.print(text)
            leave_processes()
            return 0
        return train(job, reward, saved, processes)


def last_screen(summary, samples, job, saved):
    """What a run that was finished before says, or None where its results lack something: they are made again."""
    from rlhf_helpers.evaluation import screen

    spent = saved["steps_done"] < job.steps
    how_far = f"{saved['steps_done']} of {job.steps} steps{', KL budget spent' if spent else ''}"
    more = "a larger --kl_budget" if spent else "more --steps"
    try:
        results = screen(summary, samples, job.output)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return f"{job.output}: this run is finished ({how_far}); --fresh makes it again, {more} goes on\n{results}"


def train(job, reward, saved, processes):
    """Everything after the preparations: PPO, from the beginning or from where it was, and what it brought."""
    from rlhf_helpers.evaluation import evaluate
    from rlhf_helpers.keeper import Keeper, at_once
    from rlhf_helpers.models import load_policy
    from rlhf_helpers.quirks import leave_processes
    from rlhf_helpers.shard import bytes_held
    from rlhf_helpers.trainer import PPOTrainer

    if job.profile.name == "gpu" and processes.device.type == "cpu":
        processes.print("no CUDA card here: the profile gpu runs on the CPU, slowly; expected --profile cpu on this machine")
    processes.print(f"loading {job.profile.model}", flush=True)
    policy, tokenizer = load_policy(job.profile, seed=job.config.seed, sharded=job.shard)
    trainer = PPOTrainer(config=job.config, model=policy, ref_model=None, tokenizer=tokenizer)
    check_lengths(job, trainer)
    keeper = Keeper(job, trainer)
    before = keeper.go_on(saved, reward) if saved else keeper.begin(reward)
    if processes.is_main_process:
        budget = f", at most {job.config.kl_budget:g} nats of KL" if job.config.kl_budget else ""
        many = f" on {processes.num_processes} processes" if processes.num_processes > 1 else ""
        print(f"PPO: {job.steps} steps of {job.config.batch_size} responses{many}{budget}, "
              f"profile {job.profile.name}, {job.profile.model}", flush=True)  # fmt: skip
        if job.shard:
            here, whole = bytes_held(trainer.model.pretrained_model)
            print(f"shards: each process holds {here / 1e6:.0f} of the {whole / 1e6:.0f} MB of the base's weights", flush=True)
    try:
        trainer.train(job.prompts, reward, steps=max(0, job.steps - trainer.steps_done), on_step=keeper)
    except Interrupted as stop:
        keeper.save()
        done = f"{trainer.steps_done} of {job.steps}"
        processes.print(f"stopped after step {done}, saved in {job.output}; the same command goes on", flush=True)
        leave_processes(trainer)
        return 128 + stop.signum
    if trainer.steps_done < job.steps:
        processes.print(f"stopped after step {trainer.steps_done}: the KL budget of {job.config.kl_budget:g} nats is spent")
    with finishing() as asked:
        keeper.save()
    asked.check()
    after = evaluate(trainer, job.heldout, reward, batch_size=at_once(trainer))
    leave_processes(trainer)
    if processes.is_main_process:
        write_results(job, trainer, before, after, keeper.seconds(), processes.num_processes)
    return 0


def check_lengths(job, trainer):
    """Raises InputError, with the file, where no prompt of it leaves room for a response. Those that do not are told later."""
    for file, prompts in ((job.prompts_file, job.prompts), (job.heldout_file, job.heldout)):
        with warnings.catch_warnings(action="ignore"):
            try:
                trainer.encode(prompts)
            except InputError as error:
                raise InputError(f"{file}: {str(error).removeprefix('prompts: ')}") from None


# ---------------------------------------------------------------- results


def write_results(job, trainer, before, after, seconds, processes):
    """samples.jsonl, curves.png and, last of all, summary.json; then the last screen."""
    from rlhf_helpers.course.plots import save_figure, training_curves
    from rlhf_helpers.evaluation import report, summarize
    from rlhf_helpers.run import write_json

    samples = [{**a, "before": b["response"], "reward_before": b["reward"], "gold_before": b["gold"]}
               for a, b in zip(after.records(), before.first(after.samples).records())]  # fmt: skip
    save_jsonl(job.output / "samples.jsonl", samples)
    save_figure(training_curves(trainer.history), job.output / "curves.png")
    summary = summarize(before, after, trainer.history, seconds)
    summary |= dict(steps=trainer.steps_done, seed=job.config.seed, processes=processes)
    write_json(job.output / "summary.json", summary)
    report(summary, samples, job.output)


if __name__ == "__main__":
    sys.exit(main())
