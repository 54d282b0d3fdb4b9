"""A campaign of faults against whole runs: kills, damaged files, wrong settings, NaN, a full disk. Whatever comes, nothing may be
lost past the last saved step, and bad input gets one sentence that says where and what, before anything has changed.

    python tools/faults.py            a few of each, half a minute: part of `make test`
    python tools/faults.py --long     200 kills, 10,000 files, ...: part of `make test-all`
    python tools/faults.py --only kills --seed 3

It prints a table and the first failures, and exits with 1 if there is one. Every campaign runs in a process of its own, on
models of two layers; the faults are drawn from the seed. Needs a system that can fork (Linux, macOS)."""

import argparse
import contextlib
import gzip
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

if not hasattr(os, "fork"):
    sys.exit(print("error: this needs a system that can fork: Linux or macOS", file=sys.stderr) or 2)
import resource

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rlhf_helpers import __main__ as script
from rlhf_helpers import ppo
from rlhf_helpers.checkpoint import load_checkpoint, read_settings
from rlhf_helpers.config import PPO_FIELDS, PPOConfig
from rlhf_helpers.data import load_preferences, load_prompts, read_jsonl, save_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import MANIFEST, write_manifest
from rlhf_helpers.keeper import Keeper
from tests import tiny

STEPS, RESULTS = 6, ("summary.json", "samples.jsonl", "history.jsonl", "curves.png", "checkpoint", ".lock")


class Tally:
    """What came of the faults of one campaign: outcomes counted, failures described."""

    def __init__(self):
        self.outcomes, self.failures = Counter(), []

    def note(self, outcome):
        self.outcomes[outcome] += 1

    def check(self, ok, what):
        if not ok:
            self.failures.append(str(what)[:2000])
        return ok


def sentence(text, begins="", expected=True):
    """Whether this is one sentence for a user."""
    return (
        text.startswith(begins) and "\n" not in text and len(text) < len(begins) + 500 and ("expected" in text or not expected)
    )


# ---------------------------------------------------------------- a run of the script, on tiny models


def prepare(folder):
    """Everything that a run needs, in `folder`: models, prompts. Returns the options that name it."""
    tiny.llama(hidden_size=64).to(torch.bfloat16).save_pretrained(folder / "llama")
    tiny.tokenizer().save_pretrained(folder / "llama")
    tiny.bert(2).save_pretrained(folder / "reward")
    tiny.bert_tokenizer().save_pretrained(folder / "reward")
    save_jsonl(folder / "data" / "pairwise_prefs_part_1.jsonl", [{"prompt": f"t{i} t{i + 1}"} for i in range(10, 20)])
    save_jsonl(folder / "data" / "prompts_heldout.jsonl", [{"prompt": "t30 t31"}, {"prompt": "t32"}])
    options = "--model llama --reward-model reward --max_new_tokens 6 --batch_size 4 --mini_batch_size 2 --kl_budget none"
    return [*options.split(), "--save_every", "1", "--steps", str(STEPS)]


