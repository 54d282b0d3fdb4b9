"""Files and folders appear whole or not at all: through a kill at any step, a full disk, a left-over of a killed save."""

import errno
import json
import os
import shutil
import sys
import threading

import pytest

from rlhf_helpers import assets, files
from rlhf_helpers.course.plots import save_figure, training_curves
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import NotWritten, check_manifest, find_whole, whole_file, whole_folder, write_manifest, write_text

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def save(folder, text, sign="sign"):
    with whole_folder(folder, sign) as beside:
        write_text(beside / "sign", text)
        write_text(beside / "inner" / "more", text * 2)
        write_manifest(beside)


def content(folder):
    check_manifest(folder)
    assert (folder / "inner" / "more").read_text() == (folder / "sign").read_text() * 2
    return (folder / "sign").read_text()


def exit_status(work, *arguments):
    """The exit status of a new process that does `work`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(*arguments)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(events, work):
    """Do `work`, but end the process, without any clean-up, at its event number `events` that touches the disk."""
    left = [events]

    def watch(event, _):
        if event == "open" or event.startswith(("os.", "shutil.")):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    sys.addaudithook(watch)
    work()


@posix
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one_whole_and_the_next_save_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)  # of no use against a kill, and slow
    folder, seen = tmp_path / "run", []
    for events in range(1, 500):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        save(folder, "old")
        status = exit_status(killed_after, events, lambda: save(folder, "new"))
        seen.append(content(find_whole(folder)))
        save(folder, "next")
        assert content(folder) == "next" and [path.name for path in tmp_path.iterdir()] == ["run"]
        if status == 0:
            break
    assert status == 0 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"} and len(seen) > 20


@posix
def test_a_kill_at_any_step_leaves_the_old_file_or_the_new_one_whole(tmp_path):
    path, seen = tmp_path / "file", []
    for events in range(1, 100):
        write_text(path, "old")
        status = exit_status(killed_after, events, lambda: write_text(path, "new"))
        seen.append(path.read_text())
        if status == 0:
            break
    assert status == 0 and set(seen) == {"old", "new"}


@posix
def test_a_full_disk_leaves_the_last_whole_figure_and_gives_one_sentence(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "curves.png"
    path.write_text("old")

    def work():
        figure = training_curves([{"step": i, "objective/kl": i} for i in range(9)], {"objective/kl": "KL"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        with pytest.raises(NotWritten, match="curves.png: could not be written .File too large."):
            save_figure(figure, path)

    assert exit_status(work) == 0
    assert path.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@posix
def test_a_full_disk_leaves_the_last_whole_folder_and_gives_one_sentence(tmp_path):
    resource = pytest.importorskip("resource")
    folder = tmp_path / "run"
    save(folder, "old")

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(NotWritten) as error:
            save(folder, "n" * 10_000)
        assert (
            str(error.value)
            == f"{folder}: could not be written (File too large); the last whole one, if there was one, is kept"
        )

    assert exit_status(work) == 0
    assert content(folder) == "old" and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("step", ["flush", "first rename", "second rename"])
def test_a_disk_that_fails_at_a_late_step_leaves_the_last_whole_folder(step, tmp_path, monkeypatch):
    folder, renames, rename = tmp_path / "run", [], files.Path.rename
    save(folder, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(path, target):
        renames.append(path)
        return fail() if len(renames) == {"first rename": 1, "second rename": 2}[step] else rename(path, target)

    if step == "flush":
        monkeypatch.setattr(files.os, "fsync", fail)
    else:
        monkeypatch.setattr(files.Path, "rename", failing)
    with pytest.raises(OSError, match="run: could not be written .No space left on device.; the last whole one"):
        save(folder, "new")
    assert content(folder) == "old" and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_library_s_own_error_of_a_full_disk_is_told_apart_from_a_fault(tmp_path):
    for text, kind in (
        ("Error while serializing: I/O error: No space left on device (os error 28)", NotWritten),
        ("x", KeyError),
    ):
        with pytest.raises(kind), whole_folder(tmp_path / "run", "sign"):
            raise KeyError(text)
        assert list(tmp_path.iterdir()) == []


def test_everything_is_on_the_disk_before_the_name_changes_and_the_new_name_after(tmp_path, monkeypatch):
    told, fsync, rename = [], os.fsync, files.Path.rename

    def flushed(descriptor):
        told.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        return fsync(descriptor)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(files.Path, "rename", lambda path, target: told.append("rename") or rename(path, target))
    with whole_folder(tmp_path / "run", "sign") as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "more").write_text("a")
        (beside / "sign").write_text("a")
    before, after = told[: told.index("rename")], told[told.index("rename") + 1 :]
    assert set(before) == {".run.part", ".run.part/sign", ".run.part/inner", ".run.part/inner/more"} and after == ["."]


def test_what_a_killed_save_left_is_found_through_a_link_too(tmp_path):
    save(tmp_path / "disk" / "run", "old")
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    (tmp_path / "disk" / "run").rename(tmp_path / "disk" / ".run.old")  # killed between the two renames
    assert (files.find_whole(tmp_path / "run") / "sign").read_text() == "old"
    save(tmp_path / "run", "new")
    assert (tmp_path / "disk" / "run" / "sign").read_text() == "new"


def test_two_saves_at_once_are_one_save_and_a_refusal(tmp_path):
    save(tmp_path / "run", "old")
    with whole_folder(tmp_path / "run", "sign") as first:
        (first / "sign").write_text("first")
        with pytest.raises(InputError, match="run: another save to it is under way; expected one at a time, or another folder"):
            save(tmp_path / "run", "second")
        assert (first / "sign").read_text() == "first"  # and it is not touched
    assert (tmp_path / "run" / "sign").read_text() == "first" and [file.name for file in tmp_path.iterdir()] == ["run"]


def test_saves_that_begin_together_leave_one_of_them_whole(tmp_path):
    save(tmp_path / "run", "old")
    said = []

    def worker(text, barrier):
        barrier.wait()
        try:
            save(tmp_path / "run", text)
            said.append(text)
        except InputError as error:
            said.append(str(error))

    for number in range(40):
        barrier, texts = threading.Barrier(2), [f"{number} a", f"{number} b"]
        both = [threading.Thread(target=worker, args=(text, barrier)) for text in texts]
        said.clear()
        [thread.start() for thread in both], [thread.join() for thread in both]
        saved = [text for text in said if text in texts]
        assert saved and all(text in saved or "another save to it is under way" in text for text in said), said
        check_manifest(tmp_path / "run")
        assert (tmp_path / "run" / "sign").read_text() in saved
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_somebody_s_own_name_with_part_is_left_alone(tmp_path):
    (tmp_path / "run.part").mkdir()
    (tmp_path / "run.part" / "thesis.txt").write_text("mine")
    (tmp_path / "x.part").write_text("mine, too")
    save(tmp_path / "run", "new")
    files.write_text(tmp_path / "x", "a")
    assert (tmp_path / "run.part" / "thesis.txt").read_text() == "mine" and (tmp_path / "x.part").read_text() == "mine, too"


def test_a_folder_with_other_things_in_it_is_never_replaced(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    save(folder, "an empty one may be")
    (folder / "sign").unlink()
    with pytest.raises(InputError, match="thesis: holds other things and no sign; expected a new folder"):
        save(folder, "new")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: is a file; expected a folder"):
        save(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "mine" and (folder / "inner" / "more").exists()


def test_a_folder_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    save(tmp_path / "run", "a")
    save(tmp_path / "run", "b")
    assert (tmp_path / "run").is_symlink() and content(tmp_path / "disk") == "b"


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "file") as beside:
        beside.write_text("ne")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_folders_of_killed_downloads_go_when_they_are_an_hour_old(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path))
    models = tmp_path / "output" / "models"
    for name in (".making-killed", ".making-at-work", "minilm-l6-v2"):
        (models / name).mkdir(parents=True)
        (models / name / "config.json").touch()
    os.utime(models / ".making-killed", (1e9, 1e9))
    assert assets.ensure_model("minilm-l6-v2", pytest.fail) == models / "minilm-l6-v2"
    monkeypatch.setattr(type(models), "glob", lambda folder, pattern: [folder / "gone since"])
    assets._tidy(models)
    assert sorted(path.name for path in models.iterdir()) == [".making-at-work", "minilm-l6-v2"]


# ---------------------------------------------------------------- manifest


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path, change):
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


DAMAGE = {
    "a flipped bit": (lambda f: flip(f / "inner" / "more"), "inner/more: not what was written"),
    "a byte more": (lambda f: (f / "sign").write_text("text!"), "sign: 5 bytes; expected the 4 that were written"),
    "a missing file": (lambda f: (f / "sign").unlink(), "sign: missing"),
    "a foreign file": (lambda f: (f / "inner" / "x").touch(), "inner/x: a foreign file"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: no such file"),
    "an empty manifest": (lambda f: (f / "manifest.json").write_text(""), "manifest.json: not JSON"),
    "a manifest of bytes": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json: not UTF-8"),
    "a manifest that is a folder": (
        lambda f: (f / "manifest.json").unlink() or (f / "manifest.json").mkdir(),
        "manifest.json: cannot be read",
    ),
    "brackets": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json: brackets nested too deeply"),
    "digits": (lambda f: (f / "manifest.json").write_text("9" * 10_000), "manifest.json: a number of too many digits"),
    "a list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json: not a manifest"),
    "another format": (
        lambda f: edit(f / "manifest.json", lambda m: m.update(format=2)),
        "manifest.json: format 2; expected 1",
    ),
    "files as a list": (
        lambda f: edit(f / "manifest.json", lambda m: m.update(files=["sign"])),
        "manifest.json: not a manifest",
    ),
    "a file's size a string": (
        lambda f: edit(f / "manifest.json", lambda m: m["files"]["sign"].update(size="4")),
        "manifest.json: entry",
    ),
    "a file's entry a list": (
        lambda f: edit(f / "manifest.json", lambda m: m["files"].update(sign=[4])),
        "manifest.json: entry",
    ),
    "a path outside": (
        lambda f: edit(f / "manifest.json", lambda m: m["files"].update({"../../x": m["files"]["sign"]})),
        "x: missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_anything_but_what_was_written_is_named_by_folder_and_file(damage, tmp_path):
    folder = tmp_path / "run"
    save(folder, "text")
    check_manifest(folder)
    change, complaint = DAMAGE[damage]
    change(folder)
    with pytest.raises(InputError) as error:
        check_manifest(folder)
    assert str(error.value).startswith(str(folder)) and complaint in str(error.value).replace("\\", "/")
    assert "\n" not in str(error.value) and "; expected" in str(error.value)


def test_what_finder_and_jupyter_put_into_a_folder_does_no_harm(tmp_path):
    save(tmp_path / "run", "text")
    (tmp_path / "run" / ".DS_Store").touch()
    (tmp_path / "run" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "run" / ".ipynb_checkpoints" / "sign").touch()
    check_manifest(tmp_path / "run")
