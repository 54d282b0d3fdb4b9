"""Ctrl-C between two steps, not inside one: what is half done would be lost, or worse, half kept."""

import contextlib
import signal
import threading


class Interrupted(KeyboardInterrupt):
    """Somebody asked to stop, and the step was finished first. `signum` says how: SIGINT (Ctrl-C, a notebook's stop button)
    or SIGTERM."""

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name} after a whole step")
        self.signum = signum


class Asked:
    """Which signal came, None until one does."""

    signum = None

    def check(self):
        """Raises Interrupted if a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum)


@contextlib.contextmanager
def finishing(*signums):
    """Inside, the first of these signals (SIGINT by default) is only noted, in the Asked that is given; the second one acts as
    it did before. In another thread than the main one, where Python gets no signals, nothing changes."""
    asked, before = Asked(), {}

    def note(signum, frame):
        asked.signum = signum
        signal.signal(signum, before[signum])

    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.getsignal(signum) for signum in signums or (signal.SIGINT,)}
        for signum in before:
            signal.signal(signum, note)
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
