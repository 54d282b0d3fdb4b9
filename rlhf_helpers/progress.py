"""How far it is and what is left, of everything that takes long: a bar in a terminal, one line that changes in a notebook, and
a line now and then where neither can be seen, as in a log file."""

import sys
import time

from tqdm import tqdm

EVERY = 5  # seconds between two lines where there is no terminal; what takes less says nothing
SPEAKING = []  # the bar of a `with` that speaks: what is inside of it is a part of it, and silent


def track(items, what, unit="it", show=True):
    """The items of a list, one after the other, with a bar; what happens between two of them may have bars of its own."""
    progress = bar(len(items), what, unit, show)
    try:
        for item in items:
            yield item
            progress.update()
    finally:
        progress.close()


def bar(total, what, unit="it", show=True):
    """A bar of `total` units, to be used in a `with`; `update(n, note)` says that n more are done. With `show=False`, as in all
    processes but the main one, it is silent, and in the `with` of another bar, too."""
    if not show or SPEAKING:
        return Bar(total, what, unit)
    if in_notebook():
        return NotebookBar(total, what, unit)
    return (TerminalBar if sys.stderr.isatty() else Lines)(total, what, unit)


def in_notebook():
    """Whether a Jupyter kernel runs this; IPython is not imported to find out."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class Bar:
    """Counts, and says nothing."""

    def __init__(self, total, what, unit):
        self.total, self.what, self.unit, self.n, self.note = total, what, unit, 0, ""
        self.started = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def update(self, n=1, note=""):
        self.n, self.note = self.n + n, note
        self.draw()

    def line(self):
        """What and how far, in words: the same in every run."""
        return f"{self.what}: {self.n} of {self.total} {self.unit}" + (f", {self.note}" if self.note else "")

    def timed_line(self):
        """The same with the time that is left, at the speed so far."""
        seconds = time.monotonic() - self.started
        return f"{self.line()}, {tqdm.format_interval(seconds / self.n * (self.total - self.n)) if self.n else '?'} left"

    def draw(self):
        pass

    def close(self):
        pass


class Speaking(Bar):
    """One that says something."""

    def __enter__(self):
        SPEAKING.append(self)
        return self

    def __exit__(self, *error):
        SPEAKING.remove(self)
        self.close()


class TerminalBar(Speaking):
    """tqdm's bar on stderr, gone when it is done."""

    def __init__(self, total, what, unit):
        super().__init__(total, what, unit)
        self.tqdm = tqdm(total=total, desc=what, unit=f" {unit}", leave=False, dynamic_ncols=True, file=sys.stderr)

    def draw(self):
        self.tqdm.set_postfix_str(self.note, refresh=False)
        self.tqdm.update(self.n - self.tqdm.n)

    def close(self):
        self.tqdm.close()


class NotebookBar(Speaking):
    """One output of the cell, drawn anew in place. What stays in the notebook is the last line, without times."""

    def __init__(self, total, what, unit):
        super().__init__(total, what, unit)
        from IPython.display import display

        self.handle = display({"text/plain": self.timed_line()}, raw=True, display_id=True)

    def draw(self):
        self.handle.update({"text/plain": self.timed_line()}, raw=True)

    def close(self):
        self.handle.update({"text/plain": self.line()}, raw=True)


class Lines(Speaking):
    """A plain line on stdout, each time that five seconds and a tenth of the whole have passed since the one before."""

    def __init__(self, total, what, unit):
        super().__init__(total, what, unit)
        self.last = self.started, 0

    def draw(self):
        now, (then, done) = time.monotonic(), self.last
        if self.n < self.total and now - then >= EVERY and self.n - done >= self.total / 10:
            self.last = now, self.n
            print(self.timed_line(), flush=True)
