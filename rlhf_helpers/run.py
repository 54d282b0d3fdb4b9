"""The folder of a run: who works in it, with which settings it was begun, and what it came to.

.lock           held by the process that works here; the system lets go of it however that process ends
checkpoint/     the last saved step (see checkpoint.py), with the settings and the samples from before training
history.jsonl   the stats of every step; it grows as the run does
samples.jsonl, curves.png, summary.json   the results, in this order: with a summary, the run was whole"""

import contextlib
import hashlib
import json
import math
from pathlib import Path

from rlhf_helpers.checkpoint import FREE, read_settings
from rlhf_helpers.data import read_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import find_whole, lock, raise_written, read_json, shown, write_text
from rlhf_helpers.machine import no_four_bit

WEIGHTS = "weights (by whether bitsandbytes is there)"
MODEL, FORM = "--model (sha256)", "--model (sha256 of its configuration)"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".gguf", "tokenizer.json")
# How it reads a prompt, and what ends an answer.
FORM_FILES = (
    "config.json",
    ".jinja",
    "template.json",
    "tokens_map.json",
    "added_tokens.json",
    ".model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
RESULTS = ("summary.json", "samples.jsonl", "curves.png")


@contextlib.contextmanager
def alone_in(folder, needed=True):
    """Makes the folder, and inside nobody else works there. Raises InputError if somebody does already, or if it cannot be made."""
    if not needed:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab")
    except OSError as error:
        raise_written(folder, error)
    with file:
        try:
            lock(file)
        except (BlockingIOError, PermissionError):
            raise InputError(f"--output {folder}: another run is at work here; expected a folder of its own") from None
        yield


def settings(profile, config, prompts, heldout, reward_folder, processes, model_folder=None):
    """What must agree when a run goes on, by the option that says it, in the order in which differences are reported."""
    return {
        "--profile": profile.name,
        "--model": str(profile.model),
        MODEL: digest_of_model(model_folder),
        FORM: digest_of_model(model_folder, FORM_FILES),
        "--prompts (sha256)": digest_of_texts(prompts),
        "--heldout (sha256)": digest_of_texts(heldout),
        "--reward-model (sha256)": digest_of_folder(reward_folder),
        "--num_processes": processes,
        WEIGHTS: "bf16" if no_four_bit() else "4-bit",
    } | {f"--{name}": value for name, value in vars(config).items() if name not in FREE}


def digest_of_texts(texts):
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def digest_of_folder(folder):
    """Of the names and contents of the files in a folder; hidden ones do not count."""
    parts = hashlib.sha256()
    for path in files_in(find_whole(Path(folder))):
        with open(path, "rb") as file:
            parts.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return parts.hexdigest()[:16]


def digest_of_model(folder, endings=WEIGHT_FILES, whole=2**29, block=2**20, every=16):
    """Of the files with these endings in a model's folder, by default its weights and its tokens; None for a name on a hub. Of a
    file of more than `whole` bytes one block of every sixteen counts, a matrix of a large model at least: all would take a minute."""
    if folder is None or not Path(folder).is_dir():
        return None
    parts = hashlib.sha256()
    for path in files_in(Path(folder)):
        if path.name.endswith(endings):
            size = path.stat().st_size
            parts.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for start in range(0, size, block if size <= whole else every * block):
                    file.seek(start)
                    parts.update(file.read(block))
    return parts.hexdigest()[:16]


def files_in(folder):
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def saved_run(output, now, resume=None):
    """What the checkpoint in `output` says of its run, or None without one. Raises InputError if that run is another one than
    the one with the settings `now`."""
    folder, how = output / "checkpoint", "--fresh to begin anew, or another --output"
    if not find_whole(folder).exists():
        refuse_results(output)
        return None
    try:
        saved = read_settings(folder)
    except InputError as error:
        raise InputError(f"{error}; or {how}") from error
    if "settings" not in saved["extra"]:
        raise InputError(f"{folder}: not made by this command; expected {how}")
    check_extra(saved["extra"], find_whole(folder) / "trainer.json")
    unsaid = {WEIGHTS: "4-bit", MODEL: now.get(MODEL), FORM: now.get(FORM)}  # older runs had no others, or did not say
    then = unsaid | saved["extra"]["settings"]
    if resume and Path(resume).resolve() != folder.resolve():
        now = {"--resume": str(resume)} | now
    for name, value in now.items():
        if then.get(name) != value:
            raise InputError(f"--output {output}: its run has {name} {then.get(name)}, not {value}; expected {how}")
    return saved


def check_extra(extra, path):
    """Raises InputError unless a checkpoint's `extra` is what a run keeps there, each of its kind."""
    number = lambda value: type(value) in (int, float) and math.isfinite(value)
    pair = lambda value: type(value) is list and len(value) == 2 and all(map(number, value)) and value[1] > 0
    for name, fits, expected in (
        ("settings", lambda value: type(value) is dict, "an object"),
        ("standardisation", pair, "a mean and a deviation above 0"),
        ("before", lambda value: type(value) is list and bool(value), "a list of samples"),
        ("seconds", lambda value: number(value) and value >= 0, "a number from 0"),
        ("budget_spent", lambda value: type(value) is bool, "true or false"),
    ):
        if not fits(extra.get(name)):
            found = f"is {shown(extra[name])}" if name in extra else "is missing"
            raise InputError(f"{path}: extra {name} {found}; expected {expected}")


def finished(output, saved, steps, config):
    """(summary, samples) of a run that has nothing left to do, else None. Results that cannot be read are made again."""
    try:
        summary, samples = read_json(output / "summary.json"), read_jsonl(output / "samples.jsonl")
    except InputError:
        return None
    spent = saved["extra"]["budget_spent"] and saved["config"]["kl_budget"] == config.kl_budget
    made = isinstance(summary, dict) and summary.get("steps") == saved["steps_done"]
    return (summary, samples) if made and (spent or saved["steps_done"] >= steps) else None


def refuse_results(output):
    """Raises InputError for a folder with files of a run's names and no checkpoint: whose they are, nobody can tell."""
    for name in (*RESULTS, "history.jsonl"):
        if (output / name).exists():
            raise InputError(
                f"--output {output}: holds {name} and no checkpoint; expected another folder, or --fresh to replace it"
            )


def remove_results(output):
    """The results of an earlier run, or of fewer steps: they say nothing of the one that begins."""
    for name in RESULTS:
        try:
            (output / name).unlink(missing_ok=True)
        except OSError as error:  # a folder of that name, or one that is read only
            raise_written(output / name, error)


def write_json(path, content):
    """A JSON file, whole or not at all, of finite numbers."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def append_json(path, content):
    """One more line of a JSONL file."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
    except OSError as error:
        raise_written(path, error)
