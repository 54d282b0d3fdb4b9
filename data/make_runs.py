"""Make the experiments again: `python data/make_runs.py --all`. One run at a time; a run's log is written when the run is done, so
that a kill costs one run, and the next call goes on with what is missing. `--list` says what that is and how long it will take.

    python data/make_runs.py --list                   what there is, what is missing
    python data/make_runs.py --all                    everything that is missing, in this order
    python data/make_runs.py --only headline prices   these experiments
    python data/make_runs.py --only headline --seeds 0 1
    python data/make_runs.py --only advantages --conditions leave_one_out group_normalised
    python data/make_runs.py --rescore FOLDER         every log's last evaluation, by the reward model in a folder: one judge for all
    OMP_NUM_THREADS=1 python data/make_runs.py --all --part 1/2     every other run; and --part 2/2 beside it

Two processes of one thread each make a step in 15 seconds, together one in 7.5; one process of two threads needs 9 for one (two slow
cores). Seconds in the logs are then those of half a machine.

A log (rlhf_helpers/course/runs.py reads it) has the settings, every step's stats, prompts, texts and scores, and the texts of the
last evaluation, so that another rule can be applied to a run later. Recipes are compared on the dev prompts with seeds from 100;
the frozen recipe, and what is compared with it, ends with the test prompts, on which nothing is chosen. `reward_model` in a log's
head (not in the earlier ones) tells which reward model a run was trained on, `judge` in its last line which one scored its last evaluation.
The logs of `reward_models` have no steps: their head names a reward model, their last line has what it says of the untrained model's
answers to the test prompts, and of both sides of the test pairs."""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from rlhf_helpers.config import CPU, project_root
from rlhf_helpers.course.experiments import EXPERIMENTS, SCORED, Run, log_file, missing
from rlhf_helpers.course.runs import KEPT, SPLITS, logs_of, read_log, write_log
from rlhf_helpers.data import load_preferences, load_prompts
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import find_whole
from rlhf_helpers.machine import processor
from rlhf_helpers.run import digest_of_folder

EVERY = EXPERIMENTS | SCORED
JUDGE = project_root() / "output" / "reward_model_pairwise"  # training it anew may give slightly other weights: 1 or 2 threads


def evaluated(trainer, split, samples, **options):
    """What the policy writes to the prompts of a split, with scores and KL, and which reward model was the judge; `options` of
    `evaluate`."""
    from rlhf_helpers.evaluation import evaluate
    from rlhf_helpers.reward import ensure_reward_model

    found = evaluate(trainer, load_prompts(project_root() / SPLITS[split]), ensure_reward_model(), samples, **options)
    judge = digest_of_folder(find_whole(JUDGE))
    return dict(split=split, responses=found.responses, rewards=found.rewards.tolist(), kl=found.kl.tolist(), judge=judge)


def base_logs():
    return sorted((project_root() / "data" / "runs" / "base").glob("*.jsonl.gz"))


def rescore(folder):
    """Score the last evaluation of every log again, by the reward model in `folder`, so that all have one judge. What a run was
    trained on stays as it was. Raises InputError, before anything is changed, where there is no reward model. The untrained model's
    answers come last: until then they have both judges, so that a kill leaves logs that can be read."""
    from rlhf_helpers.reward import RewardModel

    reward_model, judge = RewardModel.load(folder), digest_of_folder(find_whole(folder))
    judged_too(folder)
    others = sorted(set((project_root() / "data" / "runs").glob("*/*.jsonl.gz")) - set(base_logs()))
    others = [path for path in others if path.parent.name not in SCORED]  # what a reward model said is no answer to score
    for path in [*others, *base_logs()]:
        log = read_log(path)
        if log.after.get("judge") != judge:
            rewards = reward_model(log.judged, log.after["responses"]).tolist()
            moved = max(abs(new - old) for new, old in zip(rewards, log.after["rewards"], strict=True))
            kept = {name: value for name, value in log.after.items() if name != "other_judges"}  # nobody asks for them any more
            write_log(path, log.head, log.steps, kept | dict(rewards=rewards, judge=judge))
            print(f"{path.parent.name}/{path.name}: moved by up to {moved:.3f}", flush=True)


