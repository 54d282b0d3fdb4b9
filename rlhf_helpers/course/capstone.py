"""The capstone, notebook 09: pairs that the learner labels, a reward model from them, four runs without their names, and what it
all comes to once the gold is revealed."""

import html
import random
import textwrap
from dataclasses import dataclass

import numpy as np

from rlhf_helpers.config import CPU, DATA_FILE, project_root
from rlhf_helpers.course import compare, guesses, plots
from rlhf_helpers.course.capstone_exercises import BLOCK, KEY, letters_of, right_diagnoses
from rlhf_helpers.course.gold import gold_parts, gold_reward, is_whole, names_subject, warm_words
from rlhf_helpers.course.runs import Log, logs_of, read_log
from rlhf_helpers.data import load_preferences
from rlhf_helpers.evaluation import chosen_of, paired_gain
from rlhf_helpers.intervals import mean_interval, share_interval

PAIRS = 50
BUDGET = CPU.ppo_config().kl_budget  # nats, of all blind runs but the misled one
TRAINING = dict(epochs=8, batch_size=10)  # of the reward model: 40 steps, as 8 passes over so few pairs take
FILES = {  # what the blind runs are, by the names that KEY gives them
    "healthy": "headline/frozen_seed8",
    "misled": "capstone/fifty_pairs_no_price_seed0",
    "bug": "capstone/score_on_the_first_token_seed0",
    "hacked": "counting/frozen_seed1",  # of its three seeds the one whose gold fell
    "mended bug": "headline/frozen_seed0",  # the same seed and settings, the score on the last token
}


# ---------------------------------------------------------------- pairs and labels


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers in a mixed order, and the letter that the course's annotator chose, with his usual noise."""

    prompt: str
    a: str
    b: str
    annotator: str


def pairs_to_label(seed=9):
    """50 of the course's training pairs, each on another prompt: a list of Pair, the same at every call."""
    every = {}
    for pair in load_preferences(project_root() / DATA_FILE):
        every.setdefault(pair["prompt"], []).append(pair)
    rng, pairs = random.Random(seed), []
    for prompt in rng.sample(sorted(every), PAIRS):
        pair, swap = rng.choice(every[prompt]), rng.random() < 0.5
        answers = (pair["rejected"], pair["chosen"]) if swap else (pair["chosen"], pair["rejected"])
        pairs.append(Pair(prompt, *answers, annotator="b" if swap else "a"))
    return pairs


class Shown:
    """Ten pairs as text that flows, on a phone too; in a terminal as plain lines. What was chosen has a mark."""

    def __init__(self, pairs, block, letters):
        self.rows = [(BLOCK * (block - 1) + n + 1, pair, letters[n : n + 1]) for n, pair in enumerate(pairs)]

    def lines(self):
        for number, pair, letter in self.rows:
            yield number, pair.prompt, [(name, " ".join(getattr(pair, name).split()), name == letter) for name in "ab"]

    def _repr_html_(self):
        parts = []
        for number, prompt, answers in self.lines():
            parts.append(f"<p><b>{number}. {html.escape(prompt)}</b></p>")
            for name, text, chosen in answers:
                mark = "<b>yours &rarr;</b> " if chosen else ""
                parts.append(f'<p style="margin-left:1.5em">{mark}<b>{name}:</b> {html.escape(text)}</p>')
        return "\n".join(parts)

    def __repr__(self):
        lines = []
        for number, prompt, answers in self.lines():
            lines.append(f"{number}. {prompt}")
            for name, text, chosen in answers:
                start = f"{'->' if chosen else '  '} {name}: "
                lines.append(textwrap.fill(text, 100, initial_indent=start, subsequent_indent=" " * len(start)))
        return "\n".join(lines)


def show(pairs, block, labels=""):
    """Ten pairs, block 1 to 5, with the letters that were given so far marked; a label that cannot be read is one sentence."""
    letters, wrong = letters_of(labels, block)
    print(wrong or said(letters, block))
    return Shown(pairs[BLOCK * (block - 1) : BLOCK * block], block, letters)


def said(letters, block):
    given = sum(letter in "ab" for letter in letters)
    return f"pairs {BLOCK * block - BLOCK + 1} to {BLOCK * block}: {given} of {BLOCK} labelled"


