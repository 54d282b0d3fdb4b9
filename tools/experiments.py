"""Write the tables and figures of docs/experiments.md, and the README's table, from the logs in data/runs: `python tools/experiments.py`.

Between `<!-- NAME -->` and `<!-- end -->` stands what the function of that name makes; all else in the pages is written by hand.
`--check` writes nothing, and exits with 1 where a page is not what the logs say."""

import argparse
import math
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np

from rlhf_helpers.course import compare, judges, run_figures
from rlhf_helpers.course.compare import (
    SIZES,
    base,
    by_condition,
    drawn_until_whole,
    gain,
    net,
    plane,
    signed,
    spread,
    stacked,
    times,
    verdict,
)
from rlhf_helpers.course.experiments import EXPERIMENTS, SCORED, missing
from rlhf_helpers.course.gold import gold_parts, gold_reward
from rlhf_helpers.course.runs import logs_of
from rlhf_helpers.data import read_jsonl
from rlhf_helpers.evaluation import chosen_of
from rlhf_helpers.intervals import mean_interval, two_level_interval

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "experiments.md"
PAGES = (PAGE, HERE.parent / "README.md")
NONE_YET = "*Not made yet.*"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def row_of(log):
    """What every table says of a run."""
    parts = [gold_parts(prompt, text) for prompt, text in zip(log.judged, log.after["responses"])]
    share = lambda name: f"{np.mean([part[name] for part in parts]):.0%}"
    return [*(spread(mean_interval(gain(log, name))) for name in ("rewards", "gold")), f"{log.kl:.1f}", f"{log.whole:.0%}",
            share("on_subject"), f"{np.mean([part['warmth'] for part in parts]):.2f}", f"{log.distinct2:.2f}"]  # fmt: skip


COLUMNS = ["reward gained", "gold gained", "KL", "whole", "on subject", "warm words", "distinct pairs within"]


def base_row(split):
    log = base(split)
    parts = [gold_parts(prompt, text) for prompt, text in zip(log.judged, log.after["responses"])]
    return ["0", "0", "0", f"{log.whole:.0%}", f"{np.mean([p['on_subject'] for p in parts]):.0%}",
            f"{np.mean([p['warmth'] for p in parts]):.2f}", f"{log.distinct2:.2f}"]  # fmt: skip


# ---------------------------------------------------------------- the blocks of the page


def best_of_n(split="test"):
    """Best of n on the prompts of a split: no training, n samples an answer."""
    log = base(split)
    if log is None:
        return NONE_YET
    rewards, gold, rows = log.by_prompt(log.rewards), log.by_prompt(log.gold), []
    for n in [n for n in SIZES if n <= rewards.shape[1]]:
        proxy, real = (mean_interval(chosen_of(rewards, values, n)) for values in (rewards, gold))
        bound = math.log(n) - (n - 1) / n
        rows.append([n, f"{bound:.2f}", *(f"{m:.2f} ({low:.2f} to {high:.2f})" for m, (low, high) in (proxy, real))])
    return table(["n", "KL at most, nats", "reward", "gold"], rows)


def recipes(experiment="recipes"):
    """Every recipe that was tried on dev prompts."""
    rows = [["untrained", "", "", *base_row("dev"), "", "", ""]] if base("dev") else []
    for log in logs_of(experiment) if base("dev") else []:
        acts = [
            f"{log.course_of('clipped').mean():.1%}",
            f"{log.course_of('ratio').mean():.3f}",
            signed(np.nanmean(log.course_of("explained"))) if np.isfinite(log.course_of("explained")).any() else "not asked",
        ]
        rows.append([log.head["condition"], log.head["seed"], len(log.steps), *row_of(log), *acts])
    return (
        table(["recipe", "seed", "steps", *COLUMNS, "clipped", "ratio from 1", "value explains"], rows)
        if logs_of(experiment)
        else NONE_YET
    )


