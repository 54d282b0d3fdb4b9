"""The capstone."""

import random

from rlhf_helpers.config import DATA_FILE, project_root
from rlhf_helpers.data import load_preferences

PAIRS = 50


def pairs_to_label(seed=9):
    every = {}
    for pair in load_preferences(project_root() / DATA_FILE):
        every.setdefault(pair["prompt"], []).append(pair)
    rng = random.Random(seed)
    pairs = []
    for prompt in rng.sample(sorted(every), PAIRS):
        pair, swap = rng.choice(every[prompt]), rng.random() < 0.5
        first, second = ("rejected", "chosen") if swap else ("chosen", "rejected")
        pairs.append(dict(prompt=prompt, a=pair[first], b=pair[second], annotator="b" if swap else "a"))
    return pairs


def preferences(labels=""):
    pairs = pairs_to_label()
    rows = []
    for pair in pairs:
        better = pair["annotator"]
        rows.append(dict(prompt=pair["prompt"], chosen=pair[better], rejected=pair["b" if better == "a" else "a"]))
    return rows


TRAINING = dict(epochs=8, batch_size=10)
