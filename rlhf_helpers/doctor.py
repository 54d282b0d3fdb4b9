"""The doctor: reads the stats of a run and says what is unhealthy, one line each: symptom with its number, likely cause, what
to try. Thresholds follow TRL's former guide to PPO training and the sources named beside them; those marked *h* are rules of
thumb from runs of this course."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, median, pvariance, variance

RECENT = 5  # steps that count as "now"


@dataclass
class Finding:
    """One symptom of a run."""

    symptom: str
    cause: str
    remedy: str

    def __str__(self):
        return f"{self.symptom}. Likely: {self.cause}. Try: {self.remedy}."


class Texts:
    """`train(..., on_step=texts)` keeps what every step read and wrote, pairs (prompts, responses), as `examine` takes them."""

    def __init__(self):
        self.steps = []

    def __call__(self, trainer, stats):
        self.steps.append((trainer.rollout.prompts, trainer.rollout.texts))

    def __iter__(self):
        return iter(self.steps)


def examine(history, texts=()):
    """The findings about a run, a list of Finding, empty for a healthy one. `history` is PPOTrainer.history; `texts`, one pair
    (prompts, responses) of lists of str a step, adds the rules that read."""
    if not history:
        return []
    run = Run(history, texts)
    return [Finding(symptom, cause, remedy) for rule, cause, remedy in RULES if (symptom := rule(run))]


class Run:
    """Look-ups in a history, a list of dicts of scalar stats, and in the texts of its steps."""

    def __init__(self, history, texts=()):
        self.history, self.texts = history, list(texts)

    def series(self, key):
        return [row[key] for row in self.history if row.get(key) is not None and row[key] == row[key]]  # without NaN

    def first(self, key, n=RECENT):
        return mean(self.series(key)[:n] or [0.0])

    def now(self, key):
        return mean(self.series(key)[-RECENT:] or [0.0])

    def __len__(self):
        return len(self.history)

    @cached_property
    def rarity(self):
        """How many different prompts of the run have each word."""
        prompts = {prompt for step, _ in self.texts for prompt in step}
        return Counter(word for prompt in prompts for word in set(words(prompt)))

    def names_subject(self, prompt, response):
        """Whether a response has one of its prompt's rarest words, which are hardly about the asking, also inside another word: plurals
        count, and now and then a chance ("tea" in "steak")."""
        rarest = min(map(self.rarity.get, words(prompt)), default=0)
        subject = [word for word in words(prompt) if self.rarity[word] == rarest]
        return any((word[:-1] if len(word) > 4 else word) in response.lower() for word in subject)

    def share(self, of):
        """(at first, now): means of `of(prompt, response)` over the first and the last steps' texts."""
        parts = self.texts[:RECENT], self.texts[-RECENT:]
        return [mean(float(of(*pair)) for step in part for pair in zip(*step)) for part in parts]

    def gained(self):
        """(gain, its standard error) of the score: mean of the last ten steps less that of the first five."""
        scores = self.series("ppo/mean_scores")
        first, last = scores[:RECENT], scores[-10:]
        return mean(last) - mean(first), math.sqrt(variance(first) / len(first) + variance(last) / len(last))


def words(text):
    """The words of a text, in small letters."""
    return re.findall(r"[^\W_]+", text.lower())


def pairs(text):
    """The adjacent pairs of its words."""
    return list(zip(words(text), words(text)[1:]))


def not_a_number(run):
    for name in ("objective/kl", "ppo/mean_scores", "ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy"):
        if wrong := [row.get("step", place) for place, row in enumerate(run.history, 1) if row.get(name) != row.get(name)]:
            return f"{name} is not a number at step {wrong[0]}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")


def kl_at_start(run):
    kl = run.history[0].get("objective/kl") or 0.0
    if run.history[0].get("step") == 1 and abs(kl) > 1e-3:
        return f"KL is {kl:+.4f} at the first step, before anything was learnt"


def kl_negative(run):
    if len(run) >= RECENT and (kl := run.now("objective/kl")) < -1:
        return f"KL is {kl:+.2f} nats over the last {RECENT} steps, and a KL divergence cannot be negative"


def kl_high(run):
    if (kl := run.now("objective/kl")) > 10:
        return f"KL is {kl:.1f} nats a response, above 10"


def first_ratio(run):
    if (off := max(run.series("ppo/policy/first_ratio_error") or [0.0])) > 1e-2:  # h
        return f"the first ratio of a step is off 1 by {off:.3f}, before any update"