def headline():
    """The frozen recipe on the test prompts."""
    logs = logs_of("headline")
    if not logs or base("test") is None:
        return NONE_YET
    rows = [["untrained", "", *base_row("test"), ""]]
    for log in logs:
        rows.append([log.head["seed"], len(log.steps), *row_of(log), f"{log.head['seconds'] / 60:.1f}"])
    lines = [table(["seed", "steps", *COLUMNS, "minutes"], rows), ""]
    for name, title in (("rewards", "Reward"), ("gold", "Gold")):
        before = base("test")
        gains = np.stack([gain(log, name) for log in logs])
        level = np.mean([getattr(log, name).mean() for log in logs])
        lines.append(f"- **{title}**: {getattr(before, name).mean():.2f} before, {level:.2f} after, gain {spread(two_level_interval(gains))}; "
                     f"seeds with a gain: {(gains.mean(1) > 0).sum()} of {len(logs)}.")  # fmt: skip
    before = base("test")
    rewards = before.by_prompt(before.rewards)
    for n in (4, 8, 16):
        if n > rewards.shape[1]:
            continue
        for name, title in (("rewards", "reward"), ("gold", "gold")):
            best = chosen_of(rewards, before.by_prompt(getattr(before, name)), n)
            apart = np.stack([log.by_prompt(getattr(log, name)).mean(1) - best for log in logs])
            mean, (low, high) = two_level_interval(apart)
            verdict = "more than" if low > 0 else "less than" if high < 0 else "a tie with"
            lines.append(f"- In {title} {verdict} best of {n}: {spread((mean, (low, high)))}.")
    lines += controls(logs, chosen_of(rewards, rewards, 4).mean() - rewards.mean())
    each = lambda what: [what(log) for log in logs]
    across = lambda values, form: f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
    lines.append(f"- Mean and range of the seeds: KL {across(each(lambda log: log.kl), '.1f')} nats, whole answers "
                 f"{across(each(lambda log: log.whole), '.0%')}, distinct pairs {across(each(lambda log: log.distinct2), '.2f')}, "
                 f"minutes of PPO on two cores {across(each(lambda log: log.head['seconds'] / 60), '.1f')}.")  # fmt: skip
    lines.append(f"- {len(logs)} of 10 seeds are made.")
    return "\n".join(lines)


def controls(logs, best_of_4):
    """What else would have brought the gold, and what the gain is worth by the objective."""
    before, price = base("test"), logs[0].head["config"]["init_kl_coef"]
    whole = drawn_until_whole(before, before.gold)
    draws = compare.draws_until_whole(before)
    apart = two_level_interval(np.stack([log.by_prompt(log.gold).mean(1) - whole for log in logs]))
    more = mean_interval(whole - before.by_prompt(before.gold).mean(1))
    worth = np.stack([net(log, price) for log in logs])
    free = best_of_4 - price * (math.log(4) - 3 / 4)
    return [
        f"- Drawing anew until an answer of the untrained model is *whole*, without a reward model, has a gold of {whole.mean():.2f}: {spread(more)} "
        f"above a single one, at {draws:.1f} draws an answer. PPO has {spread(apart)} more.",
        f"- By the objective, the reward less {price:g} a nat of KL, the ten gained {spread(two_level_interval(worth))}; best of 4, at its bound of "
        f"KL, {signed(free)}.",
    ]


def parts():
    """The factors of the gold before and after: what the gain is made of."""
    before, logs = base("test"), logs_of("headline")
    if before is None or not logs:
        return NONE_YET
    of = lambda log: [gold_parts(prompt, text) for prompt, text in zip(log.judged, log.after["responses"])]
    found, rows = [(log, of(log)) for log in [before, *logs]], []
    for name, title in PARTS.items():
        start, *ends = [log.by_prompt([part[name] for part in some]).mean(1) for log, some in found]
        gains = np.stack(ends) - start
        rows.append([title, f"{start.mean():.2f}", f"{np.mean(ends):.2f}", spread(two_level_interval(gains)),
                     f"{(gains.mean(1) > 0).sum()} of {len(logs)}"])  # fmt: skip
    return table(["factor", "before", "after", "gain", "seeds with a gain"], rows)


PARTS = dict(
    whole="whole (else a third)", fresh="fresh", on_subject="on subject", english="English", warmth="warm words, up to 3"
)


def read_pairs():
    """The ten pairs of the second draw that were read first, with what the reader and the annotator's rule prefer."""
    rows = []
    for pair in read_jsonl(HERE.parent / "data" / "read_pairs.jsonl", ("prompt", "first", "second", "reader"))[:10]:
        texts = [pair[side] for side in ("first", "second")]
        gold = [gold_reward(pair["prompt"], text) for text in texts]
        prefers = "first" if gold[0] > gold[1] else "second"
        cells = [" ".join(text.split()).replace("|", "\\|") for text in (pair["prompt"], *texts)]
        rows.append(
            [*cells, pair["reader"], prefers if prefers == pair["reader"] else f"**{prefers}**", "{:.1f}, {:.1f}".format(*gold)]
        )
    return table(["prompt", "first", "second", "the reader", "the rule", "gold"], rows)


