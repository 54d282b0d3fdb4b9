"""Several processes, started by `accelerate launch` on the CPU (gloo), as a user starts them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny, worker

# Without --multi_gpu, `accelerate launch` starts a single process where it sees no second GPU; with it, on a CPU, as many as
# asked. At port 0 it takes a free one.
LAUNCH = """-m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --main_process_port 0
    --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1"""


def launch(processes, *arguments, status=0, **environment):
    """The output of one process, or of two under `accelerate launch`; fails with it if the status is another one."""
    command = [sys.executable, *(LAUNCH.split() if processes == 2 else []), "-m", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ran = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, env=env)
    assert ran.returncode == status, ran.stdout
    return ran.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, output) of two processes that do all jobs of `tests.worker`, one after the other: starting takes longer than any."""
    folder = tmp_path_factory.mktemp("processes")
    return folder, launch(2, "tests.worker", str(folder), "update", "baseline", "resume", "shares", "unlucky", "left")


def test_two_processes_with_half_the_batch_each_make_the_update_of_one_with_the_whole(ran, tmp_path):
    folders = tmp_path, ran[0]
    worker.update(tmp_path)
    one, two = (load_file(folder / "weights") for folder in folders)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
    one, two = (torch.load(folder / "stats", weights_only=True) for folder in folders)
    assert two == pytest.approx(one, abs=1e-5, nan_ok=True)  # sampler_kl: the responses came from elsewhere


def test_the_batch_s_mean_and_the_sampler_s_kl_are_those_of_all_processes(ran, tmp_path):
    worker.baseline(tmp_path)
    one, two = (load_file(folder / "baseline") for folder in (tmp_path, ran[0]))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
    one, two = (json.loads((folder / "sampler_kl.json").read_text()) for folder in (tmp_path, ran[0]))
    lengths = list(map(len, tiny.batch(4, seed=0)[1]))
    assert one == pytest.approx(two, rel=1e-4) == pytest.approx(sum(lengths) / 4 * (math.exp(-0.1) - 1 + 0.1), rel=1e-3)


def test_two_processes_resume_bitwise_each_with_its_own_random_state(ran):
    assert "process 0 of 2: resumed bitwise" in ran[1] and "process 1 of 2: resumed bitwise" in ran[1]


def test_processes_share_the_prompts_and_draw_apart_and_one_held_out_prompt_is_enough_for_two(ran):
    first, second = (json.loads((ran[0] / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == second["steps"] == 12 // (2 * 2), (
        "one pass over the prompts, by default, of all processes together"
    )
    assert len(set(first["seen"] + second["seen"])) == 12 and first["drawn"] != second["drawn"]
    assert first["judged"] == second["judged"] == ["t4 t5"] and first["texts"] == second["texts"]


def test_an_update_that_one_process_cannot_make_is_made_by_none(ran):
    assert "process 0: skipped 1" in ran[1] and "process 1: skipped 1" in ran[1]


linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux tells a process the names of its threads")


@linux
def test_processes_that_leave_leave_no_thread_behind(ran):
    assert ran[1].count("threads [], then []") == 2


@linux
@pytest.mark.slow
def test_a_trainer_keeps_the_threads_of_its_processes_until_they_are_left():
    destroyed = launch(2, "tests.worker", "somewhere", "destroyed")
    assert destroyed.count("threads ['gloo") == destroyed.count("then []") == 2, "quirks.leave_processes can go"