def sampler_apart(run):
    """Samples from elsewhere count by their weights policy / sampler. If the log-weights are normal, n responses that are K nats
    apart are worth n e^(-2K) (the effective sample size, Kong 1992): half at 0.35. Kernels that round otherwise in bf16 are 0.12
    apart on a card, worth 79 %, and are so from the first step on; what grows with the adapters is no rounding."""
    series, now = [abs(kl) for kl in run.series("objective/sampler_kl")], run.now("objective/sampler_kl")
    if now > 0.35 or (now > 0.05 and series[0] < now / 3):
        worth = f"weighted for that, {math.exp(-2 * now):.0%} of the responses would count"
        return f"what samples and what learns are {now:.2f} nats a response apart, at the first step {series[0]:.2f}; {worth}"


def adapters_still(run):
    kl = run.series("objective/kl")
    if len(kl) >= 3 and not any(kl):
        return f"KL is exactly 0 in all {len(kl)} steps: the policy is its reference, to the last bit"


def ratio_extreme(run):
    outside = [ratio for ratio in run.series("ppo/policy/ratio_mean") if not 0.1 <= ratio <= 2]
    if outside:
        ratio = max(outside, key=lambda r: abs(math.log(max(r, 1e-9))))
        return f"the mean ratio reached {ratio:.2f}, outside 0.1 to 2"


def policy_moves_far(run):
    if (kl := max(run.series("ppo/policy/policykl") or [0.0])) > 0.1:
        return f"one step moved the policy by {kl:.2f} nats a token, above 0.1"


def clipped_often(run):
    if (frac := run.now("ppo/policy/clipfrac")) > 0.3:  # h
        return f"{frac:.0%} of the tokens are clipped, above 30 %"


def value_useless(run):
    """The share over ten steps together: that of one step is mostly noise, and the worst step would rule a mean of shares."""
    error, var, means = (run.series(key)[-10:] for key in ("ppo/val/error", "ppo/returns/var", "ppo/returns/mean"))
    spread = mean(var or [0.0]) + pvariance(means or [0.0])
    if len(run) >= 20 and error and spread > 0 and (explained := 1 - mean(error) / spread) < -0.1:  # h
        return f"the value head explains {explained:.2f} of the variance of the returns over the last 10 of {len(run)} steps"


def value_spike(run):
    """Against the steps before it: a loss that starts high and falls is a value head that learns."""
    rows = [(row.get("step", place), row.get("ppo/loss/value", math.nan)) for place, row in enumerate(run.history, 1)]
    rows = [(step, loss) for step, loss in rows if loss == loss]
    for place in range(RECENT, len(rows)):
        step, loss = rows[place]
        before = median(loss for _, loss in rows[place - RECENT : place])
        if loss > 10 * max(before, 1e-3):
            return f"the value loss jumped to {loss:.2f} at step {step:.0f}; before, it was about {before:.3f}"


def scores_alike(run):
    if run.series("ppo/std_scores") and (std := run.now("ppo/std_scores")) < 1e-3:  # h
        return f"the scores of a batch differ by {std:.4f}: there is nothing to learn from"


def never_ends(run):
    start, now = run.first("tokens/responses_eos_frac"), run.now("tokens/responses_eos_frac")
    if start >= 0.1 and now < start / 4:  # h
        return f"the share of responses that end by themselves fell from {start:.0%} to {now:.0%}"


def gets_short(run):
    start, now = run.first("tokens/responses_len_mean"), run.now("tokens/responses_len_mean")
    if now < 0.3 * start:  # h
        return f"responses shrank from {start:.0f} to {now:.0f} tokens"


def entropy_gone(run):
    start, now = run.first("ppo/policy/entropy"), run.now("ppo/policy/entropy")
    if now < 0.3 * start:  # h
        return f"entropy fell from {start:.2f} to {now:.2f} nats a token"


def drifts(run):
    if len(run) >= 20 and len(run.series("ppo/mean_scores")) >= 20 and (kl := run.now("objective/kl")) > 2:  # h
        gain, error = run.gained()
        if gain < error:
            return f"KL is {kl:.1f} nats after {len(run)} steps, and the score has not risen by more than its error of {error:.2f}: {gain:+.2f}"