def command(arguments):
    """(exit status, stdout, stderr) of the script in this process; 70 for a fault that it does not report itself."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        except Exception:
            status = traceback.print_exc() or 70
    return status, out.getvalue(), err.getvalue()


def forked(work):
    """The process id of a child that does `work` and ends with the status that it returns."""
    child = os.fork()
    if child == 0:
        status = 71
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def started(arguments, log, saved=None, at_step=None):
    """The process id of the script, begun. It writes to the file `log`, and to `saved` each step that it has saved;
    `at_step(step)` is called before a step is saved."""

    def work():
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        # Streams of its own: this process's own may remember a file that can be sought in, where now is a pipe.
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        save = Keeper.save

        def telling(keeper):
            if at_step:
                at_step(keeper.trainer.steps_done)
            save(keeper)
            if saved:
                with open(saved, "a") as file:
                    file.write(f"{keeper.trainer.steps_done}\n")

        Keeper.save = telling
        return script.main(arguments)

    return forked(work)


def outcome(run):
    """What a finished run came to, without what a clock or the system says."""
    summary = json.loads((run / "summary.json").read_text())
    numbers = {name: value for name, value in summary.items() if "seconds" not in name and name != "peak_rss_mb"}
    rows = [{name: value for name, value in row.items() if "time/" not in name} for row in read_jsonl(run / "history.jsonl")]
    adapters = (run / "checkpoint" / "adapter_model.safetensors").read_bytes()
    return numbers, rows, (run / "samples.jsonl").read_bytes(), adapters, {path.name for path in run.iterdir()}


def whole_run(arguments, folder):
    """(outcome, seconds) of a run that nobody disturbs."""
    began = time.perf_counter()
    status = os.waitstatus_to_exitcode(os.waitpid(started([*arguments, "--output", "whole"], folder / "log"), 0)[1])
    if status:
        raise RuntimeError(f"an undisturbed run ends with {status}:\n{(folder / 'log').read_text()}")
    return outcome(folder / "whole"), time.perf_counter() - began


# ---------------------------------------------------------------- kills


def kills(count, rng, folder, tally):
    """kill -9 at a random moment, then the same command again, until the run is whole: it comes to the end of an undisturbed one."""
    arguments = prepare(folder)
    expected, seconds = whole_run(arguments, folder)
    killed, number = 0, 0
    while killed < count:
        number += 1
        run, log, saved = folder / f"run{number}", folder / "log", folder / f"saved{number}"
        while True:
            child = started([*arguments, "--output", run.name], log, saved)
            # of the time that a whole run takes; most of it is the beginning, which a fresh start makes again
            deadline = time.perf_counter() + rng.uniform(0, 1.2 * seconds) if killed < count else math.inf
            ended = 0
            while not ended and time.perf_counter() < deadline:
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.002)
            if ended:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
            steps = [int(line) for line in saved.read_text().splitlines()] if saved.exists() else []
            if not steps:
                tally.note("killed before anything was saved")
                continue
            tally.note("killed after a save")
            try:
                kept = read_settings(run / "checkpoint")["steps_done"]
                tally.check(kept >= steps[-1], f"saved step {steps[-1]}, found {kept} after a kill")
            except InputError as error:
                tally.check(False, f"after a kill: {error}")
        status, said = os.waitstatus_to_exitcode(status), log.read_text()
        if tally.check(
            status == 0 and "Traceback" not in said, f"a run that was killed on its way ends with {status}:\n{said}"
        ):
            found = outcome(run)
            for name, a, b in zip(("numbers", "history", "samples", "adapters", "files"), found, expected):
                tally.check(a == b, f"{name} differ from those of an undisturbed run: {str(a)[:300]} instead of {str(b)[:300]}")
            tally.note("runs that came to the end of an undisturbed one")
        shutil.rmtree(run)


# ---------------------------------------------------------------- a full disk


def full_disk(count, rng, folder, tally):
    """From some step on no file may grow beyond some bytes: exit status 2 and one sentence; with room, the same command goes on."""
    arguments = prepare(folder)
    expected, _ = whole_run(arguments, folder)
    sizes = [path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file()]
    for number in range(count):
        run, log, saved = folder / f"run{number}", folder / "log", folder / f"saved{number}"
        fatal, room = rng.randint(0, STEPS), int(rng.uniform(0, 1.1) * rng.choice(sizes))

        def shrink(step, fatal=fatal, room=room):
            if step >= fatal:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

        # the log would be a file that cannot grow, too: what the child says goes through a pipe
        reader, writer = os.pipe()
        child = started([*arguments, "--output", run.name], f"/dev/fd/{writer}", None, shrink)
        os.close(writer)
        with open(reader, encoding="utf-8") as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            tally.note("there was room enough")
        else:
            last = said.splitlines()[-1] if said else ""
            good = status == 2 and sentence(last, "error: ", expected=False) and "could not be written (File too large)" in last
            tally.check(good and "Traceback" not in said, f"with {room} bytes from step {fatal} on, status {status}:\n{said}")
            tally.note("refused in a sentence")
            if fatal > 0:
                try:
                    kept = read_settings(run / "checkpoint")["steps_done"]
                    tally.check(kept >= fatal - 1, f"step {fatal - 1} was saved, found {kept} on a full disk")
                except InputError as error:
                    tally.check(False, f"on a full disk: {error}")
            status = os.waitstatus_to_exitcode(os.waitpid(started([*arguments, "--output", run.name], log, saved), 0)[1])
            if tally.check(status == 0, f"with room again, status {status}:\n{log.read_text()}"):
                tally.check(outcome(run) == expected, "with room again it came to another end than an undisturbed run")
                tally.note("runs that went on with room again")
        shutil.rmtree(run, ignore_errors=True)


# ---------------------------------------------------------------- malformed files


JUNK = [
    None,
    True,
    0,
    -1,
    1e400,
    math.nan,
    "",
    " ",
    "\ud800",
    "\x00",
    [],
    {},
    [[]],
    [{}],
    {"role": []},
    {"a": {"b": 1}},
    10**5000,
    "x" * 5000,
]
TURNS = [{"role": "user", "content": "What is tea?"}, {"role": "assistant", "content": "A drink."}]
GOOD = [
    {"prompt": "What is tea?", "chosen": "A warm drink.", "rejected": "No."},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What"},
    {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "Unknown."}]},
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "No."}]},
    {"prompt": "日本のお茶とは?", "chosen": "温かい飲み物", "rejected": "不明"},
]


def nested(value, rng):
    """A copy of a JSON value with junk somewhere inside, or without one of its parts."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        copy = dict(value) if isinstance(value, dict) else list(value)
        place = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.2:
            del copy[place]
        elif isinstance(copy, dict) and rng.random() < 0.2:
            copy[rng.choice(["Prompt", "text", "role", "", "rejected"])] = copy.pop(place)
        else:
            copy[place] = nested(copy[place], rng)
        return copy
    return rng.choice(JUNK)


