"""How far a command is with its texts: a bar on a terminal, elsewhere a line after three seconds and then every five."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from types import TracebackType
from typing import Any

from .. import waiting
from ..files import importing, on_terminal
from ..waiting import PROGRESS_EVERY

with importing(None, "encode"):
    from tqdm import tqdm


class _Bar(tqdm):
    """A bar that is drawn again every second: the time that it counts moves while one step lasts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._over = threading.Event()
        threading.Thread(target=_draw_until, args=[self._over, weakref.ref(self)], daemon=True).start()

    def close(self) -> None:
        if hasattr(self, "_over"):  # the constructor came to its end
            self._over.set()
        super().close()


def _draw_until(over: threading.Event, bar: weakref.ref[_Bar]) -> None:
    while not over.wait(waiting.LOOK):
        shown = bar()
        if shown is None:
            return
        shown.refresh()


def drawn(total: int, done: int, unit: str, *, prefix: str = "", leave: bool = True) -> Any:
    """The bar of every command, of tqdm, on standard error: how many of all, how fast, the time it took and the time left.

    Args:
        unit: what is counted, as "texts".
        leave: whether the bar stays when it is closed.
    """
    form = (
        prefix
        + f"{{n_fmt}} of {{total_fmt}} {unit} {{bar}} {{rate_fmt}}{{postfix}}, {{elapsed}} gone, {{remaining}} left"
    )
    return _Bar(
        total=total, initial=done, unit=f" {unit}", bar_format=form, file=sys.stderr, disable=False, leave=leave
    )


class Progress:
    """Texts, tokens a second and time left, on standard error.

    Args:
        total: texts in all.
        done: texts encoded by earlier runs.
        bar: a bar; by default where standard error is a terminal.
        part: of what the texts are, as "dev", where that is only a part of the command's work. Its bar does not stay.
    """

    def __init__(self, total: int, done: int = 0, *, bar: bool | None = None, part: str = "") -> None:
        self.total, self.before, self.texts, self.tokens = total, done, 0, 0
        self.prefix = f"{part}: " if part else ""
        shown = on_terminal() if bar is None else bar
        self.bar: Any = drawn(total, done, "texts", prefix=self.prefix, leave=not part) if shown else None
        self.begin()
        self.lines = waiting.Lines(self._line, PROGRESS_EVERY)
        self._ends = contextlib.ExitStack()

    def begin(self) -> None:
        """Count the time from now on, if nothing is encoded yet: rate and time left are those of what is encoded, and loading a
        model, and reading again what an earlier run encoded, is another kind of work."""
        if self.texts:
            return
        self.start = waiting.clock()
        if self.bar is not None:
            self.bar.start_t = self.bar.last_print_t = self.bar._time()

    def advance(self, texts: int, tokens: int | None) -> None:
        """So many more are encoded; ``tokens`` is None where nobody counts them."""
        self.texts += texts
        self.tokens += tokens or 0
        if self.bar is None:
            self.lines.look()
            return
        if self.tokens:
            self.bar.set_postfix_str(self._rate(self.tokens, waiting.clock(), "tokens"), refresh=False)
        self.bar.update(texts)

    def _rate(self, count: int, now: float, what: str) -> str:
        return f"{count / max(now - self.start, 1e-9):,.0f} {what}/s"

    def _line(self) -> str:
        done = self.before + self.texts
        said = f"{self.prefix}{done:,} of {self.total:,} texts"
        if not self.texts:  # the first batch is in work
            return f"{said} ..."
        now = waiting.clock()
        rates = [self._rate(self.texts, now, "texts")]
        if self.tokens:
            rates.append(self._rate(self.tokens, now, "tokens"))
        left = (self.total - done) * (now - self.start) / self.texts
        return f"{said}, {', '.join(rates)}, {tqdm.format_interval(left)} left"

    def __enter__(self) -> Progress:
        if self.bar is None:
            self._ends.enter_context(self.lines)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ends.close()
        if self.bar is not None:
            self.bar.close()
