"""Set-up: one list of dependencies, pins that repeat it, and an environment file that points to both."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def pip_section():
    (section,) = (entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    return section


def name_of(requirement):
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0]


def test_every_dependency_is_pinned():
    listed = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    assert [r for r in listed if name_of(r) not in PINS] == []


def test_the_trl_extra_is_the_last_release_with_ppo():
    assert PROJECT["optional-dependencies"]["trl"] == ["trl==1.12.0"] and PINS["trl"] == "1.12.0"


def test_the_pins_name_no_build_of_torch_and_no_cuda_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+", PINS["torch"])
    assert not [name for name in PINS if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_environment_file_lists_no_dependency_of_its_own():
    conda = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip"}
    assert pip_section() == ["-c constraints.txt", "-e .[lab,test,trl]"]
    assert {"lab", "test", "trl"} <= PROJECT["optional-dependencies"].keys()


def test_every_make_command_of_the_readme_exists():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE))
    assert {"run", "test", "lab", "test-all"} <= commands
    assert [command for command in commands if not re.search(rf"^{command}:", makefile, re.MULTILINE)] == []


def test_ci_calls_the_test_command_of_the_readme_and_that_calls_ruff_first():
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^test: lint\b", makefile, re.MULTILINE)
    (lint,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert re.findall(r"-m (ruff .*)", lint) == ["ruff check", "ruff format --check"]


def test_no_test_measures_time_or_waits_for_it_to_pass():
    """But for the browser's, which ask again and again until the page is ready."""
    clocks = r"\b(?:sleep|perf_counter|monotonic|process_time|time)\(\)|\bsleep\("
    found = {file.name for file in (ROOT / "tests").glob("*.py") if re.search(clocks, file.read_text(encoding="utf-8"))}
    assert found <= {"test_browser.py"}


def test_every_script_finds_what_it_imports():
    scripts = [str(path) for folder in ("tools", "data", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    code = "import runpy, sys; [runpy.run_path(path, run_name='imported') for path in sys.argv[1:]]"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(scripts) > 8, done.stderr


@pytest.mark.slow
def test_the_pip_section_of_the_environment_file_installs(tmp_path):
    """What conda would run: pip, from the environment file's folder, on the lines of its pip section."""
    copy = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (copy / "requirements.txt").write_text("\n".join(pip_section()))
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "requirements.txt"]
    subprocess.run(install, cwd=copy, check=True)
    code = "import importlib.metadata as m, rlhf_helpers.trainer, nbval, jupyterlab; print(m.version('transformers'))"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == PINS["transformers"]


def test_the_prompts_are_in_three_sets_over_16_subjects_and_pairs_keep_to_theirs():
    from rlhf_helpers.data import load_preferences, load_prompts, read_jsonl

    files = {split: ROOT / "data" / f"prompts_{split}.jsonl" for split in ("train", "heldout", "test")}
    prompts = {split: set(load_prompts(file)) for split, file in files.items()}
    assert {split: len(some) for split, some in prompts.items()} == dict(train=244, heldout=60, test=120)
    assert len(set().union(*prompts.values())) == 424  # none in two sets
    assert all(len({row["subject"] for row in read_jsonl(file)}) == 16 for file in files.values())
    for split, name in dict(train="part_1", heldout="heldout", test="test").items():
        pairs = load_preferences(ROOT / "data" / f"pairwise_prefs_{name}.jsonl")
        assert {pair["prompt"] for pair in pairs} <= prompts[split] and len(pairs) >= 190
        assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


def test_no_subject_of_a_test_prompt_is_met_before():
    from rlhf_helpers.course.gold import subject_of
    from rlhf_helpers.data import load_prompts

    of = lambda split: [subject_of(prompt) for prompt in load_prompts(ROOT / "data" / f"prompts_{split}.jsonl")]
    before = set().union(*of("train"), *of("heldout"))
    assert [subject for subject in of("test") if subject & before] == []


def test_only_the_last_evaluation_of_an_experiment_opens_the_test_prompts():
    """Recipes that were tuned on them would be judged by what they were tuned on."""
    may = {
        "data/make_preferences.py",  # samples base answers to them, for the pairs that judge the reward model
        "data/make_runs.py",  # the last evaluation of a run
        "rlhf_helpers/config.py",  # names the file
        "rlhf_helpers/course/runs.py",  # names it for the last evaluation of a run, and for reading what was written
        "tools/reward_on_test_pairs.py",  # prints how the reward model ranks those pairs
        "notebooks/06_trl_and_scaling.ipynb",  # names a file of pairs in braces: the training and the dev ones
        "tests/test_experiments.py",  # counts what the logs have, and asks what that tool prints
        "tests/test_capstone.py",  # sees that a learner labels none of them
        "tests/test_compare.py",  # writes two prompts of its own under this name, in a folder of its own
        "tests/test_gold.py",
        "tests/test_setup.py",
    }
    files = [file for end in ("py", "ipynb", "md") for file in ROOT.rglob(f"*.{end}")]
    files = [file for file in files if not {".venv", "output", "build"} & set(file.relative_to(ROOT).parts)]
    names = re.compile(r"prompts_test|TEST_FILE|prompts_\{|\bSPLITS\b|pairwise_prefs_(?:test|\{)")
    opened = {str(file.relative_to(ROOT)) for file in files if names.search(file.read_text(encoding="utf-8"))}
    assert {file for file in opened if not file.endswith(".md")} <= may


def test_every_test_that_the_table_of_requirements_names_exists():
    table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", table, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 31))
    assert all("::test_" in tests for _, tests in rows)
    missing = []
    for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", table):
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        if not re.search(rf"^def {test}\(", source, re.MULTILINE):
            missing.append(f"{file}::{test}")
    assert missing == [] and table.count("::") == len(re.findall(r"`test_\w+\.py::test_\w+`", table))


@pytest.mark.parametrize("asked, seen", [([], ""), (["-m", "cuda"], "0")], ids=["make test", "-m cuda"])
def test_a_card_is_hidden_from_all_tests_but_those_for_a_card(asked, seen):
    """Their numbers are the CPU's, also where there is a card."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_setup.py", *asked, "-p", "tests.tell_cards"]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True)
    assert f"cards to be seen: {seen!r}" in ran.stdout, ran.stdout + ran.stderr
