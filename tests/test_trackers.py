"""Trackers through Accelerate, without a network: what they kept is the history."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import json, socket, sys
def refuse(self, address):
    assert address[0] in ("127.0.0.1", "localhost", "::1"), f"asked for {address}"
    return connect(self, address)
connect, socket.socket.connect = socket.socket.connect, refuse
from rlhf_helpers.quirks import leave_processes
from tests import tiny
trainer = tiny.trainer(tiny.with_lora(tiny.llama()), log_with=sys.argv[1])
for seed in range(2):
    queries, _, scores = tiny.batch(seed=seed)
    trainer.step(queries, trainer.generate(queries), scores)
leave_processes(trainer)
print(json.dumps(trainer.history))
"""
needs = lambda module: pytest.importorskip(module, reason=f"no {module}: pip install -e .[tracking]")


def tracked(tracker, home):
    """The history of two steps that `tracker` watched; everything is written under `home`."""
    folders = dict(RLHF_HOME=str(home), HOME=str(home), TRACKIO_DIR=str(home / "trackio"), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-W", "ignore", "-c", RUN, tracker]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **folders}, cwd=home)
    assert done.returncode == 0, done.stderr
    (history,) = (line for line in done.stdout.splitlines() if line.startswith("["))
    return json.loads(history)


def test_tensorboard_keeps_every_scalar_of_every_step(tmp_path):
    accumulator = needs("tensorboard.backend.event_processing.event_accumulator")
    history = tracked("tensorboard", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "output" / "tracking" / "rlhf-ppo")).Reload()
    for key in history[0].keys() - {"step"}:
        kept = [(event.step, event.value) for event in events.Scalars(key)]
        assert kept == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in history], key


def test_trackio_keeps_every_scalar_of_every_step(tmp_path):
    needs("trackio")
    history = tracked("trackio", tmp_path)
    rows = (
        sqlite3.connect(tmp_path / "trackio" / "rlhf-ppo.db")
        .execute("select step, metrics from metrics order by step")
        .fetchall()
    )
    assert [{"step": step, **json.loads(metrics)} for step, metrics in rows] == history


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(AssertionError, match="no-such-tracker|no_such_tracker"):
        tracked("no_such_tracker", tmp_path)