def judged_too(folder):
    """Let the reward model in `folder` score the untrained model's answers, where it has not: a gain in reward is measured by one
    judge, before and after."""
    from rlhf_helpers.reward import RewardModel

    reward_model, judge = RewardModel.load(folder), digest_of_folder(find_whole(folder))
    for path in base_logs():
        log = read_log(path)
        others = log.after.get("other_judges", {})
        if judge != log.after.get("judge") and judge not in others:
            rewards = [round(reward, 4) for reward in reward_model(log.judged, log.after["responses"]).tolist()]
            write_log(path, log.head, log.steps, log.after | dict(other_judges=others | {judge: rewards}))
            print(f"base/{path.name}: scored by {judge}, too", flush=True)


def make(run):
    """One run of PPO and its log."""
    from rlhf_helpers.course import variants
    from rlhf_helpers.models import load_policy
    from rlhf_helpers.trainer import PPOTrainer

    config = CPU.ppo_config(**run.settings, seed=run.seed)
    policy, tokenizer = load_policy(replace(CPU, **run.profile), seed=run.seed)
    how = variants.ADVANTAGES[run.advantages]
    trainer = PPOTrainer(config=config, model=policy, tokenizer=tokenizer, advantages=how)
    if run.change:
        variants.CHANGES[run.change](trainer)
    reward, steps, started = variants.reward_named(run.reward, run.seed), [], time.perf_counter()

    def note(trainer, stats):
        rollout = trainer.rollout
        row = {short: stats[name] for name, short in KEPT.items()}
        row |= dict(ratio=abs(stats["ppo/policy/ratio"] - 1).mean(), seconds=time.perf_counter() - started)
        row = {name: None if not math.isfinite(value) else float(f"{value:.4g}") for name, value in row.items()}
        per_response = dict(scores=rollout.scores.tolist(), kls=rollout.kl.sum(1).tolist())
        row |= {name: [float(f"{value:.4g}") for value in values] for name, values in per_response.items()}
        steps.append(row | dict(prompts=rollout.prompts, texts=rollout.texts))
        print(f"{run.name} {len(steps)}: score {stats['ppo/mean_scores']:+.2f} kl {row['kl']} ended {row['ended']} "
              f"clipped {row['clipped']} ratio {row['ratio']:.3f} explained {row['explained']} "
              f"{row['seconds']:.0f} s", flush=True)  # fmt: skip

    trainer.train(load_prompts(project_root() / CPU.prompts), reward, steps=run.steps or CPU.steps, on_step=note)
    seconds = time.perf_counter() - started
    # By the profile's own sampler at its temperature, whatever the run sampled with: what is compared is what was learnt.
    judge = PPOTrainer(config=CPU.ppo_config(seed=run.seed), model=policy, tokenizer=tokenizer)
    after = evaluated(judge, run.split, run.samples)
    head = dict(experiment=run.experiment, condition=run.condition, seed=run.seed, config=vars(config), profile=run.profile)
    head |= dict(seconds=round(seconds, 1))
    if run.reward == "model":
        head |= dict(reward_model=digest_of_folder(find_whole(JUDGE)))
    write_log(
        log_file(run),
        head | dict(advantages=run.advantages, reward=run.reward, change=run.change, machine=processor()),
        steps,
        after,
    )


def make_dpo(run):
    """One run of DPO on the course's pairs, and its log: a step has loss, accuracy and margin, and no texts."""
    from rlhf_helpers.course.gold import is_whole
    from rlhf_helpers.dpo import dpo_rows, train_with_dpo
    from rlhf_helpers.models import load_policy
    from rlhf_helpers.trainer import PPOTrainer

    policy, tokenizer = load_policy(CPU, seed=run.seed)
    pairs, started = load_preferences(project_root() / CPU.prompts), time.perf_counter()
    steps = train_with_dpo(policy, tokenizer, dpo_rows(pairs, tokenizer, is_whole, CPU.system), run.beta, seed=run.seed)
    seconds = time.perf_counter() - started
    after = evaluated(PPOTrainer(CPU.ppo_config(seed=run.seed), policy, tokenizer=tokenizer), run.split, run.samples)
    head = dict(experiment=run.experiment, condition=run.condition, seed=run.seed, beta=run.beta, seconds=round(seconds, 1),
                machine=processor())  # fmt: skip
    write_log(log_file(run), head, steps, after)


