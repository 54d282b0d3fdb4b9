"""Ctrl-C between two steps, not inside one: what is half done would be lost, or worse, half kept."""

import contextlib
import signal
import threading


class AtOnce(KeyboardInterrupt):
    """A signal ended what ran, wherever that was: what is half done is not to be kept. `signum` says which, SIGINT (Ctrl-C, a
    notebook's stop button) or SIGTERM."""

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupted(AtOnce):
    """Somebody asked to stop, and the step is whole: it can be saved."""


class Asked:
    """Which signal came first, None until one does."""

    signum = None

    def check(self):
        """Raises Interrupted if a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum)


def stop(signum, frame):
    """A handler that ends what runs at once, as Python's own does on SIGINT."""
    raise AtOnce(signum)


@contextlib.contextmanager
def terminable():
    """Inside, SIGTERM does what Ctrl-C does: it ends what runs at once, or waits where Ctrl-C waits (`finishing`)."""
    with handlers(stop, signal.SIGTERM):
        yield


@contextlib.contextmanager
def finishing(*signums):
    """Inside, the first of these signals (by default SIGINT, and SIGTERM where `terminable`) is only noted, in the Asked that
    is given; the second one acts as it did before. One that is ignored, as SIGINT is in a shell's background, stays so; and in
    another thread than the main one, where Python gets no signals, nothing changes."""
    asked = Asked()
    alike = (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signal.SIGTERM) is stop else (signal.SIGINT,)
    before = {signum: signal.getsignal(signum) for signum in signums or alike}
    before = {signum: handler for signum, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def note(signum, frame):
        asked.signum = asked.signum or signum
        signal.signal(signum, before[signum])

    with handlers(note, *before):
        yield asked


@contextlib.contextmanager
def handlers(handler, *signums):
    """This handler of these signals inside, those from before after."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.getsignal(signum) for signum in signums}
        before = {signum: handler for signum, handler in before.items() if handler is not None}  # None: not Python's own
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)
