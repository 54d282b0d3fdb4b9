"""How far it is: in a terminal, in a notebook, and in a log file."""

import sys
from types import SimpleNamespace

import pytest

from rlhf_helpers import progress
from tests import tiny


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set; nothing here depends on how fast the machine is."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def nowhere(monkeypatch):
    """Neither a terminal nor a notebook."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(progress, "in_notebook", lambda: False)


def test_what_takes_less_than_five_seconds_says_nothing(nowhere, clock, capsys):
    with progress.bar(10, "work", "parts") as bar:
        for second in range(10):
            clock.now = second * 0.4
            bar.update()
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_a_line_every_five_seconds_with_what_is_left(nowhere, clock, capsys):
    with progress.bar(4, "work", "parts") as bar:
        for second in (6, 9, 12):
            clock.now = second
            bar.update(note="fine")
    assert capsys.readouterr().out == "work: 1 of 4 parts, fine, 00:18 left\nwork: 3 of 4 parts, fine, 00:04 left\n"


def test_a_log_gets_nine_lines_at_most_however_long_it_takes(nowhere, clock, capsys):
    for hour, _ in enumerate(progress.track(range(1000), "work")):
        clock.now = 3600.0 * hour
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_what_is_part_of_a_bar_has_none_of_its_own(nowhere, clock, capsys):
    def work(what):
        with progress.bar(2, what) as bar:
            clock.now += 6
            bar.update()

    with pytest.raises(ValueError), progress.bar(2, "whole") as bar:
        work("part")
        bar.update()
        raise ValueError
    work("alone")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["whole", "alone"]


@pytest.mark.parametrize("queries, batch_size, total", [(17, None, 6), (17, 8, 18), (16, None, None)])
def test_many_responses_say_how_far_they_are(nowhere, monkeypatch, queries, batch_size, total):
    bars = []
    monkeypatch.setattr(progress.Lines, "close", lambda bar: bars.append(bar))
    trainer = tiny.trainer(max_new_tokens=6)
    trainer.generate(tiny.batch(4)[0][:1] * queries, batch_size=batch_size)
    assert [(bar.n, bar.total, bar.what) for bar in bars] == ([(total, total, "sampling")] if total else [])


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "in_notebook", lambda: False)
    with progress.bar(2, "work", "parts") as bar:
        bar.update(2, "fine")
        assert (bar.tqdm.n, bar.tqdm.total, bar.tqdm.postfix) == (2, 2, "fine")
    out, err = capsys.readouterr()
    assert out == "" and "work" in err and "\n" not in err and err.rsplit("\r", 1)[1].strip() == ""


def test_a_notebook_keeps_one_output_that_is_the_same_in_every_run(monkeypatch, clock, capsys):
    import IPython.display

    shown = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    monkeypatch.setattr(IPython.display, "display", lambda data, raw, display_id: shown.append(data["text/plain"]) or handle)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    with progress.bar(2, "work", "parts") as bar:
        clock.now = 3.0
        bar.update()
        bar.update()
    assert shown == [
        "work: 0 of 2 parts, ? left",
        "work: 1 of 2 parts, 00:03 left",
        "work: 2 of 2 parts, 00:00 left",
        "work: 2 of 2 parts",
    ]
    assert capsys.readouterr() == ("", "")


def test_only_one_of_several_processes_speaks(monkeypatch, clock, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track([1, 2], "work", show=False)) == [1, 2] and capsys.readouterr() == ("", "")


def test_this_is_no_notebook():
    assert not progress.in_notebook()
