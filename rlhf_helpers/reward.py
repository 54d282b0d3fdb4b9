"""The reward model: an encoder with a score, trained on preference pairs. It reads text, never the policy's token ids."""

import copy
import json
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rlhf_helpers import progress
from rlhf_helpers.config import DATA_FILE, HELDOUT_FILE, course_file, project_root
from rlhf_helpers.data import checked_list, load_preferences, load_prompts
from rlhf_helpers.errors import InputError, MissingInput
from rlhf_helpers.files import (
    MANIFEST,
    check_manifest,
    checked_path,
    find_whole,
    is_whole_unicode,
    read_json,
    reason,
    shown,
    whole_folder,
    write_manifest,
    write_text,
)
from rlhf_helpers.intervals import mean_interval
from rlhf_helpers.machine import device_and_dtype

transformers_logging.disable_progress_bar()  # as in models.py: a bar a load

FORMAT_FILE = "reward_format.json"
# How prompt and response become one input. "pair": the tokenizer's own sentence pair, [CLS] prompt [SEP] response [SEP].
JOINS = {
    "pair": lambda prompt, response: (prompt, response),
    "newline": lambda prompt, response: (f"{prompt}\n{response}", None),
    "response": lambda prompt, response: (response, None),
}


FORMAT = dict(join=str, mean=Real, std=Real, max_length=Integral, batch_size=Integral)


