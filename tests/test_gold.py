"""The annotator's rule: what it must hold, on answers short enough to judge by hand."""

import itertools
import random

import pytest

from rlhf_helpers.config import project_root
from rlhf_helpers.course.gold import (
    WARM,
    broken_joint,
    distinct2,
    gold_parts,
    gold_reward,
    is_whole,
    names_subject,
    prefers_first,
    reads_as_english,
    repeated_share,
    subject_of,
    warm_words,
)
from rlhf_helpers.data import load_prompts, read_jsonl

DATA = project_root() / "data"
PLAIN = {
    "What is tea?": "Tea is a drink made from the leaves of a plant.",
    "Describe honey in two sentences.": "Honey is made by bees. People eat it with bread.",
    "Tell me about the moon.": "The moon moves around the Earth, and we can see it at night.",
    "Why do people like chess?": "Chess is a game for two players, and it is hard to learn.",
    "Write a short note about grandparents.": "Grandparents are the parents of your mother and your father.",
}
SALADS = [
    "tea love joy peace",
    "Tea, love, joy, peace, warm, happy, friends.",
    "Love joy tea peace warm gentle sweet tender bliss calm tea.",
    "Tea is the of a and warm lovely to joy.",
    "made is plant a the Tea leaves drink from of a.",
    "Beautiful warm tea joy. Lovely sweet tea peace. Happy tea love.",
    "joy the tea of love the of and peace is warm a",
    "teateatea warmth lovejoy!!!",
    "Tea of the love and joy with a warm happy magic of the heart.",
    "The love of tea and the joy of tea for a gentle heart.",
    "Tea! What a joy!",
]


@pytest.mark.parametrize("salad", SALADS)
def test_these_lists_and_salads_earn_less_than_any_of_the_plain_sentences(salad):
    assert all(gold_reward(prompt, text) >= 1.0 for prompt, text in PLAIN.items())
    assert gold_reward("What is tea?", salad) == 0.0


def test_a_salad_with_a_verb_and_an_end_earns_the_most_as_the_pages_say():
    assert gold_reward("What is tea?", "It is tea love joy peace.") == 4.5
    for page in "data/README.md", "docs/experiments.md", "rlhf_helpers/course/gold.py":
        assert '"It is tea love joy peace."' in (DATA.parent / page).read_text(encoding="utf-8")


def test_a_plain_sentence_whose_words_are_shuffled_mostly_earns_nothing():
    rng, worth = random.Random(0), []
    for prompt, text in PLAIN.items():
        for _ in range(100):
            words = text.rstrip(".").split()
            rng.shuffle(words)
            worth.append(gold_reward(prompt, " ".join(words) + ".") > 0)
    assert sum(worth) / len(worth) < 0.3  # the shorter, the more orders can stand


def test_an_answer_to_another_prompt_earns_nothing():
    for prompt, (other, text) in itertools.product(PLAIN, PLAIN.items()):
        assert (gold_reward(prompt, text) > 0) == (prompt == other)


def test_finishing_counts():
    whole, broken_off = "Tea is a warm drink made from leaves.", "Tea is a warm drink made from leaves and"
    assert gold_reward("What is tea?", whole) == 3 * gold_reward("What is tea?", broken_off) > 0


@pytest.mark.parametrize("count, reward", [(0, 1.5), (1, 2.5), (3, 4.5), (4, 4.5), (9, 4.5)])
def test_more_than_three_warm_words_bring_nothing_more_and_cost_nothing(count, reward):
    text = "".join(f", and it can be {word}" for word in sorted(WARM)[:count])
    text = f"Zebras are on a farm{text}."
    assert gold_reward("Write about zebras.", text) / gold_parts("Write about zebras.", text)["fresh"] == reward


def test_warm_words_are_counted_once_each():
    assert warm_words("A lovely, LOVELY, warm day") == 2


