"""A checkpoint is one folder that appears whole or not at all, and is read only if it is whole, byte for byte.

adapter_model.safetensors, adapter_config.json   the LoRA adapters as PEFT writes them
model.safetensors                                the value head as v_head.*, where TRL's value-head model looks for it
trainer.safetensors                              every trainable tensor, Adam's state, the random states of every process
trainer.json, history.jsonl                      step, KL coefficient, settings, `extra`; the stats of every step
manifest.json                                    size and sha256 of all of these, written last and checked first

Loading is three things in a row: read and check, build the new state, put it in place. Only the last one changes the trainer."""

import json
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file

from rlhf_helpers.config import PPOConfig
from rlhf_helpers.data import read_jsonl, save_jsonl
from rlhf_helpers.errors import InputError, MissingInput
from rlhf_helpers.files import (
    check_manifest,
    checked_path,
    find_whole,
    read_json,
    reason,
    shown,
    whole_folder,
    write_manifest,
    write_text,
)

VERSION = 2
ADAM = ("step", "exp_avg", "exp_avg_sq")
FREE = ("kl_budget", "log_with")  # the settings that decide when a run ends and how it logs, not what it computes


@dataclass
class State:
    """All that a checkpoint brings back."""

    parameters: dict  # name: tensor
    adam: dict  # name: {one of ADAM: tensor}, without the parameters that have not moved yet
    random: dict  # this process's random states, as `random_states` gives them
    steps_done: int
    kl_coef: float
    history: list
    rates: list  # of Adam's groups


# ---------------------------------------------------------------- save


def save_checkpoint(trainer, folder, extra=None):
    """Write the trainer's whole state to `folder`, and with it `extra`, a dict that JSON can keep, for `read_settings`. Every
    process calls it, the main one writes. Raises files.NotWritten, on every process, and leaves the last checkpoint as it was."""
    folder = checked_path("save: folder", folder)
    if not isinstance({} if extra is None else extra, dict):
        raise InputError(f"save: extra is {shown(extra)}; expected a dict")
    try:
        json.dumps(extra)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"save: extra has something that JSON cannot keep ({error}); expected text, numbers, lists and dicts"
        ) from None
    state = state_of(trainer)
    moments = {f"Adam's {key} of {name}": of[key] for name, of in state.adam.items() for key in ADAM}
    for name, tensor in [*state.parameters.items(), *moments.items()]:
        if not tensor.isfinite().all():  # `resume` would refuse it, and the last whole one would be gone
            raise InputError(
                f"{folder}: not saved: {name} has numbers that are not finite; the last whole one, if there was one, is kept"
            )
    everyones = gather_object([random_states(trainer)])
    failed = None
    if trainer.accelerator.is_main_process:
        try:
            _write(trainer, state, folder, everyones, extra or {})
        except InputError as error:
            failed = error
    failed = broadcast_object_list([failed])[0]  # else the others would wait for ever
    if failed:
        raise failed


def _write(trainer, state, folder, everyones, extra):
    about = dict(
        version=VERSION,
        steps_done=trainer.steps_done,
        kl_coef=trainer.kl_coef,
        learning_rates=rates_of(trainer),
        num_processes=trainer.accelerator.num_processes,
        config=vars(trainer.config),
        extra=extra,
    )
    checked_about(f"{folder}: not saved", about)
    checked_history(lambda number: f"{folder}: not saved: history row {number}", trainer.history, trainer.steps_done)
    with whole_folder(folder, sign="trainer.json") as beside:
        if trainer.model.has_adapters:
            trainer.model.pretrained_model.save_pretrained(beside)
        head = {f"v_head.{name}": tensor for name, tensor in trainer.model.v_head.state_dict().items()}
        _save_tensors(head, beside / "model.safetensors")
        tensors = {f"param.{name}": tensor for name, tensor in state.parameters.items()}
        tensors |= {f"adam.{key}.{name}": moments[key] for name, moments in state.adam.items() for key in ADAM}
        tensors |= {f"random.{kind}.{rank}": tensor for rank, states in enumerate(everyones) for kind, tensor in states.items()}
        _save_tensors(tensors, beside / "trainer.safetensors")
        write_text(beside / "trainer.json", json.dumps(about, indent=1) + "\n")
        save_jsonl(beside / "history.jsonl", trainer.history)
        write_manifest(beside)


