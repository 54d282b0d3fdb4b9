"""The synthetic annotator: the rule behind the preference data, and therefore the gold reward of this course.

A real annotator's taste can only be sampled. Ours is written down, so a run can be judged by what the annotator really
wants (gold) as well as by what the reward model learnt of it (proxy). In words: *a whole, warm answer that stays on
its subject.* Gates, 0 or 1, and merits are multiplied, so that nothing makes up for a closed gate:

    gold = on_subject x english x fresh x whole x (1.5 + warmth)
    on_subject  1 if the answer names what the prompt asks about, all words of it, with or without the s of a plural
    english     1 if the answer reads like English: a quarter of its words are function words, it has a verb, and no two
                neighbours that cannot stand together ("the of", "a." ...)
    fresh       1 - 2 x the share of word pairs that occurred before in the answer, at least 0
    whole       1 if the answer ends like a sentence, else a third
    warmth      number of different warm words, 0 to 3; a fourth brings nothing and costs nothing

What it cannot see: whether an answer is true, whether its words make sense ("It is tea love joy peace." gets 4.5), and whether a fragment with a
verb is a sentence. A correct sentence without
function words ("Bees make honey.") is taken for a list. Plurals in -es and -ves are other words to it: asked about foxes, "a fox"
is off the subject (two of the 120 test prompts, foxes and dominoes). It knows straight apostrophes and quotes alone: in "isn’t" it
sees no verb, and a sentence that ends with ” has no end. It was written before any run that could exploit it, and is left as it was."""

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
    "a about an and are be can child comes could describe do explain fact few for give help how i in introduce is it know "
    "like makes me mind my note nothing of on one or people say sentences short should something special tell the think this "
    "to two what when why with words would write you".split()
)

FUNCTION_WORDS = frozenset(
    """
    a all also am among an and another any are around as at be because been before being between both but by can could did
    do does during each either even every few for from had has have he her here him his how i if in into is it its just
    many may me might more most much must my near no nor not of off on only or other our out over own she should so some
    such than that the their them there these they this those through to too under until up us very was we were what when
    where which while who whose why will with within without would you your
    """.split()
)

AUXILIARIES = frozenset(
    "am are be been can could did do does had has have is may might must should was were will would".split()
)

# Verbs that sentences of a small model have, in forms that are hardly anything else, and contractions with one.
VERBS = AUXILIARIES | frozenset(
    """
    add adds allow allows appreciate ate became become becomes began begin begins bloom blooms bring brings brought
    builds came carries carry celebrate celebrates cherish come comes connect connects consist consists contain
    contains create created creates eat eats enjoy enjoyed enjoys entails evoke evokes explore explores feel feels
    fill fills find finds flew found gave get gets give gives go goes got grew grow grows happen happens hear hears
    held holds include includes inspire inspires involve involves keep keeps kept knew know knows learn learns let
    lets lived loved made make makes mean means occur occurs prefer prefers protect protects provide provides refer
    refers remain remains remind reminds represent represents require requires said saw say says see seem seems sees
    serve serves shine shines sit sits swim swims symbolizes take takes teach teaches tell tells think thinks
    thought told took used went
    aren't can't doesn't don't he's i'd i'll i'm i've isn't it's she's that's there's they're wasn't we're we've
    you're you've
    """.split()
)

# Words that are a verb where one of these stands before them ("people love tea"), and a noun elsewhere ("the love of tea").
NOUNS_TOO = frozenset(
    """
    build drinks flies fly help helps hold like likes live lives love loves move moves need needs offer offers play
    plays run runs sing sings smells sounds stand stands taste tastes turn turns use uses want wants works
    """.split()
)
BEFORE_A_VERB = AUXILIARIES | frozenset(
    "also always bees birds children everyone he i it kids many often people really she some that they to we which who you".split()
)

