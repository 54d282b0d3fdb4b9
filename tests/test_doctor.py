"""The doctor: every rule is provoked in a real run of a tiny model, and a run that learns gets no finding."""

import math
import re
from pathlib import Path
from statistics import mean, median, variance

import pytest
import torch

from rlhf_helpers import doctor
from rlhf_helpers.course.runs import logs_of
from rlhf_helpers.data import read_jsonl, save_jsonl
from rlhf_helpers.doctor import examine
from rlhf_helpers.sampling import digest
from tests import tiny

WORDS = 32  # a vocabulary so small that every word is met in a batch, and one response in five ends by itself
PROMPTS = [f"t{i} t{j}" for i in range(4, 30, 3) for j in range(5, 30, 4)]
ABOUT = ["t2 " + " ".join(f"t{4 + (i + j) % 28}" for j in range(6)) for i in range(28)]  # t2 asks, the others are what about


def trainer(lm=None, ref_model=None, **config):
    """A trainer whose policy begins as its reference and whose value head begins at 0, as in a run of the course."""
    lm = tiny.with_lora(tiny.llama(vocab_size=WORDS), "all-linear") if lm is None else lm
    settings = dict(batch_size=16, mini_batch_size=16, learning_rate=5e-3, init_kl_coef=0.2, adap_kl_ctrl=False, lam=1.0)
    return tiny.trainer(lm, ref_model, value_head=0.0, **settings | config)


def even(prompts, responses):
    """Pays even words: +2 for a response of nothing else, -2 for one without any."""
    rows = [[int(word[1:]) % 2 == 0 for word in text.split()] for text in responses]
    return [4 * (sum(row) / max(1, len(row)) - 0.5) for row in rows]


def count(word):
    return lambda prompts, responses: [float(text.split().count(word)) for text in responses]


def length(prompts, responses):
    return [float(len(text.split())) for text in responses]


def run(reward=even, steps=5, **config):
    return trainer(**config).train(PROMPTS, reward, steps=steps)


def diagnosed(rule, history, symptom, cause, remedy, alone=True, texts=()):
    """The doctor says this symptom, with its number, once, with that cause and remedy; and says nothing else, if `alone`."""
    findings = examine(history, texts)
    (finding,) = [each for each in findings if each.symptom == symptom] or pytest.fail(f"{symptom!r} is not in {findings}")
    assert rule(doctor.Run(history, texts)) == symptom
    assert cause in finding.cause and remedy in finding.remedy
    assert not alone or findings == [finding]


# ---------------------------------------------------------------- healthy


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_learns_gets_no_finding(seed):
    config = dict(batch_size=32, mini_batch_size=32, value_learning_rate=3e-2, missing_eos_penalty=0.5, seed=seed)
    texts = doctor.Texts()
    history = trainer(**config).train(PROMPTS, even, steps=30, on_step=texts)
    scores = [row["ppo/mean_scores"] for row in history]
    assert mean(scores[-5:]) > mean(scores[:5]) + 0.8 and 1 < history[-1]["objective/kl"] < 6
    for steps in (1, 5, 20, 30):
        assert examine(history[:steps], list(texts)[:steps]) == [], f"after {steps} steps"


def test_what_it_says_of_the_ten_runs_of_the_headline():
    """Seed 3 went furthest, seed 7 broke off again: 65 % whole answers on test prompts, where the others have 95 to 100."""
    said = {log.head["seed"]: [str(finding) for finding in examine(log.history, log.texts)] for log in logs_of("headline")}
    assert sorted(said) == list(range(10)) and [seed for seed, findings in said.items() if findings] == [3, 7]
    assert len(said[3]) == 1 and said[3][0].startswith("KL is 10.1 nats a response, above 10")
    assert len(said[7]) == 1 and said[7][0].startswith("responses grew from 28 to 47 tokens again, and 83% end by themselves")