def malformed(rng):
    """The bytes of a JSONL file that somebody got wrong."""
    rows = [rng.choice(GOOD) for _ in range(rng.randint(1, 3))]
    kind = rng.randrange(10)
    if kind < 5:
        rows[rng.randrange(len(rows))] = nested(rng.choice(GOOD), rng)
    try:
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass") for row in rows]
    except ValueError:  # a number of too many digits for this Python
        lines = [b'{"prompt": ' + b"9" * 5000 + b"}"]
    if kind == 5:
        brackets = rng.choice(["[", '{"prompt":', '{"chosen":[']) * rng.choice([50, 3000, 100_000])
        lines[rng.randrange(len(lines))] = brackets.encode()
    data = bytearray(rng.choice([b"\n", b"\n", b"\r\n", b"\n\n", b","]).join(lines))
    if kind >= 6:
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) + 1)
            what = rng.randrange(4)
            if what == 0 and place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            elif what == 1:
                data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
            elif what == 2:
                del data[place : place + rng.randint(1, 30)]
            else:
                data[place:place] = rng.choice(
                    [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\\u", b"}", b"\n", b"NaN", b"\x1f\x8b"]
                )
    if rng.random() < 0.1:
        data = bytearray(gzip.compress(bytes(data)))
        if rng.random() < 0.7:
            data = data[: rng.randrange(1, len(data))]
    return bytes(data)


def files(count, rng, folder, tally):
    """Prompt and preference files that somebody got wrong: read, or refused by a sentence with file and line."""
    warnings.simplefilter("ignore")
    path = folder / "file.jsonl"
    for _ in range(count):
        path.write_bytes(malformed(rng))
        for load in (load_prompts, load_preferences):
            try:
                found = load(path)
            except InputError as error:
                tally.note("refused in a sentence")
                tally.check(sentence(str(error), str(path)), f"{load.__name__}: {error}")
            except Exception:
                tally.check(False, f"{load.__name__} of {path.read_bytes()[:200]}:\n{traceback.format_exc(limit=-3)}")
            else:
                tally.note("could be read after all")
                texts = found if load is load_prompts else [text for pair in found for text in pair.values()]
                tally.check(
                    texts and all(isinstance(text, str) and text.strip() for text in texts), f"{load.__name__}: {texts}"
                )


# ---------------------------------------------------------------- damaged checkpoints


