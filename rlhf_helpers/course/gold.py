"""The synthetic annotator: the rule behind the preference data, and therefore the gold reward of this course.

A real annotator's taste can only be sampled. Ours is written down, so a run can be judged by what the annotator really
wants (gold) as well as by what the reward model learnt of it (proxy). In words: *a short answer should be warm, stay on
its subject, and not repeat itself; gushing is worse than being plain.*

    gold = warmth + on_subject - repetition
    warmth      number of different warm words, up to 3; every one beyond the third takes a point back
    on_subject  0.5 if the answer names what the prompt asks about, else 0
    repetition  4 x the share of word pairs that occurred before in the answer
"""

import math
import random
import re

WARM = frozenset(
    """
    admire adorable amazing appreciate appreciated beautiful beautifully beauty beloved bliss bright brighten calm
    calming captivating charm charming cheer cheerful cherish cherished comfort comfortable comforting cozy delicate
    delicious delight delighted delightful elegant enchanting enjoy enjoyable enjoyed enjoying enjoyment exciting
    fantastic fascinating favorite fond friend friendly friends fun gentle glad glorious good graceful grateful great
    happiness happy harmony heart heartwarming hope inspire inspiring joy joyful kind kindness laughter lively love
    loved lovely loving magic magical magnificent marvelous memorable nice nourishing peace peaceful perfect playful
    pleasant pleasing pleasure precious pride proud refreshing relax relaxing remarkable satisfying serene serenity
    smile soothing sparkling special splendid stunning sweet tender thank thrilling tranquil treasure treasured
    uplifting vibrant warm warmth welcome welcoming wholesome wonder wonderful
    """.split()
)

SHARPNESS = 2.0  # how surely the annotator sees a difference of one point: sigmoid(2) = 88 %

# Words of our prompts that are about the asking, not about the subject.
ASKING = frozenset(
    "a about an and are be can child describe do explain for how i in is it know like me my note of on or people "
    "sentences short should tell the this to two what why with would write you".split()
)


def words(text):
    """The lower-case words of a text."""
    return re.findall(r"[a-z']+", text.lower())


def warm_words(text):
    """How many different warm words a text has."""
    return len(WARM.intersection(words(text)))


def names_subject(prompt, response):
    """Whether the response has a word of the prompt's subject, singular or plural alike."""
    stem = lambda word: word[:-1] if word.endswith("s") and len(word) > 3 else word
    subject = {stem(word) for word in words(prompt) if word not in ASKING}
    return not subject.isdisjoint(stem(word) for word in words(response))


def repeated_share(text):
    """Share of the adjacent word pairs that occurred before in the text: 0 for a text without repetition."""
    pairs = list(zip(words(text), words(text)[1:]))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def gold_reward(prompt, response):
    """What the annotator would give the response, a float; about -6 to 3.5."""
    warm = warm_words(response)
    warmth = min(warm, 3) - max(warm - 3, 0)
    return warmth + 0.5 * names_subject(prompt, response) - 4 * repeated_share(response)


def prefers_first(prompt, first, second, rng=random):
    """One noisy judgement: true with probability sigmoid(SHARPNESS x gold difference). Bradley and Terry 1952."""
    difference = gold_reward(prompt, first) - gold_reward(prompt, second)
    return rng.random() < 1 / (1 + math.exp(-SHARPNESS * difference))


def distinct2(texts):
    """Different word pairs over all word pairs, within each text and averaged (Li et al. 2016, arXiv:1510.03055)."""
    return sum(1 - repeated_share(text) for text in texts) / len(texts)