def test_of_all_other_shipped_runs_it_names_those_that_go_far_and_those_whose_answers_break_off():
    for log in logs_of("recipes") + logs_of("recipes_on_a_card"):
        findings = [finding.symptom for finding in examine(log.history, log.texts)]
        grew, far = (any(symptom.startswith(begins) for symptom in findings) for begins in ("responses grew", "KL is"))
        assert len(findings) == grew + far, findings  # and no rounding of a card is taken for two kinds of policy
        assert grew == (log.whole < 0.85) and far == (mean(row["objective/kl"] for row in log.history[-5:]) > 10)


def test_a_run_without_steps_gets_no_finding():
    assert examine([]) == [] == examine(trainer().history)


def test_what_is_missing_of_a_history_is_no_finding():
    """The experiments' logs have None where a number was not finite."""
    assert examine([{"step": 1, "objective/kl": None, "ppo/mean_scores": 0.1}]) == []


def test_a_small_ratio_hides_no_large_one():
    rows = [{"step": step, "ppo/policy/ratio_mean": ratio} for step, ratio in enumerate((1.0, 2.5, 0.3, 1.0), 1)]
    assert "reached 2.50" in doctor.ratio_extreme(doctor.Run(rows))
    assert doctor.ratio_extreme(doctor.Run([rows[0], rows[2]])) is None


def test_a_value_loss_that_starts_high_and_falls_is_no_spike():
    far = lambda prompts, responses: [x + 10 for x in even(prompts, responses)]
    history = run(far, steps=40, value_learning_rate=0.3, cliprange_value=100.0, batch_size=8, mini_batch_size=8)
    losses = [row["ppo/loss/value"] for row in history]
    assert losses[0] > 10 * median(losses) and doctor.value_spike(doctor.Run(history)) is None


def test_a_finding_reads_as_one_sentence_each_for_symptom_cause_and_remedy():
    finding = doctor.Finding("it is 3", "too much of it", "less")
    assert str(finding) == "it is 3. Likely: too much of it. Try: less."


def test_a_history_from_its_file_gives_the_same_findings(tmp_path):
    history = run(lambda prompts, responses: [1.0] * 16)
    save_jsonl(tmp_path / "history.jsonl", history)
    assert examine(read_jsonl(tmp_path / "history.jsonl")) == examine(history) != []


# ---------------------------------------------------------------- the reference, the sampling, the two passes


def test_a_reference_in_another_dtype_shows_before_anything_is_learnt():
    history = run(ref_model=tiny.llama(vocab_size=WORDS).bfloat16(), steps=1)
    kl = history[0]["objective/kl"]
    assert 1e-3 < abs(kl) < 0.1
    symptom = f"KL is {kl:+.4f} at the first step, before anything was learnt"
    diagnosed(doctor.kl_at_start, history, symptom, "another dtype", "ref_model=None")


def test_responses_that_the_policy_did_not_sample_make_kl_negative():
    """The reference's favourite responses, as a generate() with options of its own would give."""
    run = trainer(learning_rate=1e-2, init_kl_coef=0.05)
    _, queries = run.encode(PROMPTS[:16])
    for _ in range(8):
        responses = run.generate(queries, greedy=True, reference=True)
        run.step(queries, responses, even(None, run.decode(responses)))
    kl = mean(row["objective/kl"] for row in run.history[-5:])
    symptom = f"KL is {kl:+.2f} nats over the last 5 steps, and a KL divergence cannot be negative"
    assert kl < -1
    diagnosed(doctor.kl_negative, run.history, symptom, "another distribution", "PPOTrainer.generate")