@dataclass(frozen=True)
class Labels:
    """A letter for every pair, and which of them are the learner's."""

    letters: str
    own: tuple

    def preferences(self, pairs):
        """The pairs as a reward model is trained on them."""
        other = dict(a="b", b="a")
        return [
            dict(prompt=pair.prompt, chosen=getattr(pair, letter), rejected=getattr(pair, other[letter]))
            for pair, letter in zip(pairs, self.letters)
        ]


def filled(pairs, labels):
    """Labels of {block: its letters}; where the learner gave none, the annotator's noisy choice stands in, and a line says so."""
    letters = []
    for block in range(1, PAIRS // BLOCK + 1):
        read, wrong = letters_of(labels.get(block, ""), block)
        if wrong:
            print(wrong)
        letters += list(read.ljust(BLOCK, "."))
    own = tuple(letter in "ab" for letter in letters)
    rest = "" if all(own) else "; the annotator's noisy choice stands in for the rest"
    print(f"you labelled {sum(own)} of {PAIRS}{rest}")
    return Labels("".join(letter if mine else pair.annotator for letter, mine, pair in zip(letters, own, pairs)), own)


def stand_in(pairs):
    """The annotator's noisy choice for every pair: what the shipped runs were trained on."""
    return Labels("".join(pair.annotator for pair in pairs), (False,) * len(pairs))


YARDSTICKS = {
    "the longer answer": lambda prompt, text: len(text.split()),
    "the answer that ends like a sentence": lambda prompt, text: is_whole(text),
    "the answer with more warm words": lambda prompt, text: warm_words(text),
}


def agreement(pairs, labels):
    """Rows of how often the labels name what another would name: the learner's own, or all of them where there are none, which
    says nothing about the annotator then: they are his. A yardstick that sees no difference in a pair says nothing about it."""
    own = [i for i, mine in enumerate(labels.own) if mine]
    use = own or list(range(len(pairs)))
    rows = {"the annotator's choice": [labels.letters[i] == pairs[i].annotator for i in own]}
    for name, of in YARDSTICKS.items():
        rows[name] = same_as(of, pairs, labels, use)
    rows["the answer that names its subject"] = same_as(names_subject, pairs, labels, use)
    alike = [i for i in use if names_subject(pairs[i].prompt, pairs[i].a) == names_subject(pairs[i].prompt, pairs[i].b)]
    rows["more warm words, of two alike in that"] = same_as(YARDSTICKS["the answer with more warm words"], pairs, labels, alike)
    return [row(name, hits) for name, hits in rows.items()]


def same_as(of, pairs, labels, use):
    """Whether the letter of each pair is the one with the higher `of`, for those in which the two differ."""
    hits = []
    for i in use:
        first, second = of(pairs[i].prompt, pairs[i].a), of(pairs[i].prompt, pairs[i].b)
        if first != second:
            hits.append(labels.letters[i] == ("a" if first > second else "b"))
    return hits


TASTE = {
    "A": "length shows at once, and says least: one answer in four here is long because it never ends.",
    "B": "an answer that breaks off is easy to see, and hard to like.",
    "C": "warm words please; whether they please you, or only stand in answers that do, these pairs cannot tell.",
}


def tell_taste(guess, rows):
    """The learner's guess beside the yardstick of `agreement` that the labels went along with most."""
    shares = {letter: row["same"] for letter, row in zip(TASTE, rows[1:]) if row["pairs that differ"] >= 5}
    if not shares:
        return print("too few labels to tell: the pairs that differ by a yardstick are fewer than five for each")
    guesses.choice(guess, max(shares, key=lambda letter: float(shares[letter].rstrip("%"))), TASTE)


def row(name, hits):
    if not hits:
        return {"labels against": name, "pairs that differ": 0, "same": "", "95 % interval": ""}
    share, (low, high) = share_interval(hits)
    return {
        "labels against": name,
        "pairs that differ": len(hits),
        "same": f"{share:.0%}",
        "95 % interval": f"{low:.0%} to {high:.0%}",
    }


# ---------------------------------------------------------------- four runs without their names


def blind():
    """{"A": Log, ..., "D": Log}: a healthy run, a misled one, a hacked one, and one with a bug, in an order that is told later."""
    return {letter: run_named(name) for letter, name in KEY.items()}


def run_named(name):
    """The log of one of FILES."""
    return read_log(project_root() / "data" / "runs" / f"{FILES[name]}.jsonl.gz")


def stopped(log, config, otherwise=BUDGET):
    """(the log up to where the budget of `config` ends it, that budget): number for number the run that a budget would have ended.
    A config without a budget is taken for one of `otherwise` nats."""
    budget = getattr(config, "kl_budget", None) or otherwise
    spent = plots.running_mean(log.course_of("kl"), 4) > budget
    return Log(log.head, log.steps[: int(spent.argmax()) + 1] if spent.any() else log.steps, log.after), budget


CURVES = {
    "score (what the run was paid for)": lambda log: log.course_of("score"),
    "KL, nats a response": lambda log: log.course_of("kl"),
    "length, tokens": lambda log: log.course_of("length"),
    "share that ends by itself": lambda log: log.course_of("ended"),
}
COLOURS = {"A": plots.BLUE, "B": plots.ORANGE, "C": plots.GREEN, "D": plots.RED}  # of whatever else is drawn: purple


def curves(logs, width=4):
    """Four curves of several runs, each named at its end; means of `width` steps."""
    figure, axes = plots.new_figure(2, 2, size=(9.2, 5.2))
    for axis, (title, of) in zip(axes.flat, CURVES.items()):
        ends = []
        for name, log in logs.items():
            line, colour = plots.running_mean(of(log), width), COLOURS.get(name, plots.PURPLE)
            axis.plot(range(1, len(line) + 1), line, color=colour, linewidth=1.8)
            ends.append((line[-1], len(line), name, colour))
        if title.startswith("KL"):
            axis.axhline(BUDGET, color=plots.GREY, linewidth=1, linestyle="--")
            how = dict(xytext=(0, 3), textcoords="offset points", fontsize=plots.SMALL, color=plots.GREY)
            plots.over_lines(axis.annotate(f"budget {BUDGET:g}", (1, BUDGET), **how))
        label_ends(axis, ends)
        axis.set_title(title, loc="left")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[-1]:
        axis.set_xlabel(f"step; mean of {width}")
    return figure


def label_ends(axis, ends):
    """The names beside the ends of the lines, moved apart where they would lie on each other."""
    low, high = axis.get_ylim()
    gap, near, placed = 0.09 * (high - low), 0.1 * max(x for _, x, _, _ in ends), []
    for y, x, name, colour in sorted(ends):
        at = max([y, *(other + gap for other, where in placed if abs(x - where) < near)])
        placed.append((at, x))
        axis.annotate(f" {name}", (x, at), color=colour, fontsize=plots.TEXT, va="center", fontweight="bold")
    axis.margins(x=0.09)


class Texts:
    """{section: [(title, text)]} as text that flows, on a phone too; in a terminal as plain lines."""

    def __init__(self, sections):
        self.sections = sections

    def _repr_html_(self):
        parts = []
        for name, entries in self.sections.items():
            parts.append(f"<p><b>{html.escape(name)}</b></p>")
            for title, text in entries:
                parts.append(f'<p style="margin-left:1.5em"><b>{html.escape(title)}</b><br>{html.escape(text)}</p>')
        return "\n".join(parts)

    def __repr__(self):
        indented = lambda text: textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="    ")
        entries = [(f"{name}, {title}", text) for name, some in self.sections.items() for title, text in some]
        return "\n\n".join(f"{title}\n{indented(text)}" for title, text in entries)


