"""The exercise checks of notebook 09, and how its labels are read: a tick, or a cross with what the answer overlooks. None raises."""

from dataclasses import asdict, fields

from rlhf_helpers.config import CPU
from rlhf_helpers.course.grading import function, not_a_config, number, say, shown

__all__ = ["check_diagnosis", "check_one_setting", "check_pairs_for_half", "check_place_score"]

BLOCK = 10  # pairs on one screen
KEY = {"A": "misled", "B": "bug", "C": "healthy", "D": "hacked"}  # what the blind runs are

# {what a run is: {what a learner may take it for: what that overlooks}}
LESSONS = {
    "healthy": {
        "misled": "its last texts are whole, most are warm, and each is about its own prompt. Which part would you say it lost?",
        "bug": "a bug would have to show somewhere: here score, KL, length and the share of finished answers all move as in notebook 05",
        "hacked": "a hacked run's answers get worse while its score rises. Set its last texts beside its first: which would earn more of the annotator?",
    },
    "misled": {
        "healthy": "its score rises and its answers end. But its KL goes to twice the budget, and its last texts are short: what do they lack that the annotator likes?",
        "bug": "it does what it was told: it is paid more and more. What it is told is wrong, which no line of the code can show",
        "hacked": "weigh what its answers lost against what they won: by its last steps one thing that the annotator wants is gone, and another is there far more often than at first. Which weighs more?",
    },
    "hacked": {
        "healthy": "its score rises, and the budget ended it as it ended a healthy run. Now read its last texts to their last word, and look at the curve that goes with that",
        "bug": "its score rises: what it is paid for, it learns. A masked EOS could look like this, but which run would be hacked then? Each name is used once",
        "misled": "in a misled run what is won makes up for what is lost. Here one thing is won and one is lost: what does each weigh for the annotator?",
    },
    "bug": {
        "healthy": "its score ends no higher than it began, though its KL says that the weights moved. A run that learns is paid more",
        "misled": "a misled run is paid more and more. This one is not: its score has not risen",
        "hacked": "a hacked run's score rises while its answers get worse. This one's score does not rise",
    },
}


def letters_of(labels, block):
    """(letters, what is wrong with them or None): the learner's letters for a block of ten pairs, a, b or . each, in small letters
    and without white space; none for nothing, or for what cannot be read."""
    first = BLOCK * (block - 1) + 1
    where, wanted = f"labels[{block}]", "a, b, or . for a pair that you leave out"
    if labels is ... or labels is None:
        return "", None
    if isinstance(labels, (list, tuple)) and all(isinstance(letter, str) for letter in labels):
        labels = "".join(labels)
    if not isinstance(labels, str):
        return "", f'{where} is {shown(labels)}; expected a string of {BLOCK} letters, such as "abbab.baab"'
    letters = "".join(labels.split()).lower()
    for place, letter in enumerate(letters):
        if letter not in "ab.":
            return "", f"{where} has {letter!r} for pair {first + place}; expected {wanted}"
    if letters and len(letters) != BLOCK:
        return (
            "",
            f"{where} has {len(letters)} letters; expected {BLOCK}, one for each of the pairs {first} to {first + BLOCK - 1}: {wanted}",
        )
    return letters, None


def check_pairs_for_half(answer):
    """How many held-out pairs make the interval of 198 half as wide."""
    hints = [
        (2 * 198, "twice as many pairs make it 1 / sqrt(2) as wide, 0.7; it shrinks with the root of their number"),
        (198 / 4, "the other way round: fewer pairs, a wider interval"),
        (198 / 2, "the other way round: fewer pairs, a wider interval"),
        (198 * 2**0.5, "the root is on the other side: the width goes with 1 / sqrt(n)"),
        (3 * 198, "that many more; in all it is four times 198"),
    ]
    number(answer, 4 * 198, hints, praise="4 x 198 = 792: half the width costs four times the pairs")


def check_diagnosis(answer):
    """{"A": ..., ..., "D": ...}, each "healthy", "misled", "hacked" or "bug"."""
    given, wrong = read_diagnosis(answer)
    if wrong:
        return say(False, wrong)
    lines = [
        f"{letter} is not {given[letter]}: {LESSONS[truth][given[letter]]}"
        for letter, truth in KEY.items()
        if given[letter] != truth
    ]
    if not lines:
        return say(True, "all four, from curves and texts alone")
    say(False, f"{len(KEY) - len(lines)} of {len(KEY)} right\n" + "\n".join(f"  {line}" for line in lines))