def test_a_forward_pass_with_dropout_gives_a_first_ratio_that_is_not_1():
    lm = tiny.with_lora(tiny.llama(vocab_size=WORDS))
    norm = lm.get_base_model().model.norm
    norm.register_forward_hook(lambda module, args, out: torch.nn.functional.dropout(out, 0.01))  # in eval mode, too
    history = run(lm=lm, steps=1)
    off = history[0]["ppo/policy/first_ratio_error"]
    symptom = f"the first ratio of a step is off 1 by {off:.3f}, before any update"
    diagnosed(doctor.first_ratio, history, symptom, "dropout", "the same forward pass", alone=False)
    assert len(examine(history)) == 2 and "dropout" in examine(history)[0].cause  # so do policy and reference


def test_a_sampler_that_is_one_update_behind_shows():
    """As an inference engine whose weights were not brought up to date: it draws with the adapters of the step before."""
    run = trainer(learning_rate=2e-2, init_kl_coef=0.0)
    generate, stale = run.generate, [parameter.detach().clone() for parameter in run.parameters]

    def behind(queries):
        fresh = [parameter.detach().clone() for parameter in run.parameters]
        swap = lambda values: [p.data.copy_(value) for p, value in zip(run.parameters, values)]
        swap(stale)
        responses = generate(queries)
        swap(fresh)
        for response in responses:
            response.drawn.weights = digest(run.parameters)  # it believes that it is up to date
        stale[:] = fresh
        return responses

    run.generate = behind
    history = run.train(PROMPTS, even, steps=6)
    kl = mean(row["objective/sampler_kl"] for row in history[-5:])
    worth = f"weighted for that, {math.exp(-2 * kl):.0%} of the responses would count"
    symptom = f"what samples and what learns are {kl:.2f} nats a response apart, at the first step 0.00; {worth}"
    diagnosed(doctor.sampler_apart, history, symptom, "not brought up to date", "the policy itself", alone=False)


@pytest.mark.parametrize(
    "first, now, speaks",
    [(0.13, 0.12, False), (0.13, 0.34, False), (0.13, 0.36, True), (0.002, 0.04, False), (0.0, 0.06, True)],
)
def test_rounding_that_is_there_from_the_first_step_is_no_finding(first, now, speaks):
    history = [{"objective/sampler_kl": first}, *[{"objective/sampler_kl": now}] * 5]
    assert bool(examine(history)) == speaks


def test_a_rate_of_zero_leaves_the_policy_its_reference():
    """As a schedule may set it: gradients come, the value head learns, and no update reaches the adapters."""
    run = trainer()
    run.optimizer.param_groups[0]["lr"] = 0.0
    history = run.train(PROMPTS, even, steps=5)
    symptom = "KL is exactly 0 in all 5 steps: the policy is its reference, to the last bit"
    diagnosed(doctor.adapters_still, history, symptom, "the adapters did not move", "lora_B begins at 0")
    assert [len(examine(history[:steps])) for steps in (1, 2, 3)] == [0, 0, 1]  # the first KL is 0 in every run


# ---------------------------------------------------------------- too far, too fast


def test_without_a_penalty_kl_grows_past_10_nats():
    settings = dict(init_kl_coef=0.0, missing_eos_penalty=1.0, value_learning_rate=3e-2)
    history = run(lm=tiny.llama(vocab_size=WORDS), steps=20, **settings)
    kl = mean(row["objective/kl"] for row in history[-5:])
    symptom = f"KL is {kl:.1f} nats a response, above 10"
    diagnosed(doctor.kl_high, history, symptom, "the penalty is too cheap", "a larger init_kl_coef")


def test_many_large_updates_on_one_batch_drive_the_mean_ratio_out_of_bounds():
    history = run(lm=tiny.llama(), learning_rate=1e-2, ppo_epochs=16, steps=1)
    ratio = history[0]["ppo/policy/ratio_mean"]
    assert ratio > 2
    symptom = f"the mean ratio reached {ratio:.2f}, outside 0.1 to 2"
    diagnosed(doctor.ratio_extreme, history, symptom, "steps too large", "fewer ppo_epochs", alone=False)
    assert all("large" in finding.cause for finding in examine(history))