def damaged_bytes(data, rng):
    """Some of these bytes, changed."""
    data, what = bytearray(data), rng.randrange(5)
    if what == 0:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == 1:
        data = data[: rng.randrange(len(data))]
    elif what == 2:
        data += bytes(rng.randint(1, 100))
    elif what == 3:
        place = rng.randrange(len(data))
        data[place : place + 16] = bytes(rng.randrange(256) for _ in range(16))
    else:
        data = bytearray()
    return bytes(data)


def forged(path, rng):
    """A file of a checkpoint written anew with something else in it, by somebody who knows its format."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        name, what = rng.choice(sorted(tensors)), rng.randrange(5)
        tensor = tensors.pop(name)
        if what == 0:
            tensors[name] = tensor.double() if tensor.is_floating_point() else tensor.float()
        elif what == 1:
            tensors[name] = tensor.reshape(-1)[: tensor.numel() // 2].clone()
        elif what == 2:
            tensors[name + "x"] = tensor
        elif what == 3 and tensor.is_floating_point():
            tensors[name] = torch.full_like(tensor, rng.choice([math.nan, math.inf, -math.inf]))
        save_file(tensors, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(nested(json.loads(path.read_text()), rng)), encoding="utf-8", errors="surrogatepass")
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[rng.randrange(len(rows))] = nested(rng.choice(rows), rng)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", errors="surrogatepass")


def damage(folder, other, rng):
    """Do something to the checkpoint in `folder`. Returns (in words, whether it must be refused)."""
    path = rng.choice(sorted(folder.iterdir()))
    what = rng.choice(["bytes", "bytes", "bytes", "missing", "foreign", "folder", "swapped", "forged", "forged", "forged"])
    if what == "bytes":
        before = path.read_bytes()
        path.write_bytes(damaged_bytes(before, rng))
        same = path.name == MANIFEST and same_json(before, path.read_bytes())  # one blank for another
        return f"bytes of {path.name}", path.read_bytes() != before and not same
    if what == "missing":
        path.unlink()
    elif what == "foreign":
        (folder / f"more-{path.name}").write_bytes(path.read_bytes())
    elif what == "folder":
        path.unlink()
        path.mkdir()
    elif what == "swapped":
        theirs = (other / path.name).read_bytes()
        same = theirs == path.read_bytes()
        path.write_bytes(theirs)
        return f"{path.name} of another checkpoint", not same
    else:
        try:
            forged(path, rng)
        except (UnicodeEncodeError, ValueError):  # junk that JSON cannot hold
            path.write_bytes(b"\xff")
        if path.name != MANIFEST:
            write_manifest(folder)
        return f"{path.name} forged", False
    return f"{path.name} {what}", True


def same_json(first, second):
    try:
        return json.loads(first) == json.loads(second)
    except (ValueError, RecursionError):
        return False


def checkpoints(count, rng, folder, tally):
    """Damaged, mixed and forged checkpoints: refused by a sentence with file, and nothing has changed; or loaded, whole."""
    made = []
    for number in range(2):
        trainer = tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.2, seed=number), mini_batch_size=2, target=1.0)
        trainer.step(*tiny.batch(seed=number))
        trainer.save(folder / f"made{number}")
        made.append(folder / f"made{number}")
    trainer = tiny.trainer(mini_batch_size=2, target=1.0)
    trainer.step(*tiny.batch(seed=5))
    trainer.save(folder / "home")
    before, randoms = tiny.state(trainer), (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    for _ in range(count):
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        shutil.copytree(made[0], folder / "checkpoint")
        what, must = damage(folder / "checkpoint", made[1], rng)
        try:
            load_checkpoint(trainer, folder / "checkpoint", strict=rng.random() < 0.5)
        except InputError as error:
            tally.note("refused in a sentence")
            tally.check(sentence(str(error), str(folder / "checkpoint")), f"{what}: {error}")
            same = tiny.same(tiny.state(trainer), before) and np.random.get_state()[1].tolist() == randoms[2]
            same &= random.getstate() == randoms[0] and torch.equal(torch.get_rng_state(), randoms[1])
            tally.check(same, f"{what}: refused, and something has changed")
            if not same:
                load_checkpoint(trainer, folder / "home")
        except Exception:
            tally.check(False, f"{what}:\n{traceback.format_exc(limit=-3)}")
            load_checkpoint(trainer, folder / "home")
        else:
            tally.note("loaded: what was changed means the same, or is whole in itself")
            tally.check(not must, f"{what}: loaded without a word")
            load_checkpoint(trainer, folder / "home")
            tally.check(tiny.same(tiny.state(trainer), before), f"{what}: a whole checkpoint did not mend it")


# ---------------------------------------------------------------- wrong settings and command lines


WRONG_VALUES = [
    "8",
    "",
    [],
    {},
    (1,),
    object(),
    1j,
    b"1",
    math.nan,
    -1,
    -0.5,
    -math.inf,
    10**400,
    True,
    None,
    1.5,
    0,
    1e30,
    10**30,
    1e300,
    math.inf,
]
WRONG_OPTIONS = [
    ["--frobnicate"], ["--steps", "many"], ["--steps", "0"], ["--steps", "-3"], ["--steps"], ["--save_every", "0"], ["--profile", "tpu"],
    ["--prompts", "nowhere.jsonl"], ["--prompts", "llama"], ["--prompts", "bad.jsonl"], ["--prompts", "empty.jsonl"], ["--prompts", ""],
    ["--heldout", "nowhere.jsonl"], ["--heldout", "bad.jsonl"], ["--prompts", "data/prompts_heldout.jsonl"], ["--prompts", "\x00"],
    ["--output", "bad.jsonl"], ["--output", "bad.jsonl/run"], ["--output", "taken"], ["--model", "no-such-model"], ["--model", "broken"],
    ["--model", "adapters"], ["--model", "bad.jsonl"], ["--reward-model", "nowhere"], ["--reward-model", "broken"], ["--reward-model", "llama"],
    ["--resume", "nowhere"], ["--resume", "damaged"], ["--resume", "bad.jsonl"], ["--adap_kl_ctrl", "perhaps"], ["--kl_penalty", "k3"],
    ["--log_with", "no_such_tracker"], ["--batch_size", "4.0"], ["--batch_size", "6", "--mini_batch_size", "4"], ["--gamma", "1.1"],
    ["--temperature", "0"], ["--temperature", "nan"], ["--seed", "-1"], ["--kl_budget", "0"], ["--kl_budget", "some"], ["--lam", "inf"],
    ["--learning_rate", "1e999"], ["--max_new_tokens", "9" * 30], ["--max_new_tokens", "9" * 5000], ["--max_new_tokens", "128"], ["nonsense"],
]  # fmt: skip
FINE_OPTIONS = [
    ["--steps", "1"],
    ["--seed", "3"],
    ["--gamma", "0.9"],
    ["--kl_budget", "none"],
    ["--lam", "1"],
    ["--fresh"],
    ["--ppo_epochs", "3"],
]


def wrong_settings(count, rng, tally):
    """One wrong value in a PPOConfig."""
    for _ in range(count):
        field, value = rng.choice(PPO_FIELDS), rng.choice(WRONG_VALUES)
        try:
            PPOConfig(**{field.name: value})
        except InputError as error:
            tally.note("refused in a sentence")
            tally.check(sentence(str(error), "PPOConfig."), f"{field.name}={value!r:.40}: {error}")
        except Exception:
            tally.check(False, f"{field.name}={value!r:.40}:\n{traceback.format_exc(limit=-3)}")
        else:  # type(None), bool, int and float are the types of settings
            fits = type(value).__name__ in str(field.type) or (type(value) is int and "float" in str(field.type))
            fits |= value is None and "None" in str(field.type)
            fits |= "str" in str(field.type) and type(value) is str
            tally.check(fits, f"{field.name}={value!r:.40} was taken")
            tally.note("a value that the setting may have")
            if "float" in str(field.type) and value is not None:  # then a step can be made with it
                try:
                    tiny.trainer(tiny.with_lora(tiny.llama()), **{field.name: value}).step(*tiny.batch())
                except Exception:
                    tally.check(False, f"a step with {field.name}={value!r:.40}:\n{traceback.format_exc(limit=-3)}")


def settings(count, rng, folder, tally):
    """Wrong settings and command lines: status 2, one sentence, nothing made."""
    wrong_settings(count // 2, rng, tally)
    arguments = prepare(folder)
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (folder / "empty.jsonl").touch()
    (folder / "taken").mkdir()
    (folder / "taken" / "checkpoint").mkdir()
    (folder / "taken" / "checkpoint" / "trainer.json").write_text("{}")
    for name in ("broken", "adapters", "damaged"):
        (folder / name).mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    (folder / "adapters" / "adapter_config.json").write_text("{}")
    (folder / "damaged" / "trainer.json").write_text("{}")
    found = lambda: sorted(str(path) for path in folder.rglob("*") if path.name != ".lock")
    before, lines = found(), count - count // 2
    for number in range(lines):
        wrong = WRONG_OPTIONS[number % len(WRONG_OPTIONS)]  # each in its turn; some twice in a line with others
        more = [rng.choice(FINE_OPTIONS) for _ in range(rng.randint(0, 2))] + [rng.choice(WRONG_OPTIONS)] * (rng.random() < 0.2)
        given = [*arguments, *(["--output", "new"] if "--output" not in wrong else [])]
        for options in sorted([*more, wrong], key=lambda _: rng.random()):
            given += [] if "--fresh" in options and "taken" in wrong else options
        status, out, err = command([*given, *wrong[-2:]] if wrong[0].startswith("--") and len(wrong) == 2 else given)
        last = err.splitlines()[-1] if err else ""
        theirs = last.endswith("; --help lists the options")  # argparse's own words do not say what was expected
        fits = sentence(last, "error: ", expected=not theirs)
        good = err.count("\n") == 1 and (fits or "could not be written (Not a directory)" in last)
        tally.check(
            status == 2 and good and "Traceback" not in err,
            f"{' '.join(wrong)[:60]}: status {status}, {out[-300:]}{err[-1500:]}",
        )
        made = [name for name in found() if name not in before]
        tally.check(not made or made == [str(folder / "new")], f"{' '.join(wrong)[:60]}: made {made}")
        shutil.rmtree(folder / "new", ignore_errors=True)
        tally.note("refused in a sentence")


# ---------------------------------------------------------------- NaN


def poisoned(x, rng):
    """x with one number that is not finite."""
    x = x.clone()
    x.view(-1)[rng.randrange(x.numel())] = rng.choice([math.nan, math.inf])
    return x


@contextlib.contextmanager
def replaced(owner, name, value):
    """`owner.name` is `value` inside."""
    there, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if there else delattr(owner, name)


@contextlib.contextmanager
def hooked(module, when, rng):
    """A module's output has one number that is not finite, where `when()` says so."""
    handle = module.register_forward_hook(lambda module, args, out: poisoned(out, rng) if when() else out)
    try:
        yield
    finally:
        handle.remove()


