"""The campaign of faults: kills, a full disk, malformed files, damaged checkpoints, wrong settings, NaN. See tools/faults.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "faults.py"
ROWS = {"kills", "full disk", "files", "checkpoints", "settings", "nan"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("form", [[], pytest.param(["--long"], marks=pytest.mark.slow)], ids=["short", "long"])
def test_nothing_is_lost_and_every_mistake_gets_a_sentence(form):
    done = subprocess.run([sys.executable, SCRIPT, *form], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| ([a-z ]+) \| ([\d,]+) \| (.+) \| (\d+) \| \d+ \|$", done.stdout, re.MULTILINE)
    assert {name for name, *_ in rows if name != "campaign"} == ROWS and all(came for _, _, came, _ in rows)
    if form:
        counts = {name: int(count.replace(",", "")) for name, count, *_ in rows}
        assert counts["kills"] >= 200 and counts["files"] >= 10_000
        assert counts["checkpoints"] >= 1000 and counts["settings"] >= 1000
        assert counts["full disk"] >= 60 and counts["nan"] >= 280


def test_the_campaign_itself_notices_a_checkpoint_that_is_not_looked_at():
    """The table says so, and the status is 1."""
    broken = (
        "import runpy, sys, rlhf_helpers.checkpoint as c; c.check_manifest = lambda folder: None; sys.argv = sys.argv[1:]; "
    )
    code = broken + "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, SCRIPT, "--only", "checkpoints"], capture_output=True, text=True)
    assert done.returncode == 1 and "loaded without a word" in done.stdout, done.stdout + done.stderr