def test_one_huge_update_moves_the_policy_far():
    history = run(learning_rate=1.0, ppo_epochs=2, steps=1)
    kl = history[0]["ppo/policy/policykl"]
    symptom = f"one step moved the policy by {kl:.2f} nats a token, above 0.1"
    diagnosed(doctor.policy_moves_far, history, symptom, "too large updates", "early_stopping=True")


def test_several_epochs_at_a_high_rate_clip_many_tokens():
    history = run(learning_rate=1e-2, ppo_epochs=4, steps=3)
    frac = mean(row["ppo/policy/clipfrac"] for row in history)
    symptom = f"{frac:.0%} of the tokens are clipped, above 30 %"
    diagnosed(doctor.clipped_often, history, symptom, "too large updates", "a smaller learning_rate")


def test_a_score_beyond_all_bounds_leaves_updates_out():
    run = trainer(batch_size=4, mini_batch_size=2)
    _, queries = run.encode(PROMPTS[:4])
    for scores in ([0.5, 1.0, 0.0, 1e30], [1e30, 1.0, 0.0, -0.5]):  # 1e30 is finite, its square is not
        run.step(queries, run.generate(queries), scores)
    symptom = "updates left out: 2, for a loss, gradient or ratio beyond all bounds"
    diagnosed(doctor.skipped, run.history, symptom, "a score or a learning rate that is far too large", "score_clip")


def test_a_weight_that_is_no_number_is_named_with_its_step():
    run = trainer(batch_size=4, mini_batch_size=4)
    _, queries = run.encode(PROMPTS[:4])
    responses = run.generate(queries)
    run.step(queries, responses, [0.5, 1.0, 0.0, -0.5])
    with torch.no_grad():
        run.model.v_head.summary.bias.fill_(math.nan)
    for _ in range(2):
        run.step(queries, responses, [0.5, 1.0, 0.0, -0.5])
    symptom = "ppo/loss/policy is not a number at step 2, and 1 more"
    diagnosed(doctor.not_a_number, run.history, symptom, "a score, a weight", "the checkpoint before", alone=False)


def test_a_step_whose_numbers_overflow_is_reported_and_hides_nothing():
    run = trainer(batch_size=4, mini_batch_size=4)
    for step in range(20):
        run.train(PROMPTS, lambda prompts, responses: [3e38 if step == 19 else 0.5, 1.0, 0.0, -1.0], steps=1)
    assert run.history[-1]["ppo/returns/var"] == float("inf")
    symptoms = " ".join(finding.symptom for finding in examine(run.history))
    assert "the value loss jumped to inf at step 20" in symptoms and "updates left out: 1, for" in symptoms


def test_a_kl_that_does_not_obey_makes_the_coefficient_climb():
    settings = dict(learning_rate=1e-2, init_kl_coef=0.01, adap_kl_ctrl=True, target=0.1, horizon=30.0)
    history = run(steps=20, **settings)
    first, last = history[0]["objective/kl_coef"], history[-1]["objective/kl_coef"]
    assert first == 0.01 and last > 0.03
    symptom = f"kl_coef climbed from {first:.3f} to {last:.3f}"
    diagnosed(doctor.coefficient_climbs, history, symptom, "the controller runs after a KL", "a smaller learning_rate")


# ---------------------------------------------------------------- scores and values


def test_scores_on_a_scale_that_the_value_head_cannot_reach():
    history = run(lambda prompts, responses: [x + 20 for x in even(prompts, responses)], steps=20)
    (finding,) = examine(history)
    explained = float(re.search(r"the value head explains (\S+) of .* over the last 10 of 20 steps", finding.symptom)[1])
    assert explained < -100  # some 20 off, where returns have a deviation of 1
    diagnosed(doctor.value_useless, history, finding.symptom, "the value head cannot follow", "standardised scores")