def samples(logs, at=((0, 0), (0, 1), (0.5, 0), (-2, 0), (-2, 1), (-1, 0), (-1, 1))):
    """What each run wrote: Texts of some of its steps (0.5: half-way) and rows, with the score that the run was paid for each."""
    sections = {name: [] for name in logs}
    for name, log in logs.items():
        for step, row in at:
            number = (len(log.steps) // 2 - 1 if step == 0.5 else step) % len(log.steps)
            one = log.steps[number]
            title = f"step {number + 1} ({one['scores'][row]:+.1f}): {one['prompts'][row]}"
            sections[name].append((title, " ".join(one["texts"][row].split())))
    return Texts(sections)


# ---------------------------------------------------------------- the gold revealed


def gains(logs):
    """Rows of gold gained over the untrained model on the 120 test prompts, two answers to each, with its interval."""
    base, rows = logs_of("base", "test")[0], {}
    for name, log in ({"untrained": base} | logs).items():
        gain, (low, high) = mean_interval(compare.gain(log, "gold"))
        gained = ("", "") if log is base else (f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}")
        warm = np.mean([gold_parts(*answer)["warmth"] for answer in zip(log.judged, log.after["responses"])])
        rows[name] = {"gold gained": gained[0], "95 % interval": gained[1], "KL": f"{log.kl:.1f}",
                      "finished": f"{log.whole:.0%}", "warm words": f"{warm:.2f}"}  # fmt: skip
    return rows


def at_the_end(logs, width=4):
    """Rows of what each run was like in its last `width` steps, from its own batches; the gold is left out."""
    rows = {}
    for name, log in logs.items():
        last = {what: log.course_of(what)[-width:].mean() for what in ("score", "kl", "length", "ended")}
        rows[name] = {"steps": len(log.steps), "score": f"{last['score']:+.2f}", "KL": f"{last['kl']:.1f}",
                      "tokens": f"{last['length']:.0f}", "ends by itself": f"{last['ended']:.0%}"}  # fmt: skip
    return rows


def gold_in_batches(logs, width=4):
    """Rows of the gold of what each run wrote while it trained, in its first and last `width` steps, 16 answers a step."""
    rows = {}
    for name, log in logs.items():
        gold = [[gold_reward(*one) for one in zip(step["prompts"], step["texts"])] for step in log.steps]
        for when, part in (("first", gold[:width]), ("last", gold[-width:])):
            mean, (low, high) = mean_interval([one for step in part for one in step])
            rows.setdefault(name, {})[f"gold, {when} {width} steps"] = f"{mean:.2f} ({low:.2f} to {high:.2f})"
    return rows


def best_of_four(reward_fn, prompts):
    """(mean gold of the best of 4, gold of a single answer) of the untrained model on dev prompts, the best by `reward_fn`."""
    base = logs_of("base", "dev")[0]
    use = [i for i, prompt in enumerate(base.judged) if prompt in set(prompts)]
    asked, texts = [base.judged[i] for i in use], [base.after["responses"][i] for i in use]
    shape = (len(prompts), -1)
    rewards, gold = np.asarray(reward_fn(asked, texts)).reshape(shape), base.gold[use].reshape(shape)
    return float(chosen_of(rewards, gold, 4).mean()), float(gold.mean())


GOLD_LESSONS = {
    "A": "the reward model was right further out than its fifty pairs could show, at least as far as this run went.",
    "B": "what people want did not change by more than this interval can show, whatever the proxy did.",
    "C": "the proxy rose, and what people want was given up for it. That is what hacked means.",
}


def gold_of_run(before, after):
    """What the hidden gold of two Evaluations of the same prompts was: (before, after, gain, (low, high), the letter of what
    happened: A it rose, B no change that the interval can tell from none, C it fell)."""
    gain, (low, high) = paired_gain(before.prompts, before.gold, after.gold)
    letter = "A" if low > 0 else "C" if high < 0 else "B"
    return float(before.gold.mean()), float(after.gold.mean()), gain, (low, high), letter


def scorecard(pairs, labels, accuracy, course_accuracy, guessed, happened, diagnosis):
    """Rows of up to 100 points. Labels: the share of the 50 that are the learner's, times how far the rule agrees with them beyond a
    coin; those that stand in earn nothing here. Reward model: what it ranks beyond a coin, over what the course's does (`accuracy` and
    `course_accuracy`, shares). Then the guess (letters of `gold_of_run`), and each diagnosis."""
    own = [i for i, mine in enumerate(labels.own) if mine]
    hits = same_as(gold_reward, pairs, labels, own)
    beyond = lambda share: max(0.0, 2 * share - 1)  # a coin earns nothing
    said = "nothing" if guessed is ... else guessed
    rows = [
        (25 * sum(labels.own) / PAIRS * beyond(np.mean(hits) if hits else 0.5), 25, "labels",
         f"{len(own)} of yours, the rule agrees with {sum(hits)}" if own else "none of yours"),
        (25 * min(1.0, beyond(accuracy) / (beyond(course_accuracy) or 1.0)), 25, "reward model", f"yours {accuracy:.0%}, the course's {course_accuracy:.0%}"),
        (10 * (guesses.as_letter(guessed, GOLD_LESSONS) == happened), 10, "gold of your run", f"you said {said}, it was {happened}"),
        (10 * right_diagnoses(diagnosis), 40, "diagnoses", f"{right_diagnoses(diagnosis)} of {len(KEY)} right"),
    ]  # fmt: skip
    table = [dict(what=what, points=f"{points:.0f} of {most}", because=why) for points, most, what, why in rows]
    return [*table, dict(what="in all", points=f"{sum(row[0] for row in rows):.0f} of 100", because="")]
