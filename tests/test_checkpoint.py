"""Checkpoints: a run goes on bit for bit, anything else than a whole checkpoint of this model is refused."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.tiny import batch, same, state, with_lora

PROMPTS = [f"t{i} t{i + 1}" for i in range(10, 20)]
SETTINGS = dict(mini_batch_size=2, ppo_epochs=2, target=1.0, horizon=50.0)


def reward(prompts, responses):
    """A noisy reward, so that the random states matter."""
    return [len(r.split()) + random.random() + np.random.rand() + torch.rand(()).item() for r in responses]


def seed(n):
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)


def untimed(history):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in history]


@pytest.fixture
def saved(tmp_path):
    """A trainer after one step, and the folder that it was saved in."""
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.2), **SETTINGS)
    trainer.step(*batch())
    trainer.save(tmp_path / "checkpoint")
    return trainer, tmp_path / "checkpoint"


@pytest.mark.parametrize("kind", ["lora", "full", "nf4"])
def test_two_steps_and_two_after_resuming_are_four_steps_bit_for_bit(kind, nf4, tmp_path):
    make = {"lora": lambda: with_lora(tiny.llama()), "full": tiny.llama, "nf4": nf4}[kind]
    whole = tiny.trainer(make(), **SETTINGS)
    seed(0)
    whole.train(PROMPTS, reward, steps=4)

    first = tiny.trainer(make(), **SETTINGS)
    seed(0)
    first.train(PROMPTS, reward, steps=2)
    first.save(tmp_path / "checkpoint")
    seed(99)
    second = tiny.trainer(make(), **SETTINGS)
    second.resume(tmp_path / "checkpoint")
    second.train(PROMPTS, reward, steps=2)
    assert same(state(second), state(whole))
    assert untimed(second.history) == untimed(whole.history)


def test_saving_changes_nothing_and_random_numbers_go_on(saved):
    trainer, folder = saved
    before, numbers = state(trainer), (random.getstate(), torch.get_rng_state())
    trainer.save(folder)
    assert same(state(trainer), before)
    assert random.getstate() == numbers[0] and torch.equal(torch.get_rng_state(), numbers[1])


def test_plain_peft_loads_the_adapters_and_says_the_same(saved):
    trainer, folder = saved
    loaded = PeftModel.from_pretrained(tiny.llama(), folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, trainer.model.pretrained_model(ids).logits)


def test_the_value_head_lies_where_trl_looks_for_it(saved):
    trainer, folder = saved
    head = load_file(folder / "model.safetensors")
    assert head.keys() == {"v_head.summary.weight", "v_head.summary.bias"}
    assert torch.equal(head["v_head.summary.weight"], trainer.model.v_head.summary.weight)


def edit_json(folder, change):
    about = json.loads((folder / "trainer.json").read_text())
    change(about)
    (folder / "trainer.json").write_text(json.dumps(about))


def edit_tensors(folder, change):
    tensors = load_file(folder / "trainer.safetensors")
    change(tensors)
    save_file(tensors, folder / "trainer.safetensors")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def adapter(tensors):
    return next(name for name in tensors if name.startswith("param.") and "lora_B" in name)


DAMAGE = {
    "trainer.json cut short": lambda f: cut(f / "trainer.json"),
    "trainer.json missing": lambda f: (f / "trainer.json").unlink(),
    "trainer.json is a list": lambda f: (f / "trainer.json").write_text("[1, 2]"),
    "no kl_coef": lambda f: edit_json(f, lambda about: about.pop("kl_coef")),
    "no version": lambda f: edit_json(f, lambda about: about.pop("version")),
    "no python_random": lambda f: edit_json(f, lambda about: about.pop("python_random")),
    "another version": lambda f: edit_json(f, lambda about: about.update(version=99)),
    "another number of processes": lambda f: edit_json(f, lambda about: about.update(num_processes=4)),
    "tensors cut short": lambda f: cut(f / "trainer.safetensors"),
    "tensors missing": lambda f: (f / "trainer.safetensors").unlink(),
    "an adapter missing": lambda f: edit_tensors(f, lambda t: t.pop(adapter(t))),
    "an adapter too many": lambda f: edit_tensors(f, lambda t: t.update({"param.more": torch.zeros(1)})),
    "an adapter of another shape": lambda f: edit_tensors(f, lambda t: t.update({adapter(t): torch.zeros(3, 3)})),
    "no random state": lambda f: edit_tensors(f, lambda t: t.pop("random.trainer.0")),
    "history cut short": lambda f: cut(f / "history.jsonl"),
    "history missing": lambda f: (f / "history.jsonl").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_nothing_changes(damage, saved):
    _, folder = saved
    DAMAGE[damage](folder)
    trainer = tiny.trainer(**SETTINGS)
    trainer.step(*batch(seed=5))
    before, history = state(trainer), list(trainer.history)
    numbers = trainer.generator.get_state(), torch.get_rng_state(), random.getstate()
    with pytest.raises(ValueError) as error:
        trainer.resume(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
    assert same(state(trainer), before) and trainer.history == history
    now = trainer.generator.get_state(), torch.get_rng_state(), random.getstate()
    assert torch.equal(now[0], numbers[0]) and torch.equal(now[1], numbers[1]) and now[2] == numbers[2]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="no checkpoint here"):
            tiny.trainer().resume(folder)


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_save_killed_at_either_rename_leaves_a_whole_checkpoint(killed_at, saved, monkeypatch):
    trainer, folder = saved
    before = state(trainer)
    trainer.step(*batch(seed=1))
    renames, rename = [], Path.rename

    def killed(path, target):
        if path.parent != folder.parent:
            return rename(path, target)
        renames.append(path)
        if len(renames) == killed_at:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.save(folder)
    resumed = tiny.trainer(**SETTINGS)
    resumed.resume(folder)
    assert same(state(resumed), before)
    trainer.save(folder)  # and the next save cleans up
    resumed.resume(folder)
    assert same(state(resumed), state(trainer))
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_save_killed_while_writing_leaves_the_old_checkpoint(saved, monkeypatch):
    trainer, folder = saved
    before = state(trainer)
    trainer.step(*batch(seed=1))
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_helpers.checkpoint.save_jsonl", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            trainer.save(folder)
    resumed = tiny.trainer(**SETTINGS)
    resumed.resume(folder)
    assert same(state(resumed), before)