def breaks_off_again(run):
    """The last three steps against the best five in a row before them."""
    series = [run.series(f"tokens/responses_{name}") for name in ("len_mean", "eos_frac")]
    if min(map(len, series)) < 12:
        return None
    means = [[mean(numbers[n : n + RECENT]) for n in range(len(numbers) - 3 - RECENT + 1)] for numbers in series]
    (short, most), (long, ends) = (min(means[0]), max(means[1])), (mean(numbers[-3:]) for numbers in series)
    if long > 1.5 * short and ends < 0.9 * most:  # h: from the ten headline runs, of which one ended so
        return f"responses grew from {short:.0f} to {long:.0f} tokens again, and {ends:.0%} end by themselves, after {most:.0%}"


def leaves_subject(run):
    if run.texts:
        start, now = run.share(run.names_subject)
        if start >= 0.3 and now < 0.6 * start:  # h: learnt runs keep 0.9 of it, placebos 0.75, hacked ones 0.1
            scores = f"the score went from {run.first('ppo/mean_scores'):+.2f} to {run.now('ppo/mean_scores'):+.2f}"
            return f"{now:.0%} of the responses name what their prompt is about, at first {start:.0%}; {scores}"


def repeats(run):
    if run.texts:
        start, now = run.share(lambda prompt, response: 1 - len(set(pairs(response))) / max(1, len(pairs(response))))
        if now > start + 0.15:  # h
            return f"{now:.0%} of the word pairs repeat an earlier one of the same response, at first {start:.0%}"


def skipped(run):
    if count := sum(run.series("ppo/skipped_updates")):
        return f"updates left out: {count:.0f}, for a loss, gradient or ratio beyond all bounds"


def coefficient_climbs(run):
    coefficients = run.series("objective/kl_coef") or [0.0]
    if coefficients[0] > 0 and coefficients[-1] > 3 * coefficients[0]:  # h
        return f"kl_coef climbed from {coefficients[0]:.3f} to {coefficients[-1]:.3f}"


RULES = [
    (not_a_number, "a score, a weight or a learning rate beyond all bounds", "the checkpoint before that step; score_clip, max_grad_norm"),
    (kl_at_start, "another dtype or adapter in the reference, or dropout", "ref_model=None, or a reference loaded as the policy is"),
    (kl_negative, "sampling from another distribution than the one scored (top_k, temperature, min length)", "PPOTrainer.generate"),
    (kl_high, "the penalty is too cheap, or the learning rate too high", "a larger init_kl_coef, a smaller learning_rate"),
    (first_ratio, "dropout, other shapes, padding or temperature between the two passes", "the same forward pass for both"),
    (sampler_apart, "two kinds of arithmetic, or weights that were not brought up to date", "the policy itself as its sampler"),
    (adapters_still, "the adapters did not move: a learning rate of 0, or an optimizer that holds other weights than the model",
     "adapters first, then PPOTrainer; lora_B begins at 0 and must not stay there"),
    (ratio_extreme, "steps too large", "fewer ppo_epochs, a smaller learning_rate"),
    (policy_moves_far, "too many or too large updates on one batch", "early_stopping=True, fewer ppo_epochs"),
    (clipped_often, "too many or too large updates on one batch", "a smaller learning_rate, fewer ppo_epochs"),
    (value_useless, "the value head cannot follow", "standardised scores, a larger cliprange_value or value_learning_rate"),
    (value_spike, "a score on another scale than the rest", "score_clip, standardised scores"),
    (scores_alike, "a saturated reward model, or one that reads the wrong text", "look at the texts it scores; use the logit"),
    (never_ends, "EOS is masked, or never paid for", "missing_eos_penalty=1.0, masks from lengths"),
    (gets_short, "the KL of a token costs more than the score brings", "a smaller init_kl_coef; check the sign of the score"),
    (entropy_gone, "reward hacking: one text for every prompt", "a larger init_kl_coef; read the samples"),
    (drifts, "scores that say nothing of these responses, such as rows in another order: the policy drifts", "score a batch twice, in two orders"),
    (breaks_off_again, "the last steps undid what was learnt", "take an earlier checkpoint; missing_eos_penalty=1.0"),
    (leaves_subject, "reward hacking: the score is paid for something else than an answer", "read the samples; a larger init_kl_coef or a smaller kl_budget"),
    (repeats, "reward hacking: the same words pay again", "read the samples; a larger init_kl_coef"),
    (skipped, "a score or a learning rate that is far too large", "score_clip, max_grad_norm, a smaller learning_rate"),
    (coefficient_climbs, "the controller runs after a KL that does not obey", "a smaller learning_rate; read the samples"),
]  # fmt: skip
