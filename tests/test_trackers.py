"""Trackers through Accelerate, without a network: what they kept is the history."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_helpers.errors import InputError
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import json, socket, sys
def refuse(self, address):
    assert address[0] in ("127.0.0.1", "localhost", "::1"), f"asked for {address}"
    return connect(self, address)
connect, socket.socket.connect = socket.socket.connect, refuse
from rlhf_helpers.quirks import leave_processes
from tests import tiny
for tracker in sys.argv[1:]:
    trainer = tiny.trainer(tiny.with_lora(tiny.llama()), log_with=tracker)
    for seed in range(2):
        queries, _, scores = tiny.batch(seed=seed)
        trainer.step(queries, trainer.generate(queries), scores)
    leave_processes(trainer)
    print(json.dumps(trainer.history))
"""
needs = lambda module: pytest.importorskip(module, reason=f"no {module}: pip install -e .[tracking]")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(folder, {tracker: its history}): two steps that each tracker watched, as far as it is installed; all is written in the folder."""
    home = tmp_path_factory.mktemp("trackers")
    trackers = [name for name in ("tensorboard", "trackio") if importlib.util.find_spec(name)]
    folders = dict(RLHF_HOME=str(home), HOME=str(home), TRACKIO_DIR=str(home / "trackio"), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-W", "ignore", "-c", RUN, *trackers]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **folders}, cwd=home)
    assert done.returncode == 0, done.stderr
    return home, dict(
        zip(trackers, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")], strict=True)
    )


def test_tensorboard_keeps_every_scalar_of_every_step(kept):
    accumulator = needs("tensorboard.backend.event_processing.event_accumulator")
    folder, history = kept[0], kept[1]["tensorboard"]
    events = accumulator.EventAccumulator(str(folder / "output" / "tracking" / "rlhf-ppo")).Reload()
    for key in history[0].keys() - {"step"}:
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in history], key


def test_trackio_keeps_every_scalar_of_every_step(kept):
    needs("trackio")
    rows = (
        sqlite3.connect(kept[0] / "trackio" / "rlhf-ppo.db")
        .execute("select step, metrics from metrics order by step")
        .fetchall()
    )
    assert [{"step": step, **json.loads(metrics)} for step, metrics in rows] == kept[1]["trackio"]


def test_a_tracker_that_is_not_installed_is_named():
    with pytest.raises(InputError, match="log_with is 'no_such_tracker'; expected a tracker that is installed"):
        tiny.trainer(tiny.with_lora(tiny.llama()), log_with="no_such_tracker")
