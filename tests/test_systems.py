"""Other systems, as far as they can be tried on one: what a system lacks is hidden from a process that makes a run; paths, encodings,
line ends, and how processes start."""

import ast
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import rlhf_helpers
from rlhf_helpers import machine, models, quirks, run
from rlhf_helpers.__main__ import main
from rlhf_helpers.data import load_preferences, load_prompts, read_jsonl, save_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import read_json
from tests import tiny

ROOT = Path(rlhf_helpers.__file__).resolve().parent.parent
UNIX = "resource,fcntl,os.fork,os.sched_getaffinity,os.geteuid,signal.SIGALRM"
# A process without some modules, functions and constants, with what Windows has for one of them; the rest of the command line
# is a module and its arguments.
WITHOUT = """
import os, runpy, signal, subprocess, sys, types
import psutil  # which is made for one system, and on Linux needs `resource`
for name in sys.argv.pop(1).split(","):
    if "." in name:
        vars(sys.modules[name.split(".")[0]]).pop(name.split(".")[1], None)
    else:
        sys.modules[name] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *given: print("locked", given[1:]))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def home(tmp_path):
    """A project folder of its own in a path with a blank and letters that no old code page has, with prompts as texts are."""
    home = tmp_path / "mein Ordner Ünïcode 文"
    (home / "data").mkdir(parents=True)
    save_jsonl(home / "data/pairwise_prefs_part_1.jsonl", [{"prompt": f"t{i} “naïve” 文"} for i in range(10, 20)])
    save_jsonl(home / "data/prompts_heldout.jsonl", [{"prompt": "t30 “naïve” 文 \N{PARTY POPPER}"}])
    return home


def process(home, *command, **env):
    """A new Python in `home`, done. Its output is bytes: nobody says in which encoding."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RLHF_HOME": "", **env}
    return subprocess.run([sys.executable, *map(str, command)], cwd=home, env=given, capture_output=True)


@pytest.fixture
def arguments(home, llama_folder, reward_folders):
    short = ["--max_new_tokens", 6, "--batch_size", 4, "--mini_batch_size", 2, "--steps", 1, "--kl_budget", "none"]
    return ["--model", llama_folder, "--reward-model", reward_folders[2], "--output", home / "ein Lauf", *short]