def poisons(trainer, rng):
    """{where: a context in which numbers there are not finite}."""
    head, learning = trainer.model.pretrained_model.get_output_embeddings(), torch.is_grad_enabled
    return {
        "logits, when scored": lambda: hooked(head, lambda: not learning(), rng),
        "logits, when learnt from": lambda: hooked(head, learning, rng),
        "values, when scored": lambda: hooked(trainer.model.v_head, lambda: not learning(), rng),
        "values, when learnt from": lambda: hooked(trainer.model.v_head, learning, rng),
        "KL": lambda: replaced(ppo, "kl_per_token", lambda *args, fine=ppo.kl_per_token: poisoned(fine(*args), rng)),
        "gradients": lambda: poisoned_gradient(rng.choice(trainer.parameters), rng),
        "scores": contextlib.nullcontext,
    }


@contextlib.contextmanager
def poisoned_gradient(parameter, rng):
    handle = parameter.register_hook(lambda gradient: poisoned(gradient, rng))
    try:
        yield
    finally:
        handle.remove()


def nan(count, rng, folder, tally):
    """A number that is not finite, in one place of one step: weights and Adam stay whole to the bit, and the next step learns."""
    llama = folder / "llama"
    prepare(folder)
    policies = {"fp32": lambda: tiny.with_lora(tiny.llama()), "NF4": lambda: tiny.with_lora(tiny.nf4_llama(llama))}
    for kind, make in policies.items():
        trainer = tiny.trainer(make(), target=1.0, ppo_epochs=2)
        for number in range(count // 2):
            queries, _, scores = tiny.batch(seed=number)
            responses = trainer.generate(queries)
            trainer.sampler_is_exact = rng.random() < 0.5 and trainer.sampler_is_exact
            places = poisons(trainer, rng)
            where = sorted(places)[number % len(places)]
            before, weights = trainer.kl_coef, {k: v for k, v in tiny.state(trainer).items() if k not in ("kl_coef", "steps")}
            if where == "scores":
                scores[rng.randrange(4)] = rng.choice([math.nan, math.inf, -math.inf])
            try:
                with places[where]():
                    stats = trainer.step(queries, responses, scores)
                tally.check(stats["ppo/skipped_updates"] > 0, f"{kind}, {where}: no update was left out")
                tally.note("left out and counted")
                only_some = "learnt" in where  # where it falls on a pad in one update, that one is whole
                moved = not tiny.same({k: v for k, v in tiny.state(trainer).items() if k in weights}, weights)
                tally.check(only_some or not moved, f"{kind}, {where}: something has changed")
            except InputError as error:
                tally.check(where == "scores" and sentence(str(error), "step: scores["), f"{kind}, {where}: {error}")
                tally.note("refused in a sentence")
                moved = not tiny.same({k: v for k, v in tiny.state(trainer).items() if k in weights}, weights)
                tally.check(not moved and trainer.kl_coef == before, f"{kind}, {where}: refused, and something has changed")
            except Exception:
                tally.check(False, f"{kind}, {where}:\n{traceback.format_exc(limit=-4)}")
            finite = all(torch.isfinite(tensor).all() for tensor in tiny.state(trainer).values())
            tally.check(finite, f"{kind}, {where}: weights, Adam or the KL coefficient are not finite")
            queries, responses, scores = tiny.batch(seed=number + 1)
            clean = trainer.step(queries, responses, scores)
            tally.check(clean["ppo/skipped_updates"] == 0, f"{kind}, {where}: the next step does not learn")
        with hooked(trainer.model.pretrained_model.get_output_embeddings(), lambda: True, rng):
            trainer.unpacked = None  # the plain way, which the hook sees
            try:
                trainer.generate(queries)
                tally.check(False, f"{kind}, logits, when sampled: nobody noticed")
            except InputError as error:
                tally.check(sentence(str(error), "generate: "), error)
                tally.note("refused in a sentence")


# ---------------------------------------------------------------- all of them

# How many faults: the short form, the long one.
CAMPAIGNS = {
    kills: (4, 200),
    full_disk: (2, 60),
    files: (500, 10_000),
    checkpoints: (100, 1000),
    settings: (100, 1000),
    nan: (14, 280),
}


def isolated(campaign, count, seed):
    """The Tally of a campaign in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()

        def work():
            os.chdir(folder)
            os.environ |= {"RLHF_HOME": str(folder)}
            torch.set_num_threads(1)
            tally = Tally()
            campaign(count, random.Random(f"{seed} {campaign.__name__}"), folder, tally)
            (folder / "tally").write_text(json.dumps([tally.outcomes, tally.failures]))
            return 0

        status = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
        tally = Tally()
        if tally.check(status == 0, f"the campaign itself ended with {status}"):
            outcomes, tally.failures = json.loads((folder / "tally").read_text())
            tally.outcomes.update(outcomes)
    return tally


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="hundreds and thousands of each")
    parser.add_argument("--only", choices=[campaign.__name__ for campaign in CAMPAIGNS], help="this campaign alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| campaign | faults | what came of them | failures | seconds |\n|---|---|---|---|---|", flush=True)
    failures = []
    for campaign, counts in CAMPAIGNS.items():
        if options.only in (None, campaign.__name__):
            began, count = time.perf_counter(), counts[options.long]
            tally = isolated(campaign, count, options.seed)
            came = "; ".join(f"{number:,} {what}" for what, number in sorted(tally.outcomes.items()))
            name = campaign.__name__.replace("_", " ")
            print(f"| {name} | {count:,} | {came} | {len(tally.failures)} | {time.perf_counter() - began:.0f} |", flush=True)
            failures += [f"{name}: {failure}" for failure in tally.failures]
    for failure in failures[:20]:
        print(f"\n{failure}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