def make_base(split, samples):
    """Base samples to the prompts of a split: what every run is compared with, and what best of n chooses from."""
    from rlhf_helpers.models import load_policy
    from rlhf_helpers.trainer import PPOTrainer

    policy, tokenizer = load_policy(CPU)
    trainer = PPOTrainer(CPU.ppo_config(), policy, tokenizer=tokenizer)
    after = evaluated(trainer, split, samples, seed=4321, batch_size=64, reference=True)
    write_log(log_file(Run("base", split, 0)), dict(experiment="base", condition=split, seed=0, samples=samples), [], after)


def make_scores(run):
    """What a reward model says of the untrained model's answers and of the test pairs, and its log."""
    from rlhf_helpers.course.variants import reward_named

    reward_model, (base,) = reward_named(run.reward, run.seed), logs_of("base", run.split)
    pairs = load_preferences(project_root() / "data" / "pairwise_prefs_test.jsonl")
    prompts, rounded = [pair["prompt"] for pair in pairs], lambda scores: [round(score, 4) for score in scores.tolist()]
    after = {side: rounded(reward_model(prompts, [pair[side] for pair in pairs])) for side in ("chosen", "rejected")}
    after |= dict(split=run.split, rewards=rounded(reward_model(base.judged, base.after["responses"])))
    head = dict(experiment=run.experiment, condition=run.condition, seed=run.seed, reward=run.reward, machine=processor())
    head |= dict(reward_model=digest_of_folder(find_whole(scored_by(run))))
    write_log(log_file(run), head, [], after)


def scored_by(run):
    """The folder of the reward model that `make_scores` asks."""
    names = dict(model=JUDGE.name, resampled=f"reward_models/resampled_{run.seed}")
    return JUDGE.parent / names.get(run.reward, f"reward_models/{run.reward}_seed{run.seed}")


def part(text):
    """(K, N) of "K/N"."""
    try:
        k, n = map(int, text.split("/"))
    except ValueError:
        k = n = 0
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(f"{text!r} is no part; expected K/N with K from 1 to N, such as 1/2")
    return k, n


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="make everything that is missing")
    parser.add_argument("--list", action="store_true", help="say what is missing")
    parser.add_argument("--only", nargs="+", metavar="EXPERIMENT", choices=list(EVERY))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--conditions", nargs="+", metavar="CONDITION", help="of the experiments named, these alone")
    parser.add_argument(
        "--rescore", metavar="FOLDER", help="score every log's last evaluation by the reward model in this folder"
    )
    parser.add_argument("--part", type=part, default=(1, 1), metavar="K/N", help="every N-th run, from the K-th on")
    options = parser.parse_args()
    if options.rescore:
        try:
            return rescore(options.rescore)
        except InputError as error:
            parser.error(f"argument --rescore: {error}")
    names = options.only or list(EVERY)
    known = list(dict.fromkeys(run.condition for name in names for run in EVERY[name]))
    if unknown := [condition for condition in options.conditions or () if condition not in known]:
        parser.error(f"argument --conditions: {unknown[0]!r} is no condition here; expected some of {', '.join(known)}")
    if options.list or not (options.all or options.only):
        total = 0.0
        for name in names:
            left = missing(name)
            minutes = sum(run.minutes for run in left)
            total += minutes
            runs = len(EVERY[name])
            print(f"{name:13s} {runs - len(left):3d} of {runs:3d} runs made, {minutes:5.0f} minutes left")
        print(f"{'':13s} {total / 60:.1f} hours left on two CPU cores")
        return
    from rlhf_helpers import trl_bridge
    from rlhf_helpers.reward import ensure_reward_model

    for name in names:
        for run in missing(name, *options.part):
            asked = options.conditions is None or run.condition in options.conditions
            if asked and (options.seeds is None or run.seed in options.seeds):
                print(f"--- {run.name}, about {run.minutes:.0f} minutes", flush=True)
                if run.beta is not None and (why := trl_bridge.missing("DPOTrainer")):
                    print(f"left out: {why}", flush=True)
                elif run.experiment == "base":
                    make_base(run.condition, run.samples)
                elif run.experiment in SCORED:
                    make_scores(run)
                else:
                    ensure_reward_model()
                    judged_too(JUDGE)
                    make(run) if run.beta is None else make_dpo(run)


if __name__ == "__main__":
    main()
