"""The core beside the newest TRL, which has no PPO any more: all is well, and the bridge says what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A function that runs Python with the newest TRL before this environment's own packages; gives the finished process."""
    folder = tmp_path_factory.mktemp("newest")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(folder), "trl>=1.13"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the newest TRL cannot be fetched: {(done.stderr.strip().splitlines() or ['pip gave no reason'])[-1]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)

    return run


def test_the_bridge_says_its_sentence_and_no_more(python):
    done = python("-W", "ignore", "-c", "from rlhf_helpers import trl_bridge; print(trl_bridge.missing())")
    sentence = r"TRL 1\.\d\d+\.\d+ has no PPOTrainer \(removed in 1\.13\); expected trl==1\.12\.0: pip install trl==1\.12\.0\n"
    assert re.fullmatch(sentence, done.stdout), done.stdout + done.stderr


def test_the_core_passes_its_tests_and_those_of_trls_ppo_are_skipped_with_that_sentence(python):
    done = python("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/test_trainer.py", "tests/test_trl_bridge.py")
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"SKIPPED.*TRL 1\.\d\d+\.\d+ has no PPOTrainer", done.stdout), done.stdout[-3000:]