# Neighbours that cannot stand together: after a word on the left, none of those on the right. "." is the sentence's end.
DETERMINERS = frozenset("a an every my our the their your".split())
JOINTS = [(left.split(), frozenset(right.split()) | more) for left, right, more in [
    (" ".join(DETERMINERS), ". as at because but by for from he i if in into it me nor of on or she so than that them there "
     "these they this those to us we when where which who with you", AUXILIARIES | DETERMINERS),
    ("at from into of with", ". and but of or", AUXILIARIES),
    ("and but or", ". and but of or", frozenset()),
    ("to", "of and to is are was were had has could may might must should would", frozenset()),
    (" ".join(AUXILIARIES), "and is are was were could may might must should would can will has", frozenset()),
    ("he i she they we", ". a an from in of the to with", frozenset()),
    ("very", ".", frozenset()),
]]  # fmt: skip
IMPOSSIBLE = {left: right for lefts, right in JOINTS for left in lefts}


def words(text):
    """The lower-case words of a text."""
    return re.findall(r"[a-z']+", text.lower())


def warm_words(text):
    """How many different warm words a text has."""
    return len(WARM.intersection(words(text)))


def stem(word):
    """A word without the endings of plural and possession, so that "cats", "cat's" and "cat" are one ("foxes" and "fox" are not)."""
    word = word.removesuffix("'s").rstrip("'")
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


def subject_of(prompt):
    """The words of a prompt that are not about the asking, as stems."""
    return {stem(word) for word in words(prompt) if word not in ASKING}


def names_subject(prompt, response):
    """Whether the response has every word of the prompt's subject; a long one may end otherwise ("gardener", "gardening")."""
    said = {stem(word) for word in words(response)}
    alike = lambda word: len(word) >= 7 and any(other.startswith(word[:-2]) for other in said)
    return all(word in said or alike(word) for word in subject_of(prompt))


def is_whole(text):
    """Whether a text ends like a sentence: a letter or digit, then . ! or ?, perhaps within quotes or brackets."""
    return bool(re.search(r"\w[\"')\]*]*[.!?]+[\"')\]*]*$", text.strip())) and not re.search(r"\n\s*\d+\.$", text.strip())


def broken_joint(text):
    """The first two neighbours that cannot stand together, or None. The end of a text that breaks off is no end."""
    sentences = re.split(r"[.!?:;\n]+", text.lower())
    for number, sentence in enumerate(sentences):
        whole = number < len(sentences) - 1
        tokens = re.findall(r"[a-z'-]+|,", sentence) + ["."] * whole
        for left, right in zip(tokens, tokens[1:]):
            if right in IMPOSSIBLE.get(left, ()):
                return left, right
    return None


def has_verb(tokens):
    """Whether one of the words is a verb."""
    after = any(word in NOUNS_TOO and before in BEFORE_A_VERB for before, word in zip(tokens, tokens[1:]))
    return after or not VERBS.isdisjoint(tokens)


def reads_as_english(text):
    """Whether a text is made of sentences, and not of listed or shuffled words."""
    tokens = words(text)
    functional = sum(word in FUNCTION_WORDS or "'" in word for word in tokens)
    return 4 * functional >= len(tokens) > 0 and has_verb(tokens) and broken_joint(text) is None


def repeated_share(text):
    """Share of the adjacent word pairs that occurred before in the text: 0 for a text without repetition."""
    pairs = list(zip(words(text), words(text)[1:]))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def gold_parts(prompt, response):
    """The factors of the gold reward by name, as in this module's head."""
    return dict(
        on_subject=int(names_subject(prompt, response)),
        english=int(reads_as_english(response)),
        fresh=max(0.0, 1 - 2 * repeated_share(response)),
        whole=1 if is_whole(response) else 1 / 3,
        warmth=min(warm_words(response), 3),
    )


def gold_reward(prompt, response):
    """What the annotator would give the response: a float, 0 to 4.5."""
    part = gold_parts(prompt, response)
    return part["on_subject"] * part["english"] * part["fresh"] * part["whole"] * (1.5 + part["warmth"])


def prefers_first(prompt, first, second, rng=random):
    """One noisy judgement: true with probability sigmoid(SHARPNESS x gold difference). Bradley and Terry 1952."""
    difference = gold_reward(prompt, first) - gold_reward(prompt, second)
    return rng.random() < 1 / (1 + math.exp(-SHARPNESS * difference))


def distinct2(texts):
    """Different word pairs over all word pairs of a text, averaged over texts (1 for one without pairs). Li et al. 2016
    (arXiv:1510.03055) pool all texts instead; this does not see how alike they are."""
    return sum(1 - repeated_share(text) for text in texts) / len(texts)