def samples():
    """First answers to three test prompts, before and after (seed 0): those where the gain in reward is at its quartiles."""
    before, after = base("test"), next(iter(logs_of("headline")), None)
    if before is None or after is None:
        return NONE_YET
    first = [[np.asarray(x).reshape(len(set(log.judged)), -1)[:, 0] for x in (log.rewards, log.gold, log.after["responses"])]
             for log in (before, after)]  # fmt: skip
    order, rows = np.argsort(first[1][0] - first[0][0], kind="stable"), []
    for quarter, name in enumerate(("lower quartile", "median", "upper quartile"), 1):
        at = order[round(quarter / 4 * (len(order) - 1))]
        texts = [f"{text[at].strip()} (reward {reward[at]:+.2f}, gold {gold[at]:.1f})" for reward, gold, text in first]
        rows.append(
            [name, list(dict.fromkeys(after.judged))[at], *(" ".join(text.split()).replace("|", "\\|") for text in texts)]
        )
    return table(["gain", "prompt", "before", "after"], rows)


def compared(experiment):
    """An experiment of several conditions: means over its seeds, and the gain's interval over seeds and prompts."""
    found = compare.rows(experiment)
    return "\n\n".join([table(compare.COLUMNS, found), *at_what_cost(experiment)]) if found else NONE_YET


def at_what_cost(experiment):
    """[a table] of the KL of each condition with several seeds, and of its gain less the headline's price of that KL."""
    frozen, rows = logs_of("headline"), []
    for condition, logs in by_condition(experiment).items() if frozen else ():
        if len(logs) > 1:
            price = frozen[0].head["config"]["init_kl_coef"]
            further = times(*([log.kl for log in some] for some in (logs, frozen)))
            worth, control = (stacked(some, lambda log: net(log, price)) for some in (logs, frozen))
            rows.append([condition, further, spread(two_level_interval(worth)), verdict(worth, control)])
    against = "against the frozen recipe"
    head = ["condition", f"KL {against}", f"reward less {price:g} a nat, gained", f"the same, {against}"] if rows else []
    return [table(head, rows)] if rows else []


def the_control():
    """How much hangs on single runs of the frozen recipe, and whether equal seeds make runs alike."""
    seeds, headline, apart = (0, 1, 2), logs_of("headline"), []
    several = [(name, logs) for experiment in COMPARED for name, logs in by_condition(experiment).items() if len(logs) > 2]
    if len(headline) < 3 or not several:
        return NONE_YET
    for _, logs in several:
        means = {log.head["seed"]: gain(log, "gold").mean() for log in logs}
        if set(seeds) <= set(means):
            apart.append(np.array([means[seed] for seed in seeds]) - np.mean([means[seed] for seed in seeds]))
    of_seeds = ", ".join(f"{mean:+.2f}" for mean in np.mean(apart, axis=0))
    scatter = np.sqrt(np.sum(np.square(apart)) / (2 * len(apart)))  # two degrees of freedom a condition
    parts = [
        f"Gold of seeds 0, 1 and 2 less the mean of these three, on average over {len(apart)} conditions: {of_seeds}; a single run "
        f"scatters by {scatter:.2f}.\n\nVerdicts that turn when one run of the frozen recipe is left out:"
    ]
    for measure, of in measures(headline).items():
        head = ["condition", f"{measure}, against the frozen recipe", "turns without seed"]
        parts.append(table(head, turning(several, headline, of)))
    return "\n\n".join(parts)


def measures(frozen):
    """{name: a function of a log}, prompt by prompt: the gold gained, and the objective at the frozen recipe's price."""
    price = frozen[0].head["config"]["init_kl_coef"]
    return {"gold": lambda log: gain(log, "gold"), f"reward less {price:g} a nat": lambda log: net(log, price)}


