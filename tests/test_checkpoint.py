"""Checkpoints: a run goes on bit for bit, anything else than a whole checkpoint of this model is refused."""

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rlhf_helpers.checkpoint import load_checkpoint, read_settings, save_checkpoint
from rlhf_helpers.config import PPO_FIELDS
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import NotWritten, aside, write_manifest
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


def about(**changes):
    return lambda f: edit_json(f, lambda found: found.update(changes))


def config(**changes):
    return lambda f: edit_json(f, lambda found: found["config"].update(changes))


def tensor(name, change):
    """Put `change` of a tensor in its place; `name` may end with a star."""

    def work(tensors):
        found = next(each for each in tensors if each.startswith(name.rstrip("*")))
        tensors[found] = change(tensors[found])

    return lambda f: edit_tensors(f, work)


def put(place, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[place] = value
        return tensor

    return change


def history(change):
    def work(f):
        rows = [json.loads(line) for line in (f / "history.jsonl").read_text().splitlines()]
        changed = change(rows)
        rows = changed if isinstance(changed, list) else rows
        (f / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return work


DAMAGE = {
    "trainer.json cut short": lambda f: cut(f / "trainer.json"),
    "trainer.json missing": lambda f: (f / "trainer.json").unlink(),
    "trainer.json is a list": lambda f: (f / "trainer.json").write_text("[1, 2]"),
    "trainer.json is a number": lambda f: (f / "trainer.json").write_text("7"),
    "trainer.json is bytes": lambda f: (f / "trainer.json").write_bytes(b"\xff\xfe"),
    "trainer.json of 3,000 brackets": lambda f: (f / "trainer.json").write_text("[" * 3000 + "]" * 3000),
    "trainer.json of 5,000 digits": lambda f: (f / "trainer.json").write_text("9" * 5000),
    "no kl_coef": lambda f: edit_json(f, lambda found: found.pop("kl_coef")),
    "no version": lambda f: edit_json(f, lambda found: found.pop("version")),
    "no config": lambda f: edit_json(f, lambda found: found.pop("config")),
    "no extra": lambda f: edit_json(f, lambda found: found.pop("extra")),
    "the former version": about(version=1),
    "a version that is a switch": about(version=True),
    "another number of processes": about(num_processes=4),
    "no processes": about(num_processes=0),
    "a list of processes": about(num_processes=[1]),
    "steps_done below 0": about(steps_done=-1),
    "steps_done is a fraction": about(steps_done=1.0),
    "steps_done is a string": about(steps_done="1"),
    "steps_done is a switch": about(steps_done=True),
    "steps_done is huge": about(steps_done=10**400),
    "a learning rate is below 0": about(learning_rates=[-0.1, 0.1]),
    "a learning rate is infinite": about(learning_rates=[0.1, math.inf]),
    "there is one learning rate": about(learning_rates=[0.1]),
    "the learning rates are a number": about(learning_rates=0.1),
    "kl_coef is not a number": about(kl_coef=math.nan),
    "kl_coef is infinite": about(kl_coef=math.inf),
    "kl_coef is huge": about(kl_coef=10**400),
    "kl_coef is below 0": about(kl_coef=-0.1),
    "kl_coef is a string": about(kl_coef="0.2"),
    "kl_coef is None": about(kl_coef=None),
    "extra is a list": about(extra=[]),
    "config is a list": about(config=[1]),
    "config lacks a field": lambda f: edit_json(f, lambda found: found["config"].pop("seed")),
    "config has a field too many": config(momentum=0.9),
    "config has a wrong type": config(seed="0"),
    "config has a huge number": config(batch_size=10**400),
    "tensors cut short": lambda f: cut(f / "trainer.safetensors"),
    "tensors missing": lambda f: (f / "trainer.safetensors").unlink(),
    "tensors empty": lambda f: (f / "trainer.safetensors").write_bytes(b""),
    "tensors of zeros": lambda f: (f / "trainer.safetensors").write_bytes(bytes(1000)),
    "tensors with a header of brackets": lambda f: (f / "trainer.safetensors").write_bytes(
        (3000).to_bytes(8, "little") + b"[" * 3000
    ),
    "an adapter missing": lambda f: edit_tensors(f, lambda t: t.pop(adapter(t))),
    "an adapter too many": lambda f: edit_tensors(f, lambda t: t.update({"param.more": torch.zeros(1)})),
    "an adapter of another shape": lambda f: edit_tensors(f, lambda t: t.update({adapter(t): torch.zeros(3, 3)})),
    "an adapter of another dtype": lambda f: edit_tensors(f, lambda t: t.update({adapter(t): t[adapter(t)].double()})),
    "an adapter that is not finite": tensor("param.*", put(0, math.nan)),
    "Adam's state of another dtype": tensor("adam.exp_avg.*", lambda t: t.half()),
    "Adam's state of another shape": tensor("adam.exp_avg_sq.*", lambda t: t[:1]),
    "Adam's state below 0": tensor("adam.exp_avg_sq.*", put(0, -1.0)),
    "Adam's state not finite": tensor("adam.exp_avg.*", put(0, math.inf)),
    "Adam's steps in a row": tensor("adam.step.*", lambda t: t.reshape(1)),
    "Adam's steps as whole numbers": tensor("adam.step.*", lambda t: t.long()),
    "half of Adam's state missing": lambda f: edit_tensors(
        f, lambda t: t.pop(next(n for n in t if n.startswith("adam.exp_avg.")))
    ),
    "Adam's state of another kind": lambda f: edit_tensors(f, lambda t: t.update({"adam.exp_avg.more": torch.zeros(1)})),
    "no random state": lambda f: edit_tensors(f, lambda t: t.pop("random.trainer.0")),
    "no random state of numpy": lambda f: edit_tensors(f, lambda t: t.pop("random.numpy.0")),
    "a random state too many": lambda f: edit_tensors(f, lambda t: t.update({"random.torch.1": t["random.torch.0"].clone()})),
    "the trainer's random state of another dtype": tensor("random.trainer.0", lambda t: t.long()),
    "the trainer's random state cut short": tensor("random.trainer.0", lambda t: t[:-8]),
    "torch's random state of ones": tensor("random.torch.0", lambda t: torch.full_like(t, 255)),
    "torch's random state of another shape": tensor("random.torch.0", lambda t: t[None]),
    "numpy's random state below 0": tensor("random.numpy.0", put(3, -1)),
    "numpy's random state beyond 32 bits": tensor("random.numpy.0", put(3, 2**32)),
    "numpy's place beyond its words": tensor("random.numpy.0", put(-1, 625)),
    "numpy's store is no number": tensor("random.gauss.0", put(2, math.nan)),
    "numpy's store is 2": tensor("random.gauss.0", put(1, 2.0)),
    "Python's random state below 0": tensor("random.python.0", put(3, -1)),
    "Python's random state beyond 32 bits": tensor("random.python.0", put(3, 2**40)),
    "Python's place beyond its words": tensor("random.python.0", put(-1, 10_000)),
    "Python's store is infinite": tensor("random.gauss.0", put(0, math.inf)),
    "history cut short": lambda f: cut(f / "history.jsonl"),
    "history missing": lambda f: (f / "history.jsonl").unlink(),
    "history of more steps than were done": history(lambda rows: rows * 2),
    "history of a step that was not done": history(lambda rows: rows[0].update(step=2)),
    "history without steps": history(lambda rows: rows[0].pop("step")),
    "history of a step that is a string": history(lambda rows: rows[0].update(step="1")),
    "history without KL": history(lambda rows: rows[0].pop("objective/kl")),
    "history of strings": history(lambda rows: rows[0].update({"objective/kl": "1"})),
    "history of a switch": history(lambda rows: rows[0].update({"objective/kl": True})),
    "history of a number beyond all floats": history(lambda rows: rows[0].update({"objective/kl": 10**400})),
    "history of lists": history(lambda rows: [[1]]),
    "history of 3,000 brackets": lambda f: (f / "history.jsonl").write_text("[" * 3000),
    "history is bytes": lambda f: (f / "history.jsonl").write_bytes(b"\xff"),
}


def all_numbers(trainer):
    """Every random state that a checkpoint holds, in a form that compares."""
    numpy_state = np.random.get_state()
    return (
        trainer.generator.get_state().tolist(), torch.get_rng_state().tolist(), random.getstate(),
        numpy_state[1].tolist(), numpy_state[2:],
    )  # fmt: skip


@pytest.fixture(scope="module")
def other():
    """A trainer that has gone another way, and what it must still be after a refusal."""
    trainer = tiny.trainer(**SETTINGS)
    trainer.step(*batch(seed=5))
    return trainer, state(trainer), list(trainer.history)


def assert_refused(trainer, folder, before, rows, **options):
    numbers = all_numbers(trainer)
    with pytest.raises(InputError) as error:
        load_checkpoint(trainer, folder, **options)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value) and "; expected" in str(error.value)
    assert len(str(error.value)) < len(str(folder)) + 400
    assert same(state(trainer), before) and trainer.history == rows and all_numbers(trainer) == numbers
    return str(error.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_nothing_changes(damage, saved, other):
    _, folder = saved
    trainer, before, rows = other
    DAMAGE[damage](folder)
    assert_refused(trainer, folder, before, rows)
    write_manifest(folder)  # the manifest agrees now
    assert_refused(trainer, folder, before, rows)
    if damage != "another number of processes":  # which a checkpoint may well say of itself
        assert_refused(trainer, folder, before, rows, strict=False)


FILES = ["adapter_model.safetensors", "adapter_config.json", "model.safetensors", "trainer.safetensors", "trainer.json",
         "history.jsonl", "manifest.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_refused(name, saved, other):
    folder, (trainer, before, rows) = saved[1], other
    whole = (folder / name).read_bytes()
    for place in np.random.default_rng(0).integers(len(whole), size=5).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (folder / name).write_bytes(flipped)
        if name == "manifest.json" and same_json(whole, flipped):
            continue
        assert_refused(trainer, folder, before, rows)


def same_json(first, second):
    """Whether two texts say the same: a flipped bit may turn one blank into another."""
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_file_of_another_checkpoint_a_missing_one_and_a_foreign_one_are_refused(name, saved, other, tmp_path):
    folder, (trainer, before, rows) = saved[1], other
    save_checkpoint(trainer, tmp_path / "other", extra={"another": "run"})
    whole, foreign = (folder / name).read_bytes(), (tmp_path / "other" / name).read_bytes()
    if name != "adapter_config.json":  # which is the same in both
        (folder / name).write_bytes(foreign)
        assert_refused(trainer, folder, before, rows)
    (folder / name).unlink()
    assert_refused(trainer, folder, before, rows)
    (folder / name).write_bytes(whole)
    (folder / "more").write_bytes(whole)
    assert_refused(trainer, folder, before, rows)


def test_a_load_that_fails_at_the_last_moment_puts_everything_back(saved, other, monkeypatch):
    trainer, before, rows = other
    numbers, setstate = all_numbers(trainer), np.random.set_state
    failures = []

    def failing(given):
        if not failures:
            failures.append(given)
            raise MemoryError
        return setstate(given)

    monkeypatch.setattr(np.random, "set_state", failing)
    with pytest.raises(MemoryError):
        trainer.resume(saved[1])
    assert failures and same(state(trainer), before) and trainer.history == rows and all_numbers(trainer) == numbers


# ---------------------------------------------------------------- settings


OTHERS = dict(horizon=60.0, batch_size=8, mini_batch_size=4, gradient_accumulation_steps=2, ppo_epochs=3, kl_penalty="abs", seed=1,
              gamma=0.9, lam=0.5, max_new_tokens=9, system="t9", num_generations=2)  # fmt: skip


def other_value(field, value):
    """Another value that the field may have."""
    return OTHERS.get(field.name, not value if isinstance(value, bool) else 0.5)


@pytest.mark.parametrize("field", PPO_FIELDS, ids=lambda field: field.name)
def test_settings_that_differ_are_named_with_both_values_unless_they_only_end_or_log_a_run(field, saved, other):
    first, folder = saved
    value = other_value(field, getattr(first.config, field.name))
    if field.name == "log_with":
        edit_json(folder, lambda found: found["config"].update(log_with="wandb"))
        write_manifest(folder)
        settings = {}
    else:
        settings = {field.name: value}
    trainer = tiny.trainer(with_lora(tiny.llama()), **SETTINGS | settings)
    if field.name in ("kl_budget", "log_with"):
        trainer.resume(folder)
        assert same(state(trainer), state(first))
        return
    there = getattr(first.config, field.name)
    message = assert_refused(trainer, folder, state(trainer), [])
    assert f"PPOConfig.{field.name} is {value!r} here and {there!r} in the checkpoint; expected the same" in message
    load_checkpoint(trainer, folder, strict=False)
    weights = lambda trainer: {name: tensor for name, tensor in state(trainer).items() if name != "kl_coef"}
    assert same(weights(trainer), weights(first))
    assert trainer.kl_coef == (
        value if field.name == "init_kl_coef" else first.kl_coef != trainer.config.init_kl_coef and first.kl_coef
    )
    if field.name == "learning_rate":
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {value}


def test_a_checkpoint_says_what_it_is_and_keeps_what_it_was_given(saved):
    trainer, folder = saved
    assert read_settings(folder)["extra"] == {}
    save_checkpoint(trainer, folder, extra={"model": "tiny", "before": [0.1, None]})
    told = read_settings(folder)
    assert told["extra"] == {"model": "tiny", "before": [0.1, None]} and told["config"] == vars(trainer.config)
    assert (told["steps_done"], told["kl_coef"], told["num_processes"]) == (1, trainer.kl_coef, 1)
    os.rename(folder, aside(folder))
    assert read_settings(folder) == told
    (aside(folder) / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter_config.json: 2 bytes; expected the"):
        read_settings(folder)


def test_what_json_cannot_keep_is_refused_and_the_last_checkpoint_stays(saved):
    trainer, folder = saved
    with pytest.raises(InputError, match="extra has something that JSON cannot keep"):
        save_checkpoint(trainer, folder, extra={"model": object()})
    assert read_settings(folder)["extra"] == {} and [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_trainer_that_has_made_no_step_is_kept_too(tmp_path):
    first, second = (tiny.trainer(with_lora(tiny.llama(), seed=n), **SETTINGS) for n in (0, 1))
    first.save(tmp_path / "checkpoint")
    second.resume(tmp_path / "checkpoint")
    assert same(state(first), state(second)) and second.history == []


def test_normal_numbers_in_store_go_on_where_they_were(tmp_path):
    trainer = tiny.trainer(**SETTINGS)
    random.gauss(0, 1), np.random.standard_normal()  # each keeps a second one
    trainer.save(tmp_path / "checkpoint")
    expected = [random.gauss(0, 1), np.random.standard_normal(), random.random(), np.random.rand(), torch.rand(()).item()]
    trainer.resume(tmp_path / "checkpoint")
    assert expected == [
        random.gauss(0, 1),
        np.random.standard_normal(),
        random.random(),
        np.random.rand(),
        torch.rand(()).item(),
    ]


def test_a_run_whose_sampler_is_exact_at_some_steps_goes_on_bit_for_bit_after_each(tmp_path):
    """In fp32 the sampler's log-probs are the trainer's at some steps and not at others, and only then take a pass's place."""
    rng = torch.Generator().manual_seed(3)
    words = lambda: torch.randint(4, 128, (int(torch.randint(2, 20, (1,), generator=rng)),), generator=rng).tolist()
    prompts = [" ".join(f"t{word}" for word in words()) for _ in range(40)]
    reward = lambda prompts, responses: [len(set(text.split())) / 8 for text in responses]
    whole, steps, exact = tiny.trainer(learning_rate=1e-3, seed=1), 8, []

    def keep(trainer, stats):
        exact.append(trainer.sampler_is_exact)
        trainer.save(tmp_path / str(trainer.steps_done))

    whole.train(prompts, reward, steps=steps, on_step=keep)
    assert True in exact[:-1] and False in exact[:-1]
    for done in range(1, steps):
        again = tiny.trainer(learning_rate=1e-3, seed=1)
        again.resume(tmp_path / str(done))
        assert again.sampler_is_exact == exact[done - 1]
        again.train(prompts, reward, steps=steps - done)
        assert same(state(whole), state(again)) and untimed(whole.history) == untimed(again.history), done
    other = tiny.trainer(learning_rate=1e-3, seed=1, mini_batch_size=1, gradient_accumulation_steps=4)
    for done in range(1, steps):
        other.resume(tmp_path / str(done), strict=False)
        assert not other.sampler_is_exact  # measured with minibatches of another size


def test_a_rate_that_was_changed_on_the_way_is_gone_on_with(tmp_path):
    whole, halve = tiny.trainer(learning_rate=0.01), lambda trainer, stats: trainer.optimizer.param_groups[0].update(lr=0.005)
    whole.train(PROMPTS, lambda prompts, responses: [0.0, 1.0, 0.0, 1.0], steps=1, on_step=halve)
    whole.save(tmp_path / "checkpoint")
    rates = lambda trainer: [group["lr"] for group in trainer.optimizer.param_groups]
    again = tiny.trainer(learning_rate=0.01)
    again.resume(tmp_path / "checkpoint")
    assert rates(again) == rates(whole) == [0.005, 0.01]
    other = tiny.trainer(learning_rate=0.02)
    other.resume(tmp_path / "checkpoint", strict=False)
    assert rates(other) == [0.02, 0.02]
    about = json.loads((tmp_path / "checkpoint" / "trainer.json").read_text())
    del about["learning_rates"]  # one from before there was such a field
    (tmp_path / "checkpoint" / "trainer.json").write_text(json.dumps(about))
    write_manifest(tmp_path / "checkpoint")
    again.resume(tmp_path / "checkpoint")
    assert rates(again) == [0.005, 0.01]


def test_the_tensors_of_a_resumed_trainer_are_its_own(saved):
    _, folder = saved
    trainer = tiny.trainer(**SETTINGS)
    trainer.resume(folder)
    before = state(trainer)
    for path in folder.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert same(state(trainer), before)


# ---------------------------------------------------------------- saves that fail


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("room", [100, 2000, 6000, 20_000])
def test_a_full_disk_while_saving_leaves_the_old_checkpoint_and_gives_one_sentence(room, saved):
    resource = pytest.importorskip("resource")
    trainer, folder = saved
    before = state(trainer)
    trainer.step(*batch(seed=1))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            trainer.save(folder)
        except NotWritten as error:
            status = 0 if str(error).startswith(f"{folder}: could not be written (File too large); ") else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    resumed = tiny.trainer(**SETTINGS)
    resumed.resume(folder)
    assert same(state(resumed), before) and [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no checkpoint here; expected"):
            tiny.trainer().resume(folder)


def test_of_a_run_s_folder_it_says_where_the_checkpoint_is(tmp_path):
    tiny.trainer().save(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"no checkpoint here \(.+checkpoint is one\); expected"):
        tiny.trainer().resume(tmp_path)


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


def test_adapters_that_are_merged_are_not_written_over(tmp_path):
    """Taken out again, the new ones would be subtracted where the old ones were added."""
    trainer = tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.3))
    trainer.save(tmp_path / "kept")
    trainer.model.pretrained_model.merge_adapter()
    before = tiny.state(trainer)
    with pytest.raises(InputError, match="the model's adapters are merged into its weights"):
        trainer.resume(tmp_path / "kept")
    assert tiny.same(before, tiny.state(trainer))


def test_what_somebody_put_into_a_checkpoint_is_kept_by_the_next_save(tmp_path):
    trainer, folder = tiny.trainer(), tmp_path / "kept"
    trainer.save(folder)
    names, others = (".git/HEAD", "notes.txt", "tokenizer/vocabulary.json"), tmp_path / "kept.others"
    for time in "first", "second":
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{time}: {name}")
        (folder / ".DS_Store").touch()
        with pytest.warns(UserWarning, match=r".git and 2 more: not of a save.*; moved to .*kept.others") as told:
            trainer.save(folder)
        assert len(told) == 1
    for name in names:
        first, *below = name.split("/")
        assert (others / name).read_text() == f"first: {name}"
        assert (others / f"{first}.1").joinpath(*below).read_text() == f"second: {name}"
    assert len([path for path in others.rglob("*") if path.is_file()]) == 6
    tiny.trainer().resume(folder)