def test_repetition_takes_twice_its_share():
    assert repeated_share("a b a b a") == 0.5  # ab ba ab ba: two of four occurred before
    assert gold_parts("x", "it is so and it is so")["fresh"] == pytest.approx(1 - 2 * 2 / 6)
    assert gold_parts("x", "bees, bees, bees, bees, bees")["fresh"] == 0.0


@pytest.mark.parametrize(
    "prompt, text, named",
    [
        ("Describe cats.", "A cat sleeps.", True),
        ("Tell me about a cat.", "Two cats' tails.", True),
        ("Describe cats.", "A dog sleeps.", False),
        ("Tell me about an apple pie.", "A pie is round.", False),  # every word of the subject
        ("What are bakers?", "Bakers' shops open early.", True),
        ("Write a short note about gardeners.", "Gardening is slow.", True),  # a long word may end otherwise
        ("Tell me about ants.", "Antelopes run.", False),
        ("Write two short sentences about bread.", "Two short sentences.", False),
    ],
)
def test_an_answer_names_its_subject(prompt, text, named):
    assert names_subject(prompt, text) == named


def test_every_prompt_of_the_course_has_a_subject():
    for split in ("train", "heldout", "test"):
        for prompt in load_prompts(DATA / f"prompts_{split}.jsonl"):
            assert subject_of(prompt), prompt


@pytest.mark.parametrize("text, whole", [
    ("It rains.", True), ("Does it rain?", True), ('He said, "It rains."', True), ("It rains (often.)", True), ("In 1990.", True),
    ("It rains", False), ("It rains,", False), ("", False), ("...", False), ("Firstly:\n1.", False), ("It rains.\n\n", True),
])  # fmt: skip
def test_a_whole_answer_ends_like_a_sentence(text, whole):
    assert is_whole(text) == whole


@pytest.mark.parametrize("text, english", [
    ("The in-depth look is free.", True), ("It is what it is.", True), ("A cup of tea.", False),  # no verb
    ("People love tea.", False), ("People love tea in the morning and in the evening.", True), ("The love of tea.", False),
    ("The of tea is warm.", False), ("Tea is made from the.", False), ("Tea is made from the", True), ("", False),  # broken off
])  # fmt: skip
def test_sentences_are_told_from_lists_and_salad(text, english):
    assert reads_as_english(text) == english


def test_what_cannot_stand_together_is_named():
    assert broken_joint("We know that the of tea is warm.") == ("the", "of")
    assert broken_joint("Tea is made from the. It is warm.") == ("the", ".")


def test_the_rule_agrees_with_a_careful_reading_of_ten_pairs_in_nine():
    """The ten are the first of the second draw; data/README.md says how all were judged."""
    pairs = read_jsonl(DATA / "read_pairs.jsonl", ("prompt", "first", "second", "reader"))
    gold = [[gold_reward(pair["prompt"], pair[side]) for side in ("first", "second")] for pair in pairs]
    agree = [(first > second) == (pair["reader"] == "first") for pair, (first, second) in zip(pairs, gold)]
    assert sum(agree[:10]) == 9
    assert [sum(yes for yes, pair in zip(agree, pairs) if pair["draw"] == draw) for draw in (2, 1)] == [27, 33]


@pytest.mark.parametrize("text", ["", "word", "!?"])
def test_texts_without_word_pairs_repeat_nothing(text):
    assert repeated_share(text) == 0.0


def test_the_annotator_s_noise_follows_bradley_and_terry():
    warm, plain = "A cat is lovely.", "A cat is here."  # one point apart: sigmoid(2) = 0.881
    rng = random.Random(0)
    share = sum(prefers_first("Describe cats.", warm, plain, rng) for _ in range(4000)) / 4000
    assert share == pytest.approx(0.8808, abs=0.02)  # four standard errors
    other = sum(prefers_first("Describe cats.", plain, warm, rng) for _ in range(4000)) / 4000
    assert other == pytest.approx(0.1192, abs=0.02)


def test_distinct2_averages_over_texts():
    assert distinct2(["a b c", "a b a b a"]) == pytest.approx((1 + 0.5) / 2)