def one_method():
    """*Leave one out* and *group mean*, which make the same updates, as one condition: each run alone, and each seed's pair as one."""
    frozen, made = logs_of("headline"), by_condition("advantages")
    twins = [made.get(name, []) for name in ("leave_one_out", "group_mean")]
    if not frozen or not all(twins):
        return NONE_YET
    rows = []
    for measure, of in measures(frozen).items():
        first, second, control = (stacked(logs, of) for logs in (*twins, frozen))
        together = verdict(np.concatenate([first, second]), control), verdict((first + second) / 2, control)
        rows.append([measure, *together, verdict(first, second)])
    first, second, control = (np.array([log.kl for log in logs]) for logs in (*twins, frozen))
    together = times(np.concatenate([first, second]), control), times(np.sqrt(first * second), control)
    rows.append(["KL", *together, times(first, second)])
    against = "against the frozen recipe"
    return table(["the two as one method", f"ten runs {against}", f"five pairs {against}", "the one against the other"], rows)


def turning(several, headline, of):
    """[[condition, verdict, seeds of the headline]]: where the verdict is another as soon as one of these runs is left out."""
    clear = lambda *groups: not (interval := two_level_interval(*groups)[1])[0] <= 0 <= interval[1]
    frozen, rows = stacked(headline, of), []
    for name, logs in several:
        values = stacked(logs, of)
        full = clear(values, frozen)
        turns = [log.head["seed"] for place, log in enumerate(headline) if clear(values, np.delete(frozen, place, 0)) != full]
        if turns:
            rows.append([name, verdict(values, frozen), ", ".join(map(str, turns))])
    return rows


def reward_models():
    """Reward models by themselves: how each ranks the test pairs, and what the best of n by its choice is worth."""
    conditions = dict.fromkeys(log.head["condition"] for log in logs_of("reward_models"))
    rows = [
        judged_by(condition) for condition in sorted(conditions, key=lambda name: [run.condition for run in LISTED].index(name))
    ]
    head = ["reward model", "how many", "test pairs ranked right", "r with gold", "gold, best of 4", "gold, best of 16",
            "best of 16 against the course's"]  # fmt: skip
    return table(head, rows) if rows else NONE_YET


LISTED = SCORED["reward_models"]


def judged_by(condition):
    """A row of `reward_models`."""
    logs, scores = logs_of("reward_models", condition), judges.scores_of(condition)
    across = lambda values: f"{np.mean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")
    best = {n: judges.gold_of_best(scores, n) for n in (4, 16)}
    course = judges.scores_of("course")
    apart = "" if condition == "course" or course is None else verdict(best[16] - judges.gold_of_best(course, 16))
    return [condition, len(logs), across([judges.accuracy(log) for log in logs]), across(judges.correlations(scores)[1]),
            *(across(values.mean(1)) for values in best.values()), apart]  # fmt: skip


def ensemble_of_five():
    """The five reward models on resampled pairs as one, by the best of n of the untrained model: against each alone, and the course's."""
    scores, course = judges.scores_of("resampled"), judges.scores_of("course")
    if scores is None or course is None or len(scores) < 5:
        return NONE_YET
    rows, between = [], judges.correlations(scores)[0]
    for how, together in judges.HOW.items():
        one = together(scores)
        best = {n: judges.gold_of_best(one, n) for n in (4, 16)}
        alone, single = judges.gold_of_best(scores, 16).mean(0), judges.gold_of_best(course, 16)[0]
        apart = [best[16] - alone, best[16] - single]
        told = [
            spread(interval := mean_interval(values)) + (": a tie" if interval[1][0] <= 0 <= interval[1][1] else "")
            for values in apart
        ]
        rows.append([f"{how} of five", *(f"{values.mean():.2f}" for values in best.values()), *told])
    head = ["", "gold, best of 4", "gold, best of 16", "best of 16 against a member alone", "best of 16 against the course's"]
    return (
        f"Errors (what of a score a line in gold does not explain) of two members: r = {between.mean():.2f} on average "
        f"({between.min():.2f} to {between.max():.2f}, ten pairs).\n\n" + table(head, rows)
    )