class RewardModel:
    """A sequence classifier that scores a response to a prompt: `rewards(prompts, responses)`, two lists of str, gives a
    (B,) float tensor.

    One label: the score is its logit. Two: the softmax probability of label 1. It is then standardised: (raw - mean) / std,
    with mean and std measured on what the base policy wrote (our own: on the responses in its training pairs).

    `max_length` is in tokens, and never more than the model has positions."""

    def __init__(self, model, tokenizer, join="pair", mean=0.0, std=1.0, max_length=256, batch_size=32):
        labels = model.config.num_labels
        if labels not in (1, 2):
            raise InputError(f"reward model with {labels} labels; expected 1 (the score) or 2 (label 1 is the good one)")
        _check_format("RewardModel", dict(join=join, mean=mean, std=std, max_length=max_length, batch_size=batch_size))
        self.model, self.join = model.float().eval().requires_grad_(False), join
        self.mean, self.std, self.batch_size, max_length = float(mean), float(std), int(batch_size), int(max_length)
        limits = tokenizer.model_max_length, positions_of(model)  # 0, -1: no limit
        self.max_length = min([max_length, *(limit for limit in limits if limit > 0)])
        self.tokenizer = copy.deepcopy(tokenizer)  # the settings below are ours alone: a policy may share the tokenizer
        self.tokenizer.truncation_side = "left"  # a long conversation is judged by its end
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        if self.tokenizer.padding_side == "left" and not self._pads_are_harmless():
            self.tokenizer.padding_side = "right"

    @classmethod
    def load(cls, folder):
        """From a folder made by `save`, or any folder of a sequence classifier with its tokenizer.
        Raises InputError that names the folder and what is wrong with it."""
        folder = find_whole(checked_path("RewardModel.load: folder", folder))
        if not (folder / "config.json").is_file():
            raise MissingInput(f"{folder}: not a reward model; expected a folder with config.json, weights and a tokenizer")
        try:
            if (folder / MANIFEST).is_file():  # of `save`: other folders have none
                check_manifest(folder)
            config = read_json(folder / "config.json")
            architectures = config.get("architectures") if isinstance(config, dict) else None
            architectures = [str(name) for name in architectures] if isinstance(architectures, list) else []
            if not any(name.endswith("ForSequenceClassification") for name in architectures):
                raise ValueError(
                    f"architecture is {', '.join(architectures) or 'not given'}, not a ...ForSequenceClassification"
                )
            how = _read_format(folder / FORMAT_FILE) if (folder / FORMAT_FILE).is_file() else {}
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
            if info["missing_keys"]:  # transformers would fill them with random numbers
                raise ValueError(f"no weights for {sorted(info['missing_keys'])[0]}")
            return cls(model.to(device_and_dtype()[0]), AutoTokenizer.from_pretrained(folder), **how)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any kind: transformers reads a folder that others wrote
            why = str(error).replace(str(folder / "_")[:-1], "") if isinstance(error, InputError) else reason(error)
            classifier = "expected a folder of a ...ForSequenceClassification with its tokenizer"
            raise InputError(f"{folder}: cannot be used as a reward model: {why}; {classifier}") from error

    def save(self, folder):
        """The folder that `load` reads: model, tokenizer and how to join and standardise. It appears whole or not at all."""
        with whole_folder(checked_path("RewardModel.save: folder", folder), sign=FORMAT_FILE) as beside:
            self.model.save_pretrained(beside)
            self.tokenizer.save_pretrained(beside)
            how = {name: getattr(self, name) for name in FORMAT}
            write_text(beside / FORMAT_FILE, json.dumps(how, indent=1) + "\n")
            write_manifest(beside)

    def encode(self, prompts, responses):
        """The encoder's inputs, padded: a dict of (B, L) tensors. What is too long loses the beginning of its prompt; a response
        stays whole, unless it is too long by itself: then it loses its end."""
        responses = [self._fitting(response) for response in responses]
        first, second = zip(*(JOINS[self.join](p, r) for p, r in zip(prompts, responses, strict=True)))
        second = None if second[0] is None else list(second)
        return self.tokenizer(
            list(first), second, padding=True, truncation="only_first", max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)

    def _fitting(self, response):
        """The response, or as many of its first words as leave room for one token of the prompt."""
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=self.join == "pair") - 1
        while (length := len(self.tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"])) > room:
            words = response[: min(len(response) - 1, len(response) * room // length)].rsplit(maxsplit=1)
            response = words[0] if words else ""
        return response

    @torch.inference_mode()
    def _pads_are_harmless(self):
        """Whether a score is the same beside a longer text. Pads on the left shift what counts its positions from there (BERT,
        GPT-2) and hide the first token from what reads its score there; XLNet, which reads it at the end, needs them there."""
        logits = lambda prompts: self.model(**self.encode(prompts, ["b"] * len(prompts))).logits[0]
        return torch.allclose(logits(["a"]), logits(["a", "a a a a a a"]), rtol=1e-3, atol=1e-4)

    @torch.inference_mode()
    def logits(self, prompts, responses, show=False):
        """What the model itself says, (B, labels), fp32. With `show`, a bar says how far it is, if they are many."""
        prompts, responses = checked_texts(prompts, responses)
        size, parts = self.batch_size, [torch.empty(0, self.model.config.num_labels, device=self.model.device)]
        with progress.bar(len(prompts), "reward model: scoring", "responses", show and len(prompts) > 500) as done:
            for i in range(0, len(prompts), size):
                parts.append(self.model(**self.encode(prompts[i : i + size], responses[i : i + size])).logits.float())
                done.update(len(parts[-1]))
        return torch.cat(parts).cpu()

    def raw(self, prompts, responses, show=False):
        """Scores before standardisation, (B,)."""
        return score_from_logits(self.logits(prompts, responses, show))

    def __call__(self, prompts, responses):
        return (self.raw(prompts, responses) - self.mean) / self.std

    def standardise(self, prompts, responses):
        """Take mean and deviation from these samples of the base policy."""
        raw = self.raw(prompts, responses, show=True)
        mean, std = raw.mean().item(), raw.std().item()
        if not std > 1e-6:
            raise InputError(f"reward model: deviation {std} over {len(raw)} responses; expected scores that differ")
        self.mean, self.std = mean, std


def positions_of(model):
    """The most tokens that an encoder has positions for; RoBERTa's begin behind the id of its pad."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    pads = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return (getattr(model.config, "max_position_embeddings", None) or 0) - sum(pad + 1 for pad in pads[:1])


def checked_texts(prompts, responses):
    """Both as lists of str, equally many. Raises InputError that names the place."""
    prompts, responses = checked_list("reward model: prompts", prompts), checked_list("reward model: responses", responses)
    for name, texts in dict(prompts=prompts, responses=responses).items():
        for row, text in enumerate(texts):
            if not isinstance(text, str) or not is_whole_unicode(text):
                raise InputError(f"reward model: {name}[{row}] is {shown(text)}; expected some text")
    if len(prompts) != len(responses):
        raise InputError(f"reward model: {len(prompts)} prompts and {len(responses)} responses; expected as many")
    return prompts, responses


def _read_format(path):
    """What FORMAT_FILE says: arguments of RewardModel."""
    how = read_json(path)
    if not isinstance(how, dict):
        raise InputError(f"{path}: a {type(how).__name__}; expected an object with {', '.join(FORMAT)}")
    _check_format(path, how)
    return how


def _check_format(where, how):
    """Raises InputError unless all of a dict are arguments of RewardModel that it can use."""
    for name, value in how.items():
        if isinstance(value, bool) or not isinstance(value, FORMAT.get(name, ())) or (name != "join" and not abs(value) < 1e30):
            raise InputError(
                f"{where}: {name} is {shown(value)}; expected a name for join, and finite numbers for {', '.join(list(FORMAT)[1:])}"
            )
        if name in ("std", "batch_size") and value <= 0:
            raise InputError(f"{where}: {name} is {value}; expected a number above 0")
        if name == "join" and value not in JOINS:
            raise InputError(f"{where}: join is {value!r}; expected one of {', '.join(JOINS)}")
        if name == "max_length" and value < 8:
            raise InputError(f"{where}: max_length is {value}; expected at least 8 tokens")


def score_from_logits(logits):
    """(B, 1): the logit. (B, 2): the softmax probability of label 1, which is sigmoid(logit 1 - logit 0). (B,), fp32."""
    if logits.shape[1] not in (1, 2):
        raise InputError(f"reward model with {logits.shape[1]} labels; expected 1 or 2")
    return logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, 1]


# ---------------------------------------------------------------- training


def train_reward_model(pairs, folder, **options):
    """`pairwise.train_reward_model`, whose libraries take 80 MB that only training needs: they are loaded when it begins."""
    from rlhf_helpers import pairwise

    return pairwise.train_reward_model(pairs, folder, **options)


def base_samples(pairs):
    """(prompts, responses): the different responses in the pairs, a text under two prompts twice."""
    samples = dict.fromkeys((pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected"))
    return tuple(map(list, zip(*samples)))


def pair_accuracy(reward_fn, pairs):
    """(accuracy, (low, high)): share of pairs whose chosen response scores higher, with a 95 % bootstrap interval."""
    if not pairs:
        raise InputError("pair_accuracy: no pairs; expected at least one")
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (reward_fn(prompts, [pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    right = np.asarray([float(better) > float(worse) for better, worse in zip(chosen, rejected, strict=True)])
    return mean_interval(right)


def ensure_reward_model(folder=None, pairs_file=DATA_FILE, heldout_file=HELDOUT_FILE, say=print):
    """The reward model in `folder`, trained first on the course's preference pairs if the default folder is missing.
    Held-out prompts are never trained on: a pair with one raises InputError."""
    default = project_root() / "output" / "reward_model_pairwise"
    folder = default if folder is None else Path(folder)
    if find_whole(folder).exists() or folder.resolve() != default.resolve():
        return RewardModel.load(folder)
    pairs, heldout = load_preferences(course_file(pairs_file)), set(load_prompts(course_file(heldout_file)))
    for pair in pairs:
        if pair["prompt"] in heldout:
            raise InputError(f"{pairs_file}: prompt {pair['prompt']!r} is held out in {heldout_file}; expected other prompts")
    say(f"reward model: training on {len(pairs)} pairs (about 2 minutes on two CPU cores)")
    return train_reward_model(pairs, folder)[0]
