"""Logs of the experiments in data/runs: one compressed JSON Lines file a run. First a line of what was run, then a line a step,
and last a line with what the trained policy wrote to the prompts that it is judged by. Prompts and texts are whole, so that
another rule can be applied to a run later; what the annotator thinks of them is computed when a log is read."""

import gzip
import io
import json
import math
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from rlhf_helpers.config import HELDOUT_FILE, TEST_FILE, project_root
from rlhf_helpers.course.gold import distinct2, gold_reward, is_whole
from rlhf_helpers.data import load_prompts, read_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import whole_file

KEPT = {  # of a step's stats, under short names
    "objective/kl": "kl", "ppo/policy/entropy": "entropy", "ppo/policy/clipfrac": "clipped", "ppo/policy/approxkl": "approxkl",
    "ppo/val/var_explained": "explained", "ppo/loss/value": "value_loss", "ppo/grad_norm": "grad_norm",
    "tokens/responses_len_mean": "length", "tokens/responses_eos_frac": "ended", "objective/sampler_kl": "sampler_kl",
    "objective/sampler_max_diff": "sampler_max_diff", "ppo/skipped_updates": "skipped",
}  # fmt: skip
SPLITS = dict(dev=HELDOUT_FILE, test=TEST_FILE)


@dataclass
class Log:
    """One run as it was logged."""

    head: dict  # experiment, condition, seed, config, seconds ...
    steps: list  # dicts: short names of stats, and per response prompts, texts, scores, kls
    after: (
        dict  # split, responses, rewards, kl: the last evaluation, prompt by prompt; judge: who scored it; perhaps other_judges.
        # Of a reward model, whose log has no steps: split, rewards (of the untrained model's answers), chosen and rejected (of test pairs)
    )

    @cached_property
    def judged(self):
        """The prompts of the last evaluation, one an answer."""
        prompts = load_prompts(project_root() / SPLITS[self.after["split"]])
        return [prompt for prompt in prompts for _ in range(len(self.after["responses"]) // len(prompts))]

    @cached_property
    def gold(self):
        """What the annotator gives the answers of the last evaluation, an array."""
        return np.array(list(map(gold_reward, self.judged, self.after["responses"])))

    @property
    def rewards(self):
        return np.array(self.after["rewards"])

    def rewards_by(self, judge):
        """Scores of the last evaluation by the reward model `judge`, a digest: the log's own, or another that has scored it, too. Raises
        InputError where it has not."""
        known = {self.after.get("judge"): self.after["rewards"], **self.after.get("other_judges", {})}
        if judge not in known:
            of = f"{self.head.get('experiment')}/{self.head.get('condition')}"
            raise InputError(f"{of}: not scored by the reward model {judge}; expected one of {', '.join(map(str, known))}")
        return np.array(known[judge])

    @property
    def kl(self):
        """Nats a response, mean of the last evaluation."""
        return float(np.mean(self.after["kl"]))

    @property
    def whole(self):
        """Share of whole answers."""
        return float(np.mean([is_whole(text) for text in self.after["responses"]]))

    @property
    def distinct2(self):
        return distinct2(self.after["responses"])

    def by_prompt(self, values):
        """Values of the last evaluation as (prompts, samples)."""
        return np.asarray(values).reshape(len(set(self.judged)), -1)

    @cached_property
    def history(self):
        """The steps under the names of PPOTrainer.history, as far as they were kept, for `plots` and `doctor`."""
        rows = []
        for number, row in enumerate(self.steps, 1):
            scores = dict(zip(("ppo/mean_scores", "ppo/std_scores"), (np.mean(row["scores"]), np.std(row["scores"], ddof=1))))
            kept = {name: math.nan if row[short] is None else row[short] for name, short in KEPT.items()}
            rows.append({"step": number, **scores, "objective/kl_coef": self.head["config"]["init_kl_coef"], **kept})
        return rows

    @property
    def texts(self):
        """[(prompts, responses), ...] of the steps, as `doctor.examine` takes them."""
        return [(row["prompts"], row["texts"]) for row in self.steps]

    def course_of(self, name):
        """A stat, step by step; "gold" is computed from the texts, "score" is the mean score."""
        if name == "gold":
            return np.array([np.mean(list(map(gold_reward, row["prompts"], row["texts"]))) for row in self.steps])
        if name == "score":
            return np.array([np.mean(row["scores"]) for row in self.steps])
        return np.array([np.nan if row[name] is None else row[name] for row in self.steps], dtype=float)


def write_log(path, head, steps, after):
    """A log, whole or not at all; the same log is the same file, byte for byte."""
    rows = [head, *steps, after]
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        Path(beside).write_bytes(packed.getvalue())


def read_log(path):
    """The Log in a file. Raises InputError that names file and line for anything else."""
    head, *steps, after = read_jsonl(path)
    return Log(head, steps, after)


@cache
def log_as_of(path, written):
    """The log in a file that was written at that time. It is read once, and what was computed from it stays."""
    return read_log(path)


def logs_of(experiment, condition=None):
    """The logs of an experiment that were made, by condition and seed. The same file is the same Log: nobody changes one."""
    folder = project_root() / "data" / "runs" / experiment
    logs = [log_as_of(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.jsonl.gz"))]
    return [log for log in logs if condition in (None, log.head["condition"])]