def read_diagnosis(answer):
    """(diagnosis by letter, what is wrong with it or None)."""
    if answer is ... or (type(answer) is dict and answer and all(value is ... for value in answer.values())):
        return {}, "no answer yet: put healthy, misled, hacked or bug, in quotes, where the dots are"
    if type(answer) is not dict or set(map(str, answer)) != set(KEY):
        return {}, 'expected diagnosis = dict(A="...", B="...", C="...", D="...")'
    given = {letter: value.strip().lower() if isinstance(value, str) else value for letter, value in answer.items()}
    for letter, value in given.items():
        if value is ...:
            return {}, f"{letter} has no answer yet"
        if not isinstance(value, str) or value not in LESSONS:
            return {}, f'{letter} is {shown(value)}; expected "healthy", "misled", "hacked" or "bug"'
    return given, None


def right_diagnoses(answer):
    """How many of the four are right; 0 for what cannot be read."""
    given, _ = read_diagnosis(answer)
    return sum(given.get(letter) == truth for letter, truth in KEY.items())


def check_place_score(answer):
    """A function (penalties, score) -> the rewards of a response's tokens, given what each pays for KL, and its score."""
    cases = [
        (([0.0, -0.1, -0.2, 0.05], 1.5), [0.0, -0.1, -0.2, 1.55]),
        (([-0.3, -0.1], -2.0), [-0.3, -2.1]),
        (([0.0], 0.7), [0.7]),
        (([0.0, 0.0, 0.0], 1.0), [0.0, 0.0, 1.0]),  # as in a run's first step
    ]
    hints = [
        (lambda penalties, score: [penalties[0] + score, *penalties[1:]], "on the first token: that is the bug. Later tokens then earn nothing from it"),
        (lambda penalties, score: [p + score for p in penalties], "on every token: a long answer would be paid for its length"),
        (lambda penalties, score: [p + score / len(penalties) for p in penalties], "spread over all tokens: the sum is right, but what the last tokens did is then paid less than what the first did"),
        (lambda penalties, score: [*penalties[:-1], score], "the last token has a price on KL, too: add the score to it"),
        (lambda penalties, score: [*penalties, score], "one token too many: the score is added to the last one"),
        (lambda penalties, score: [*penalties[:-1], penalties[-1] - score], "the sign: a score is earned, not paid"),
        (lambda penalties, score: penalties[-1] + score, "that is the last token's reward alone; every token has one"),
    ]  # fmt: skip
    function(answer, cases, hints, praise="on the last token: what came before it can still earn it")


MISLED = CPU.ppo_config(init_kl_coef=0.0, kl_budget=None, gradient_accumulation_steps=1)
ALONE = {  # a setting that was changed alone, and what it does
    "learning_rate": "another rate goes the same way, sooner or later: nothing calls it back",
    "seed": "another seed takes another path to the same place",
    "temperature": "that changes how it samples, not what it is paid for",
    "gradient_accumulation_steps": "half as many updates a batch go the same way, only later",
    "ppo_epochs": "fewer or more updates a batch change the pace, not the aim",
    "batch_size": "another batch size makes the gradient more or less noisy, and its aim is the same",
    "max_grad_norm": "another bound on a step goes the same way, sooner or later",
    "cliprange": "the clip holds a step near the step before it, not near the reference",
    "score_clip": "that bounds the score of one answer, and answers just below the bound are still followed",
    "target": "the controller that has a target is off (adap_kl_ctrl), and its price starts at 0",
}


def check_one_setting(answer):
    """A PPOConfig that differs from the misled run's in one setting, one that holds the policy near the reference."""
    if wrong := not_a_config(answer):
        return say(False, wrong)
    before, after = asdict(MISLED), asdict(answer)
    changed = [field.name for field in fields(answer) if before[field.name] != after[field.name]]
    if not changed:
        return say(False, "that is the misled run's config; change one setting of it")
    if len(changed) > 1:
        return say(
            False,
            f"{len(changed)} settings differ from the misled run's ({', '.join(changed)}); change one, or you will not know which helped",
        )
    (name,) = changed
    value = after[name]
    if name == "init_kl_coef":
        if value < 0.05:
            return say(
                False,
                f"at a price of {value:g} KL is still cheap: at 0.02 runs went 14 nats (notebook 07, section 5)",
            )
        if value > 0.5:
            return say(False, f"at a price of {value:g} one nat costs {value:g} of a deviation: it will hardly move at all")
        near = "; it will stay near, and learn little (notebook 07, section 5)" if value >= 0.2 else ""
        return say(True, f"a price of {value:g}: {1 / value:.3g} nats cost one deviation of the score{near}")
    if name == "kl_budget":
        if not 2 <= value <= 12:
            return say(
                False,
                f"a budget of {value:g} nats {'ends the run before it has learnt' if value < 2 else 'is spent, if at all, far beyond what the reward model has read'}",
            )
        return say(True, f"a budget of {value:g} nats: the run ends there, wherever it is going")
    say(False, f"{name}: {ALONE.get(name, 'that does not hold the policy near the reference')}")