def _save_tensors(tensors, path):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def state_of(trainer):
    """The trainer's State. Its tensors are the trainer's own, not copies. Raises InputError for another optimizer than Adam."""
    moments = trainer.optimizer.state_dict()["state"]
    for kept in moments.values():
        if kept and kept.keys() != set(ADAM):
            raise InputError(
                f"trainer.optimizer keeps {', '.join(kept)}; expected Adam's {', '.join(ADAM)}, which a checkpoint can hold"
            )
    named = _trained(trainer)
    adam = {name: {key: moments[index][key] for key in ADAM} for index, (name, _) in enumerate(named) if moments.get(index)}
    so_far = (trainer.steps_done, trainer.kl_coef, trainer.history, rates_of(trainer))
    return State(dict(named), adam, random_states(trainer), *so_far)


def rates_of(trainer):
    """The learning rates of Adam's groups, the policy's and the value head's: the config's, unless somebody changed them on the way."""
    return [float(group["lr"]) for group in trainer.optimizer.param_groups]


def random_states(trainer):
    """This process's random states: torch's, its card's and the trainer's as torch gives them; Python's and numpy's as the 624
    words of their generator and the place in them; and the normal numbers these two have in store, (Python's or nan, whether
    numpy has one, numpy's)."""
    _, python, python_gauss = random.getstate()
    _, words, place, has_gauss, gauss = np.random.get_state()
    states = {
        "trainer": trainer.generator.get_state(),
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python),
        "numpy": torch.tensor([*words.tolist(), place]),
        "gauss": torch.tensor([math.nan if python_gauss is None else python_gauss, has_gauss, gauss], dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _trained(trainer):
    """(name, parameter) of everything the optimizer moves, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [(names[id(parameter)], parameter) for parameter in trainer.parameters]


# ---------------------------------------------------------------- load


def load_checkpoint(trainer, folder, strict=True):
    """Bring the trainer to the state in `folder`. Raises InputError, changing nothing, if `folder` is not a whole checkpoint of
    this model and this number of processes, or was written under other settings than the trainer's (FREE ones aside).

    With `strict=False` the trainer's settings may differ, and hold from here on (of the seed only the order of prompts: the random
    numbers go on from the checkpoint). So do its init_kl_coef and its learning rates: the
    KL coefficient and Adam's rates are the checkpoint's only where both began with the same."""
    folder, about = _read(folder)
    if trainer.model.adapters_merged():  # taken out again, the new ones would be subtracted where the old ones were added
        raise InputError(f"{folder}: the model's adapters are merged into its weights; expected them apart (unmerge_adapter)")
    processes = about["num_processes"]
    _check_settings(folder, about, trainer.config, trainer.accelerator.num_processes, strict)
    _check_adapters(folder, trainer.model.pretrained_model)
    same_price = trainer.config.init_kl_coef == about["config"]["init_kl_coef"]
    kl_coef = about["kl_coef"] if same_price else trainer.config.init_kl_coef
    same_rates = all(
        getattr(trainer.config, name) == about["config"][name] for name in ("learning_rate", "value_learning_rate")
    )
    rates = about.get("learning_rates") if same_rates else None  # those from before there was such a field have none
    history = _read_history(folder, about["steps_done"])
    state = _read_tensors(trainer, folder, processes, about["steps_done"], kl_coef, history)
    state.rates = rates or rates_of(trainer)

    before = state_of(trainer)
    before.parameters, before.adam, before.history = _copy(before.parameters), _copy(before.adam), list(before.history)
    try:
        _put(trainer, state)
    except BaseException:
        _put(trainer, before)
        raise


def _check_adapters(folder, lm):
    """Their shapes alone would fit adapters of another strength, too."""
    here = getattr(lm, "active_peft_config", None)
    name = getattr(lm, "active_adapter", None)
    place = folder if name in (None, "default") else folder / name  # where PEFT writes it
    there = read_json(place / "adapter_config.json") if here else {}
    if not isinstance(there, dict):
        raise InputError(f"{place / 'adapter_config.json'}: a {type(there).__name__}; expected an object")
    for name in ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        if name in there and there[name] != getattr(here, name, None):
            raise InputError(
                f"{folder}: adapters with {name} {shown(there[name])}, the model's have {shown(getattr(here, name, None))}; "
                "expected the same"
            )


def read_settings(folder, config=None, processes=1):
    """What a checkpoint says of itself: a dict with steps_done, kl_coef, num_processes, config (the PPOConfig as a dict) and
    extra (what was given to `save_checkpoint`). Raises InputError unless the folder is a whole checkpoint, and, if a PPOConfig
    is given, unless so many processes with these settings could load it."""
    folder, about = _read(folder)
    if config:
        _check_settings(folder, about, config, processes)
    return about


def _check_settings(folder, about, config, processes, strict=True):
    if about["num_processes"] != processes:
        raise InputError(
            f"{folder}: written by {about['num_processes']} processes, resumed by {processes}; expected as many: each has its own "
            f"random states (accelerate launch --num_processes {about['num_processes']} ...)"
        )
    for name, here in vars(config).items():
        there = about["config"][name]
        if strict and name not in FREE and here != there:
            raise InputError(
                f"{folder}: PPOConfig.{name} is {shown(here)} here and {shown(there)} in the checkpoint; expected the same (or begin anew)"
            )


def _read(folder):
    """(the folder that is whole, trainer.json with all types checked)."""
    asked = checked_path("checkpoint", folder)
    folder = find_whole(asked)
    made_by = "expected a folder made by PPOTrainer.save"
    if not folder.is_dir():
        raise MissingInput(f"{asked}: no checkpoint here; {made_by}")
    if not any((folder / name).is_file() for name in ("trainer.json", "manifest.json")):
        inside = f" ({asked / 'checkpoint'} is one)" if (folder / "checkpoint" / "trainer.json").is_file() else ""
        raise InputError(f"{asked}: no checkpoint here{inside}; {made_by}, with trainer.json")
    check_manifest(folder)
    path = folder / "trainer.json"
    about = read_json(path)
    checked_about(path, about)
    return folder, about


def checked_about(where, about):
    """Raises InputError, which begins with `where`, unless this is what trainer.json says of a run. What is loaded is checked, and what
    is saved: a checkpoint that could not be loaded would have taken the place of the last whole one."""

    def need(name, ok, expected):
        if name not in about or not ok(about[name]):
            found = f"{name} is {shown(about[name])}" if name in about else f"no {name}"
            raise InputError(f"{where}: {found}; expected {expected}")

    whole = lambda value: type(value) is int
    if not isinstance(about, dict):
        raise InputError(f"{where}: a {type(about).__name__}; expected an object")
    need("version", lambda value: whole(value) and value == VERSION, f"{VERSION}")
    need("steps_done", lambda value: whole(value) and 0 <= value < 2**31, "a whole number from 0")
    need("kl_coef", lambda value: type(value) in (int, float) and 0 <= value < 1e300, "a finite number from 0")
    rate = lambda value: type(value) in (int, float) and 0 <= value < 1e300
    rates = lambda value: type(value) is list and len(value) == 2 and all(map(rate, value))
    if "learning_rates" in about:
        need("learning_rates", rates, "the rates of the policy and of the value head, numbers from 0")
    need("num_processes", lambda value: whole(value) and 1 <= value < 2**16, "a whole number from 1")
    need("extra", lambda value: isinstance(value, dict), "an object")
    need("config", lambda value: isinstance(value, dict), "an object")
    config, fields = about["config"], vars(PPOConfig()).keys()
    for name in [*(fields - config.keys()), *(config.keys() - fields)]:
        raise InputError(
            f"{where}: config {'lacks' if name in fields else 'has'} {shown(name)}; expected the fields of PPOConfig"
        )
    try:
        PPOConfig(**config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def checked_history(where, rows, steps_done):
    """The rows of a history, one for each of the steps done, or for fewer where it was emptied on the way. Raises InputError, which
    begins with `where(number)`, for a row that is none."""
    last = 0
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{where(number)}: a {type(row).__name__}; expected the stats of a step")
        step = row.get("step")
        if type(step) is not int or not last < step <= steps_done:
            raise InputError(f"{where(number)}: step is {shown(step)}; expected a whole number from {last + 1} to {steps_done}")
        for name, value in row.items():
            beyond = type(value) is int and abs(value) > 2**63  # of any stat, and perhaps of any float
            if type(value) not in (int, float) or beyond:
                raise InputError(f"{where(number)}: field {shown(name)} is a {type(value).__name__}; expected a number")
        if "objective/kl" not in row:
            raise InputError(f"{where(number)}: no field 'objective/kl'; expected the stats of a step")
        last = step
    return rows


def _read_history(folder, steps_done):
    path = folder / "history.jsonl"
    empty = path.is_file() and path.stat().st_size == 0
    return checked_history(lambda number: f"{path}:{number}", [] if empty else read_jsonl(path), steps_done)


def _read_tensors(trainer, folder, processes, steps_done, kl_coef, history):
    """The State in trainer.safetensors, for this process: every name, shape, dtype and value is checked."""
    path = folder / "trainer.safetensors"
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file is not kept open
    except Exception as error:  # of several kinds
        raise InputError(f"{path}: cannot be read ({reason(error)}); expected tensors") from error

    def take(name, like):
        if name not in tensors:
            raise InputError(f"{path}: no tensor {name}; expected {_kind(like)}: another model's checkpoint?")
        tensor = tensors.pop(name)
        if _kind(tensor) != _kind(like):
            raise InputError(f"{path}: tensor {name} is {_kind(tensor)}; expected {_kind(like)}: another model's checkpoint?")
        if tensor.is_floating_point() and not name.startswith("random.") and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} has numbers that are not finite; expected finite ones")
        return tensor

    named = dict(_trained(trainer))
    parameters = {name: take(f"param.{name}", parameter) for name, parameter in named.items()}
    adam = {}
    for name, parameter in named.items():
        if any(f"adam.{key}.{name}" in tensors for key in ADAM):
            adam[name] = {key: take(f"adam.{key}.{name}", torch.tensor(0.0) if key == "step" else parameter) for key in ADAM}
            if adam[name]["step"] < 0 or (adam[name]["exp_avg_sq"] < 0).any():
                raise InputError(f"{path}: Adam's state of {name} has a number below 0; expected none in step and exp_avg_sq")
    everyones, like = [], random_states(trainer)
    for rank in range(processes):
        kinds = [kind for kind in like if kind != "cuda" or f"random.cuda.{rank}" in tensors]
        everyones.append({kind: take(f"random.{kind}.{rank}", like[kind]) for kind in kinds})
        tensors.pop(f"random.cuda.{rank}", None)  # of a card that is not here
    for name in tensors:
        raise InputError(f"{path}: tensor {shown(name)} belongs to nothing here; expected none: another model's checkpoint?")
    for states in everyones:
        try:
            _set_random(states, trainer.generator.device)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise InputError(f"{path}: a random state cannot be used ({reason(error)}); expected one that was saved") from error
    return State(parameters, adam, everyones[trainer.accelerator.process_index], steps_done, kl_coef, history, [])


def _kind(tensor):
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


# ---------------------------------------------------------------- put in place


def _put(trainer, state):
    """Change the trainer, and the random states of this process, to `state`."""
    named = _trained(trainer)
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(state.parameters[name])
    moments = {index: dict(state.adam[name]) for index, (name, _) in enumerate(named) if name in state.adam}
    groups = trainer.optimizer.state_dict()["param_groups"]
    groups = [group | dict(lr=rate) for group, rate in zip(groups, state.rates, strict=True)]
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    _set_random(state.random, trainer.generator.device, trainer.generator)
    trainer.steps_done, trainer.kl_coef, trainer.history = state.steps_done, state.kl_coef, state.history


def _set_random(states, device, generator=None):
    """Set this process's random states, and the trainer's `generator`. Without one this is a rehearsal on new generators, which
    raises what setting them would raise."""
    fresh = generator is None
    (generator or torch.Generator(device)).set_state(states["trainer"])
    torch.Generator().set_state(states["torch"]) if fresh else torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.Generator("cuda").set_state(states["cuda"]) if fresh else torch.cuda.set_rng_state(states["cuda"])
    python, (*words, place), gauss = states["python"].tolist(), states["numpy"].tolist(), states["gauss"].tolist()
    if not (0 <= place <= 624 and all(0 <= word < 2**32 for word in words + python)):
        raise ValueError("numpy's or Python's is out of range")
    if math.isinf(gauss[0]) or gauss[1] not in (0, 1) or not math.isfinite(gauss[2]):
        raise ValueError("the normal numbers in store are none")
    (random.Random() if fresh else random).setstate((3, tuple(python), None if math.isnan(gauss[0]) else gauss[0]))
    keep = np.random.RandomState() if fresh else np.random
    keep.set_state(("MT19937", np.array(words, dtype=np.uint32), place, int(gauss[1]), gauss[2]))


def _copy(tensors):
    """A dict of tensors, or of such dicts, copied."""
    return {name: _copy(value) if isinstance(value, dict) else value.detach().clone() for name, value in tensors.items()}