def test_one_batch_of_scores_on_another_scale_makes_the_value_loss_jump():
    run = trainer()
    run.train(PROMPTS, even, steps=6)
    run.train(PROMPTS, lambda prompts, responses: [100 * x for x in even(prompts, responses)], steps=1)
    losses = [row["ppo/loss/value"] for row in run.history]
    symptom = f"the value loss jumped to {losses[6]:.2f} at step 7; before, it was about {median(losses[1:6]):.3f}"
    assert losses[6] > 1000
    later = [row | dict(step=row["step"] + 100) for row in run.history]  # of a run that another history was begun for
    assert "at step 107; before" in doctor.value_spike(doctor.Run(later))
    diagnosed(doctor.value_spike, run.history, symptom, "a score on another scale", "score_clip")


def test_a_reward_that_says_the_same_of_everything_teaches_nothing():
    history = run(lambda prompts, responses: [0.7] * 16)
    symptom = "the scores of a batch differ by 0.0000: there is nothing to learn from"
    diagnosed(doctor.scores_alike, history, symptom, "a saturated reward model", "look at the texts")


def test_scores_in_another_order_than_the_responses_let_the_policy_drift():
    history = run(lambda prompts, responses: sorted(even(prompts, responses)), steps=30, learning_rate=1e-2, init_kl_coef=0.05)
    scores = [row["ppo/mean_scores"] for row in history]
    kl, gain = mean(row["objective/kl"] for row in history[-5:]), mean(scores[-10:]) - mean(scores[:5])
    error = (variance(scores[:5]) / 5 + variance(scores[-10:]) / 10) ** 0.5
    symptom = (
        f"KL is {kl:.1f} nats after 30 steps, and the score has not risen by more than its error of {error:.2f}: {gain:+.2f}"
    )
    diagnosed(doctor.drifts, history, symptom, "rows in another order", "score a batch twice")
    assert examine(history[:19]) == []  # too early to say


# ---------------------------------------------------------------- what the responses become


def test_a_reward_for_running_on_ends_the_endings():
    history = run(lambda prompts, responses: [n - 7 for n in length(prompts, responses)], steps=20, learning_rate=1e-2)
    start, now = (mean(row["tokens/responses_eos_frac"] for row in rows) for rows in (history[:5], history[-5:]))
    symptom = f"the share of responses that end by themselves fell from {start:.0%} to {now:.0%}"
    diagnosed(doctor.never_ends, history, symptom, "EOS is masked, or never paid for", "missing_eos_penalty")


def test_a_score_of_the_wrong_sign_makes_responses_short():
    history = run(lambda prompts, responses: [-n for n in length(prompts, responses)], steps=12, learning_rate=2e-2)
    start, now = (mean(row["tokens/responses_len_mean"] for row in rows) for rows in (history[:5], history[-5:]))
    symptom = f"responses shrank from {start:.0f} to {now:.0f} tokens"
    diagnosed(doctor.gets_short, history, symptom, "costs more than the score brings", "check the sign of the score")


def test_a_reward_for_one_word_leaves_one_text_and_no_entropy():
    history = run(count("t6"), lm=tiny.llama(vocab_size=WORDS), steps=15, learning_rate=2e-2, init_kl_coef=0.0)
    assert history[-1]["ppo/mean_scores"] > history[0]["ppo/mean_scores"] + 5
    start, now = (mean(row["ppo/policy/entropy"] for row in rows) for rows in (history[:5], history[-5:]))
    symptom = f"entropy fell from {start:.2f} to {now:.2f} nats a token"
    diagnosed(doctor.entropy_gone, history, symptom, "reward hacking", "a larger init_kl_coef", alone=False)
    assert "KL is" in examine(history)[0].symptom  # eight times the same word is far from the reference