def summary(home):
    return json.loads((home / "ein Lauf" / "summary.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- what a system lacks


def test_without_bitsandbytes_a_cpu_takes_bf16_weights_and_says_so_once_and_4_bits_do_not_go_on_with_them(
    home, arguments, monkeypatch, capsys
):
    done = process(home, "-c", WITHOUT, "bitsandbytes", "rlhf_helpers", *arguments)
    said = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert said.count("no bitsandbytes here, so the CPU profile takes bf16 weights, unquantized") == 1
    assert summary(home)["steps"] == 1
    monkeypatch.setenv("RLHF_HOME", str(home))
    assert main([*map(str, arguments), "--steps", "2"]) == 2
    assert "bitsandbytes is there) bf16, not 4-bit; expected --fresh" in capsys.readouterr().err


def test_a_run_from_before_weights_were_noted_was_in_4_bits(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    now = {"--model": "m", run.WEIGHTS: "4-bit"}
    sample = dict(prompt="a", response="b", reward=0.0, gold=0.0, kl=0.0)
    extra = dict(settings={"--model": "m"}, standardisation=[0, 1], before=[sample], seconds=1, budget_spent=False)
    monkeypatch.setattr(run, "read_settings", lambda folder: {"extra": extra})
    assert run.saved_run(tmp_path, now)
    with pytest.raises(InputError, match="its run has weights .* 4-bit, not bf16"):
        run.saved_run(tmp_path, now | {run.WEIGHTS: "bf16"})


def test_the_check_says_what_is_done_without_bitsandbytes(home):
    done = process(home, "-c", WITHOUT, "bitsandbytes", "rlhf_helpers", "--check")
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert any(line.startswith("ok  4-bit NF4: no bitsandbytes here, so the CPU profile takes bf16") for line in lines)


def test_a_card_without_bitsandbytes_is_one_sentence_and_no_bf16(monkeypatch, llama_folder):
    import torch

    monkeypatch.setattr(models, "no_four_bit", lambda: "none")
    monkeypatch.setattr(models, "device_and_dtype", lambda: (torch.device("cuda", 0), torch.bfloat16))
    with pytest.raises(InputError, match="bitsandbytes cannot be imported; expected it for 4-bit weights"):
        models.load_causal_lm(llama_folder)


@pytest.mark.parametrize("error", [ImportError, OSError], ids=["not installed", "a library that does not load"])
def test_bitsandbytes_counts_as_missing_when_it_cannot_be_imported(error, monkeypatch):
    """As its library for this system may be what is missing."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "bitsandbytes":
                raise error(name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert "takes bf16 weights" in machine.no_four_bit() and not models.is_4bit(tiny.llama())
    monkeypatch.undo()
    assert machine.no_four_bit() is None


def test_a_run_needs_nothing_that_only_unix_has_and_no_locale_beyond_ascii(home, arguments):
    """Its folder has a blank and letters of three alphabets in its path, its texts more than that."""
    ascii_only = dict(PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    done = process(home, "-c", WITHOUT, UNIX, "rlhf_helpers", *arguments, **ascii_only)
    said = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr
    assert "locked (2, 1)" in said and "t30 ?na?ve? ? ?\n" in said, said
    (first, *_) = read_jsonl(home / "ein Lauf" / "samples.jsonl")
    assert first["prompt"] == "t30 “naïve” 文 \N{PARTY POPPER}" and summary(home)["steps"] == 1


def test_where_there_is_neither_proc_nor_resource_the_peak_is_windows_s_or_unknown(monkeypatch):
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(machine, "Path", lambda *parts: Path("nowhere at all"))
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil, "Process", lambda: types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(rss=1)))
    assert machine.peak_megabytes() != machine.peak_megabytes()  # nan
    info = types.SimpleNamespace(rss=1, peak_wset=3 * 2**20)
    monkeypatch.setattr(psutil, "Process", lambda: types.SimpleNamespace(memory_info=lambda: info))
    assert machine.peak_megabytes() == 3.0


@pytest.mark.parametrize("system, unit", [("darwin", 2**20), ("linux", 2**10)])
def test_without_proc_the_peak_is_in_the_unit_of_the_system(system, unit, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(machine, "Path", lambda *parts: Path("nowhere at all"))
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=7 * unit))
    monkeypatch.setattr(machine.sys, "platform", system)
    assert machine.peak_megabytes() == 7.0


def test_without_fcntl_windows_lock_keeps_a_second_run_out(tmp_path, monkeypatch):
    held = []

    def locking(descriptor, mode, count):
        if held:
            raise PermissionError(13, "Permission denied")  # as Windows says it
        held.append(descriptor)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    with run.alone_in(tmp_path / "run"):
        with pytest.raises(InputError, match="another run is at work here"):
            with run.alone_in(tmp_path / "run"):
                pass


@pytest.mark.parametrize(
    "error", [OSError("no such library"), AttributeError("no such symbol")], ids=["musl, macOS", "another libc"]
)
def test_another_allocator_is_left_alone(error, monkeypatch):
    def library(name):
        raise error

    monkeypatch.setattr(quirks.ctypes, "CDLL", library)
    quirks.give_back_large_blocks()
    quirks.give_back_the_rest()


def test_where_a_folder_cannot_be_flushed_files_are_written_all_the_same(tmp_path, monkeypatch):
    """As on Windows, which opens no folder."""
    opened = os.open

    def files_only(path, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", files_only)
    save_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"prompt": "a"}]


# ---------------------------------------------------------------- paths, encodings, line ends


def test_files_are_read_as_utf_8_where_the_locale_is_another(home):
    code = "import locale, sys; from rlhf_helpers.data import load_prompts; print(locale.getpreferredencoding(False), "
    code += "ascii(load_prompts('data/prompts_heldout.jsonl')))"
    env = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = process(home, "-c", code, **env)
    assert done.returncode == 0 and "utf" not in done.stdout.decode("ascii").lower().split()[0], done
    assert done.stdout.decode("ascii").split(" ", 1)[1].strip() == ascii(["t30 “naïve” 文 \N{PARTY POPPER}"])


LINES = '{"prompt": "a\\nb", "chosen": "c", "rejected": "d"}\n\n{"prompt": "e", "chosen": "ü", "rejected": "h"}\n'


@pytest.mark.parametrize("read", [load_prompts, load_preferences, read_jsonl])
@pytest.mark.parametrize("end", ["\r\n", "\n"], ids=["CRLF", "LF"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "not ended"])
def test_line_ends_do_not_matter(read, end, last, tmp_path):
    plain, other = tmp_path / "plain.jsonl", tmp_path / "other.jsonl"
    plain.write_bytes(LINES.encode())
    other.write_bytes((LINES if last else LINES.rstrip("\n")).replace("\n", end).encode())
    assert read(other) == read(plain)


def test_what_is_written_has_the_same_bytes_on_every_system(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "linesep", "\r\n")
    save_jsonl(tmp_path / "rows.jsonl", [{"prompt": "ü"}])
    run.write_json(tmp_path / "one.json", {"a": 1})
    assert (tmp_path / "rows.jsonl").read_bytes() == '{"prompt": "ü"}\n'.encode()
    assert b"\r" not in (tmp_path / "one.json").read_bytes()
    (tmp_path / "one.json").write_bytes(b'{\r\n "a": 1\r\n}\r\n')
    assert read_json(tmp_path / "one.json") == {"a": 1}


SOURCES = [path for folder in ("rlhf_helpers", "tools", "data", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def calls(path):
    """(line, name, the call) of every call of a name or an attribute in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield node.lineno, getattr(node.func, "id", getattr(node.func, "attr", None)), node


def in_the_systems_encoding(path):
    """The lines of a file that open a file as text and do not say in which encoding."""
    found = []
    for line, name, call in calls(path):
        if name in ("open", "fdopen") and not (isinstance(call.func, ast.Attribute) and call.func.value.__class__ is ast.Name
                                                and call.func.value.id in ("os", "Image", "Picture", "zipfile")):  # fmt: skip
            words = [a.value for a in call.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            words += [k.value.value for k in call.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
            as_text = not any("b" in word for word in words if set(word) <= set("rwxabt+"))
        else:
            as_text = name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)
        positional = 0 if name == "read_text" else 1
        said = any(k.arg == "encoding" for k in call.keywords) or name.endswith("_text") and len(call.args) > positional
        if as_text and not said:
            found.append(f"{path.name}:{line}")
    return found


def test_no_file_is_opened_in_the_systems_own_encoding():
    """But for the campaign of faults, which runs where the system's is UTF-8."""
    assert [place for path in SOURCES if path.name != "faults.py" for place in in_the_systems_encoding(path)] == []


@pytest.mark.parametrize(
    "line, found",
    [
        ("open('a')", True),
        ("open('a', 'rb')", False),
        ("open('a', 'w')", True),
        ("open('a', 'w', encoding='utf-8')", False),
        ("p.read_text()", True),
        ("p.read_text('utf-8')", False),
        ("p.write_text(x)", True),
        ("p.write_text(x, encoding='utf-8')", False),
    ],
)
def test_the_search_for_encodings_finds_them(line, found, tmp_path):
    (tmp_path / "x.py").write_text(line, encoding="utf-8")
    assert bool(in_the_systems_encoding(tmp_path / "x.py")) == found


def test_nothing_forks_so_nothing_depends_on_how_processes_start():
    """But for the campaign of faults, which says so. Processes are started anew, by `subprocess` or Accelerate."""
    starts = {"fork", "forkpty", "Pool", "Process", "ProcessPoolExecutor", "notebook_launcher", "start_processes"}
    forks = {
        path.name
        for path in SOURCES
        for _, name, call in calls(path)
        if name in starts and not ast.unparse(call.func).startswith("psutil.")
    }
    assert forks == {"faults.py"}


def test_the_campaign_of_faults_says_what_it_needs_where_nothing_forks(home):
    done = process(home, "-c", WITHOUT, UNIX, "tools.faults")
    assert done.returncode == 2 and done.stderr.decode().count("\n") == 1 and b"needs a system that can fork" in done.stderr
