"""The course on a pretended card: every tensor is where a GPU needs it, in the trainer, the script and all notebooks."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_helpers.data import save_jsonl
from rlhf_helpers.reward import ensure_reward_model
from tests.pretend_cuda import PretendedCard, with_gpu_profile
from tests.test_profiles import AT_ONCE, PAGES, WORD

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
MADE_ONCE = ("models", "reward_model_pairwise")  # of output/


# ---------------------------------------------------------------- the pretended card itself


def test_what_is_on_the_card_stays_there_until_it_is_copied_back():
    with PretendedCard():
        made = [
            torch.ones(2, 3, device="cuda"),
            torch.ones(2, 3).to("cuda"),
            torch.ones(2, 3).cuda(),
            torch.tensor([[1.0]], device="cuda:0"),
        ]
        made += [made[0] * 2, made[0][1], made[0].sum(), made[0].bfloat16(), torch.zeros_like(made[0]), copy.deepcopy(made[0])]
        with torch.device("cuda"):
            made.append(torch.arange(3))
        assert all(tensor.is_cuda and tensor.device == torch.device("cuda", 0) for tensor in made)
        back = made[0].cpu()
        assert back.device.type == "cpu" and made[0].is_cuda and (back + torch.ones(2, 3)).device.type == "cpu"
    assert torch.ones(1).device.type == "cpu" and not torch.cuda.is_available()


def test_a_gradient_lies_where_its_parameter_lies():
    with PretendedCard():
        layer = torch.nn.Linear(3, 1).to("cuda")
        layer(torch.ones(2, 3, device="cuda")).sum().backward()
        assert layer.weight.is_cuda and layer.weight.grad.is_cuda and layer.weight.grad.tolist() == [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize(
    "mistake, error",
    [
        (lambda x: x + torch.ones(3), "same device"),
        (lambda x: torch.cat([x, torch.ones(3)]), "same device"),
        (lambda x: torch.nn.Embedding(5, 2).to("cuda")(torch.tensor([1])), "same device"),
        (lambda x: torch.ones(3)[x.long()], "same device"),
        (lambda x: x.numpy(), "to numpy"),
        (lambda x: np.asarray(x, dtype=float), "to numpy"),
    ],
    ids=["a sum", "a list", "ids on the CPU", "an index on the card", "numpy", "array"],
)
def test_what_a_card_refuses_is_refused(mistake, error):
    with PretendedCard(), pytest.raises((RuntimeError, TypeError), match=error):
        mistake(torch.ones(3, device="cuda"))


def test_what_a_card_allows_is_allowed():
    with PretendedCard():
        x = torch.arange(4.0).to("cuda")
        assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]  # a single number
        assert x[torch.tensor([3, 0])].tolist() == [3, 0] and x[torch.tensor([3, 0])].is_cuda  # an index
        x.copy_(torch.ones(4))
        assert x.tolist() == [1] * 4 and x.is_cuda


# ---------------------------------------------------------------- the course on it


def on_the_card(*arguments, **variables):
    """Run `python -m tests.pretend_cuda`; what it printed, if all went well."""
    environment = {**os.environ, "RLHF_FAST": "1", **variables}
    command = [sys.executable, "-W", "ignore", "-m", "tests.pretend_cuda", *map(str, arguments)]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def test_the_trainer_trains_on_the_card(llama_folder, tmp_path):
    code = f"""
from rlhf_helpers.course import inspector
from tests import test_cuda
trainer = test_cuda.make_trainer({str(llama_folder)!r})
queries, responses, scores = test_cuda.tiny.batch()
stats = trainer.step(queries, trainer.generate(queries), scores)
rows = inspector.frame(trainer.rollout, trainer.tokenizer)["rows"]
print(len(rows), trainer.rollout.advantages.device, stats["ppo/policy/first_ratio_error"], stats["objective/kl"])
"""
    (tmp_path / "one_step.py").write_text(code, encoding="utf-8")
    assert on_the_card("one_step", PYTHONPATH=str(tmp_path)).split()[-4:] == ["4", "cuda:0", "0.0", "0.0"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["--old"]], ids=["bf16", "fp16"])
def test_the_tests_for_a_card_pass_on_a_pretended_one(kind):
    memory = (
        ["--deselect", "tests/test_cuda.py::test_the_card_holds_by_part_what_was_computed_and_no_second_model"] if kind else []
    )  # slow in fp16
    printed = on_the_card(*kind, "pytest", "-q", "tests/test_cuda.py", "-m", "cuda", *memory)
    assert f"{10 if kind else 11} passed" in printed and "skipped" not in printed and "failed" not in printed


@pytest.mark.slow
def test_the_script_runs_on_the_card(tmp_path):
    ensure_reward_model()
    save_jsonl(tmp_path / "heldout.jsonl", [{"prompt": "Tell me about tea."}, {"prompt": "Name a colour."}])
    short = "--steps 2 --batch_size 4 --mini_batch_size 2 --max_new_tokens 12".split()
    printed = on_the_card("rlhf_helpers", *short, "--heldout", tmp_path / "heldout.jsonl", "--output", tmp_path / "run")
    assert "step   2/2" in printed and (tmp_path / "run" / "checkpoint" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_benchmark_of_the_7b_model_runs_on_the_card_small_and_beside_trl():
    sizes = "--layers 1 --hidden 128 --steps 2 --prompt-tokens 6 --new-tokens 4"
    printed = on_the_card("benchmarks.memory_7b", *sizes.split(), "--cap", 12, "--trl")
    assert printed.count("  ok  ") == 12 and printed.count("seconds a step, TRL") == 2 and "capped at 12 GB" in printed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The repository's data and models with an output folder of its own: the notebooks may run as tests at the same time."""
    ensure_reward_model()
    home = tmp_path_factory.mktemp("home")
    (home / "output").mkdir()
    (home / "data").symlink_to(ROOT / "data")
    for name in MADE_ONCE:
        (home / "output" / name).symlink_to(ROOT / "output" / name)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_run_on_the_card(notebook, home):
    on_the_card(notebook, RLHF_HOME=str(home))


IN_FP16 = ("01", "04", "08")  # as on a T4


@pytest.mark.slow
@pytest.mark.parametrize(
    "notebook, kind",
    [
        pytest.param(page, kind, id=f"{page.stem}-{'fp16' if kind else 'bf16'}")
        for kind in ([], ["--old"])
        for page in PAGES
        if not kind or page.name.startswith(IN_FP16)
    ],
)
def test_the_notebooks_run_on_the_card_with_the_gpu_profile(notebook, kind, mistral_folder, home):
    printed = on_the_card(*kind, "--profile", mistral_folder, notebook, RLHF_HOME=str(home))
    assert f"language models at once: {AT_ONCE[notebook.name[:2]]}\n" in printed


def test_the_gpu_profile_takes_the_place_of_the_word_and_of_nothing_else(tmp_path):
    page = ["import torch", f"from rlhf_helpers.config import CPU, GPU\n{WORD}\nnext", "profile is CPU"]
    first, second, third = with_gpu_profile(page, tmp_path)
    names = {}
    exec(second.replace("next", ""), names)
    assert (first, third) == (page[0], page[2]) and second.endswith("\nnext")
    assert names["profile"].name == "gpu" and names["profile"].model == str(tmp_path)
    for wrong in (page[:1], page + page[1:2]):
        with pytest.raises(SystemExit, match="expected one line 'profile = CPU'"):
            with_gpu_profile(wrong, tmp_path)
