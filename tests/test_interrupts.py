"""Ctrl-C and SIGTERM: noted inside a step, obeyed after it."""

import signal
import threading

import pytest

from rlhf_helpers.interrupts import AtOnce, Interrupted, finishing, terminable

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers_are_left_as_they_were():
    before = [signal.getsignal(signum) for signum in BOTH]
    yield
    assert [signal.getsignal(signum) for signum in BOTH] == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with finishing() as asked:
            signal.raise_signal(signal.SIGINT)
        assert asked.signum is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_is_not_python_s_is_left_alone(monkeypatch):
    """`getsignal` gives None where another language's runtime has the signal, and nobody can put that back."""
    monkeypatch.setattr(signal, "getsignal", lambda signum: None)
    monkeypatch.setattr(signal, "signal", lambda *given: pytest.fail(f"signal.signal was called with {given}"))
    with finishing() as asked, terminable():
        assert asked.signum is None
    monkeypatch.undo()


def test_the_first_ctrl_c_is_noted_and_the_second_acts_at_once():
    with finishing() as asked:
        asked.check()
        signal.raise_signal(signal.SIGINT)
        assert asked.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="stopped by SIGINT"):
            asked.check()


def test_sigterm_stops_at_once_where_it_is_terminable():
    with terminable(), pytest.raises(AtOnce) as stopped:
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.signum == signal.SIGTERM and not isinstance(stopped.value, Interrupted)


@pytest.mark.parametrize("signum", BOTH)
def test_only_what_waited_for_the_end_of_a_step_says_that_it_is_whole(signum):
    with terminable(), finishing() as asked:
        signal.raise_signal(signum)
        with pytest.raises(KeyboardInterrupt) as at_once:
            signal.raise_signal(signum)
        with pytest.raises(Interrupted) as whole:
            asked.check()
    assert not isinstance(at_once.value, Interrupted) and whole.value.signum == signum


def test_a_step_that_is_terminable_is_finished_and_the_first_signal_counts():
    with terminable(), finishing() as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert asked.signum == signal.SIGTERM


def test_elsewhere_sigterm_is_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    with finishing():
        assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_changes():
    inside = []

    def work():
        with terminable(), finishing() as asked:
            inside.append((signal.getsignal(signal.SIGINT), asked.signum))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, None)]