def endless():
    """Runs with a limit that the untrained model passes: how many of the training answers end by themselves."""
    rows = []
    for condition, logs in by_condition("endless").items():
        for log in logs:
            ended, tokens, kl = (log.course_of(name) for name in ("ended", "length", "kl"))
            parts = (slice(None, 4), slice(-4, None))
            shares = [f"{ended[part].mean():.0%}" for part in parts]
            rose = [" to ".join(signed(log.course_of(name)[part].mean()) for part in parts) for name in ("score", "gold")]
            rows.append([condition, log.head["seed"], *shares, *rose, f"{tokens[-4:].mean():.1f}", f"{kl[-4:].mean():.1f}",
                         spread(mean_interval(gain(log, "gold"))), f"{log.whole:.0%}"])  # fmt: skip
    head = ["condition", "seed", "ended, first four steps", "ended, last four", "score, first four to last", "gold, first four to last", "tokens, last four", "KL, last four",
            "gold gained, test prompts, 64 tokens", "whole there"]  # fmt: skip
    return table(head, rows) if rows else NONE_YET


# ---------------------------------------------------------------- figures


def with_figure(experiment, text):
    """A block with its figure above, once there are logs."""
    if text == NONE_YET:
        return text
    alt = {
        "counting": "Score and gold over the steps, a line a run: without a price the score climbs to 10 and more, and the gold falls to 0",
        "endless": "Share of the training answers that end by themselves over the steps, a panel with the penalty and one without",
        "reward_models": "Gold of the best of n over n, a line for each number of pairs that the choosing reward model was trained on",
    }.get(
        experiment,
        f"Gold over the square root of KL: the runs of {experiment} as dots, best of n of the untrained model as a line",
    )
    return f"![{alt}](figures/{experiment}.svg)\n\n{text}"


def draw(folder):
    """The figure of every experiment with logs, as SVG; the same logs give the same file."""
    folder.mkdir(exist_ok=True)
    of = dict(
        prices=lambda: plane("prices", **compare.by_rate("prices")),
        counting=lambda: run_figures.paid_and_wanted(by_condition("counting")),
        endless=lambda: run_figures.ends_by_itself(by_condition("endless")),
        reward_models=lambda: judges.gold_over_n(
            {"all 856 pairs": "course"} | {f"{n} pairs": f"pairs_{n}" for n in (600, 300, 150, 75)}
        ),
    )
    for experiment in filter(logs_of, DRAWN):
        if figure := of.get(experiment, lambda name=experiment: plane(name))():
            with matplotlib.rc_context({"svg.hashsalt": experiment, "svg.fonttype": "none"}):
                figure.savefig(folder / f"{experiment}.svg", format="svg", metadata={"Date": None})


def still_to_make():
    """How much has been made, and what is listed and has no log."""
    made = [log for name in EXPERIMENTS if name != "base" for log in logs_of(name)]  # that one is the untrained model's
    hours = sum(log.head.get("seconds", 0) for log in made) / 3600
    said = f"{len(made)} runs have logs; their training took {hours:.0f} hours, without evaluations and what was thrown away."
    rows = []
    for name, every in (EXPERIMENTS | SCORED).items():
        left = missing(name)
        if left:
            rows.append([name, f"{len(left)} of {len(every)}", f"{sum(run.minutes for run in left):.0f}"])
    left = table(["experiment", "runs missing", "minutes, about"], rows) if rows else "Nothing is missing."
    return f"{said}\n\n{left}"


BLOCKS = dict(
    best_of_n=best_of_n,
    best_of_n_dev=lambda: best_of_n("dev"),
    recipes=recipes,
    recipes_on_a_card=lambda: recipes("recipes_on_a_card"),
    headline=headline,
    parts=parts,
    read_pairs=read_pairs,
    samples=samples,
    reward_models=reward_models,
    ensemble_of_five=ensemble_of_five,
    endless=endless,
    still_to_make=still_to_make,
    the_control=the_control,
    one_method=one_method,
    reached=lambda: table(compare.REACHED, rows) if (rows := compare.reached()) else NONE_YET,
)
COMPARED = [name for name in EXPERIMENTS if name not in BLOCKS and name != "base"]
BLOCKS |= {name: (lambda name=name: compared(name)) for name in COMPARED}
DRAWN = [name for name in EXPERIMENTS | SCORED if name != "base"]
BLOCKS |= {name: (lambda name=name, made=BLOCKS[name]: with_figure(name, made())) for name in DRAWN}


def filled(page):
    """The page with every block made again."""

    def fill(match):
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES}
    made = {path: filled(page) for path, page in pages.items()}
    if options.check:
        return int(made != pages)
    for path, page in made.items():
        path.write_text(page, encoding="utf-8")
    draw(PAGE.parent / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
