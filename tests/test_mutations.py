"""The faults of tools/mutations.py: each can still be made, and some fast test catches each."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "mutations.py"
spec = importlib.util.spec_from_file_location("mutations", SCRIPT)
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=[fault.name for fault in mutations.FAULTS])
def test_a_fault_finds_its_place_once_and_the_file_still_compiles_with_every_name_known(fault):
    text = (mutations.ROOT / "rlhf_helpers" / fault.file).read_text(encoding="utf-8")
    faulty = mutations.broken(text, fault)
    assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(text))  # code changed, not a comment
    check = [sys.executable, "-m", "ruff", "check", "--quiet", "--select", "F821", "-"]  # a name that nobody made
    found = subprocess.run(check, input=faulty, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert set(fault.tests.split()) <= set(mutations.TESTS)


def test_a_fault_without_its_place_is_an_error():
    fault = mutations.FAULTS[0]
    for text in ("", fault.old * 2):
        with pytest.raises(ValueError, match=f"{fault.name}: .*expected once"):
            mutations.broken(text, fault)


def test_faults_have_names_of_their_own_and_test_files_exist():
    names = [fault.name for fault in mutations.FAULTS]
    assert len(set(names)) == len(names) >= 40
    assert all((mutations.ROOT / "tests" / f"test_{name}.py").is_file() for name in mutations.TESTS)


@pytest.mark.slow
def test_every_fault_is_caught():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    caught = re.findall(r"^\| .+ \| \w+\.py \| test_\w+\.py::test_.+ \| \d+ \|$", run.stdout, re.MULTILINE)
    assert len(caught) == len(mutations.FAULTS) >= 40