def test_a_reward_for_one_word_has_texts_that_leave_their_subject_and_repeat_themselves():
    texts, hacked = doctor.Texts(), trainer(lm=tiny.llama(vocab_size=WORDS), learning_rate=1e-2, init_kl_coef=0.0)
    history = hacked.train(ABOUT, count("t6"), steps=20, on_step=texts)
    words = lambda prompt, response: set(prompt.split()[1:]) & set(response.split())
    named = [mean(bool(words(*pair)) for step in part for pair in zip(*step)) for part in (texts.steps[:5], texts.steps[-5:])]
    first, now = (mean(row["ppo/mean_scores"] for row in rows) for rows in (history[:5], history[-5:]))
    assert named[1] < named[0] / 2 and now > first + 5
    symptom = f"{named[1]:.0%} of the responses name what their prompt is about, at first {named[0]:.0%}"
    symptom += f"; the score went from {first:+.2f} to {now:+.2f}"
    diagnosed(doctor.leaves_subject, history, symptom, "reward hacking", "read the samples", alone=False, texts=texts)
    pairs = lambda text: list(zip(text.split(), text.split()[1:]))
    again = lambda text: 1 - len(set(pairs(text))) / max(1, len(pairs(text)))
    start, end = (mean(again(text) for _, step in part for text in step) for part in (texts.steps[:5], texts.steps[-5:]))
    symptom = f"{end:.0%} of the word pairs repeat an earlier one of the same response, at first {start:.0%}"
    diagnosed(doctor.repeats, history, symptom, "the same words pay again", "read the samples", alone=False, texts=texts)
    assert len(examine(history)) == len(examine(history, texts)) - 2  # those two read


def test_a_reward_that_is_turned_round_at_the_end_lets_answers_break_off_again():
    turned = trainer(learning_rate=2e-2, init_kl_coef=0.0)
    turned.train(PROMPTS, lambda prompts, responses: [-n for n in length(prompts, responses)], steps=6)
    history = turned.train(PROMPTS, length, steps=10)
    lengths, ends = ([row[f"tokens/responses_{name}"] for row in history] for name in ("len_mean", "eos_frac"))
    best = lambda numbers, which: which(mean(numbers[n : n + 5]) for n in range(len(numbers) - 7))
    symptom = (
        f"responses grew from {best(lengths, min):.0f} to {mean(lengths[-3:]):.0f} tokens again, "
        f"and {mean(ends[-3:]):.0%} end by themselves, after {best(ends, max):.0%}"
    )
    diagnosed(doctor.breaks_off_again, history, symptom, "the last steps undid", "an earlier checkpoint")


@pytest.mark.parametrize("kept", [(), ("step",), ("objective/kl",), ("objective/kl", "step")])
def test_a_history_from_elsewhere_may_lack_any_stat(kept):
    history = [dict.fromkeys(kept, 1e-4)] * 30
    assert examine(history) == examine(history, [(["a b"], [""])] * 30) == examine(history, [(["?!"], ["c"])] * 30) == []


def test_a_long_history_may_lack_the_value_head_s_errors():
    assert examine([{"step": step, "ppo/returns/var": 1.0, "ppo/returns/mean": 0.0} for step in range(1, 25)]) == []


def test_every_rule_is_provoked_here():
    provoked = re.findall(r"diagnosed\(doctor\.(\w+),", Path(__file__).read_text(encoding="utf-8"))
    assert sorted(provoked) == sorted(rule.__name__ for rule, _, _ in doctor.RULES)


def test_runs_that_were_paid_for_warm_words_left_their_subject_and_the_headline_s_did_not():
    """Real runs, from their logs: three that counted warm words, without a price (notebook 07), and the course's ten."""
    left = lambda log: doctor.leaves_subject(doctor.Run(log.history, log.texts))
    hacked, healthy = logs_of("counting", "no_price"), logs_of("headline")
    assert len(hacked) == 3 and len(healthy) == 10
    assert all(map(left, hacked)) and not any(map(left, healthy))
    assert all(log.gold.mean() == 0 for log in hacked)
