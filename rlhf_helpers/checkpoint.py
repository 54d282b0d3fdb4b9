"""A checkpoint is one folder, written beside its place and renamed, so that a kill at any moment leaves a whole one.

adapter_model.safetensors, adapter_config.json   the LoRA adapters as PEFT writes them
model.safetensors                                the value head as v_head.*, where TRL's value-head model looks for it
trainer.safetensors                              every trainable tensor, Adam's state, random states
trainer.json, history.jsonl                      step, KL coefficient, settings; the stats of every step"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf_helpers.data import read_jsonl, save_jsonl

VERSION = 1


def save_checkpoint(trainer, folder):
    """Write the trainer's whole state to `folder`. Every process calls it, the main one writes."""
    generators = gather_object([trainer.generator.get_state()])  # each process samples with its own
    if not trainer.accelerator.is_main_process:
        return
    folder = Path(folder)
    beside, old = (folder.with_name(folder.name + ending) for ending in (".part", ".old"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if trainer.model.has_adapters:
        trainer.model.pretrained_model.save_pretrained(beside)
    head = {f"v_head.{name}": tensor.detach().cpu().contiguous() for name, tensor in trainer.model.v_head.state_dict().items()}
    save_file(head, beside / "model.safetensors", metadata={"format": "pt"})
    tensors = tensors_of(trainer) | {f"random.trainer.{rank}": state for rank, state in enumerate(generators)}
    save_file(tensors, beside / "trainer.safetensors", metadata={"format": "pt"})
    version, state, gauss = random.getstate()
    numpy_gauss = np.random.get_state()[3:]
    about = dict(
        version=VERSION,
        steps_done=trainer.steps_done,
        kl_coef=trainer.kl_coef,
        num_processes=trainer.accelerator.num_processes,
        config=vars(trainer.config),
        python_random=[version, list(state), gauss],
        numpy_gauss=list(numpy_gauss),
    )
    save_jsonl(beside / "history.jsonl", trainer.history)
    (beside / "trainer.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(trainer, folder):
    """Bring the trainer to the state in `folder`. Everything is read and checked before anything is changed."""
    folder = Path(folder)
    if not folder.exists() and folder.with_name(folder.name + ".old").exists():
        folder = folder.with_name(folder.name + ".old")  # a save was killed between its two renames
    if not (folder / "trainer.json").is_file():
        raise ValueError(f"{folder}: no checkpoint here; expected a folder made by PPOTrainer.save, with trainer.json")
    try:
        about = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "trainer.safetensors")
        version, processes, steps_done, kl_coef, random_state, numpy_gauss = (
            about[name] for name in ("version", "num_processes", "steps_done", "kl_coef", "python_random", "numpy_gauss")
        )
        generators = [tensors[f"random.trainer.{rank}"] for rank in range(processes)]
        history = read_jsonl(folder / "history.jsonl") if steps_done else []
        python_state = (random_state[0], tuple(random_state[1]), random_state[2])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged checkpoint: {str(error).splitlines()[0]}") from error
    if version != VERSION:
        raise ValueError(f"{folder}: checkpoint of version {version}; expected {VERSION}")
    if processes != trainer.accelerator.num_processes:
        raise ValueError(
            f"{folder}: written by {processes} processes, resumed by {trainer.accelerator.num_processes}; expected as many: each "
            f"has its own random state (accelerate launch --num_processes {processes} ...)"
        )
    expected = tensors_of(trainer, with_adam=False)
    for name, tensor in expected.items():
        if name != "random.cuda" and (name not in tensors or tensors[name].shape != tensor.shape):
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise ValueError(f"{folder}: tensor {name} is {found}; expected {tuple(tensor.shape)}: another model's checkpoint?")
    extra = [name for name in tensors if name.startswith("param.") and name not in expected]
    if extra:
        raise ValueError(f"{folder}: tensor {extra[0]} belongs to no trainable parameter here: another model's checkpoint?")
    for name, tensor in tensors.items():
        kind, _, parameter = name.partition(".")[2].partition(".") if name.startswith("adam.") else ("", "", "")
        if kind.startswith("exp_avg") and tensor.shape != expected[f"param.{parameter}"].shape:
            raise ValueError(f"{folder}: tensor {name} is {tuple(tensor.shape)}; expected {tuple(expected[f'param.{parameter}'].shape)}")

    state = {}
    with torch.no_grad():
        for index, (name, parameter) in enumerate(trained(trainer)):
            parameter.copy_(tensors[f"param.{name}"])
            moments = {key: tensors[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors}
            if moments:
                state[index] = moments
    trainer.optimizer.load_state_dict({"state": state, "param_groups": trainer.optimizer.state_dict()["param_groups"]})
    trainer.generator.set_state(generators[trainer.accelerator.process_index])
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    numpy_state = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", numpy_state[:-1], int(numpy_state[-1]), *numpy_gauss))
    random.setstate(python_state)
    trainer.steps_done, trainer.kl_coef, trainer.history = steps_done, kl_coef, history


def trained(trainer):
    """(name, parameter) of everything the optimizer moves, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [(names[id(parameter)], parameter) for parameter in trainer.parameters]


def tensors_of(trainer, with_adam=True):
    """All tensors of a checkpoint's trainer.safetensors, by name."""
    tensors = {f"param.{name}": parameter.detach().cpu().contiguous() for name, parameter in trained(trainer)}
    if with_adam:
        state = trainer.optimizer.state_dict()["state"]
        for index, (name, _) in enumerate(trained(trainer)):
            tensors |= {f"adam.{key}.{name}": value.detach().cpu().contiguous() for key, value in state.get(index, {}).items()}
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    _, keys, position, _, _ = np.random.get_state()
    tensors["random.numpy"] = torch.from_numpy(np.append(keys, position).astype(np.int64))
    return tensors
