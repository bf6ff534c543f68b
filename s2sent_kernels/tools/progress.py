"""How far a command is with its texts: a bar on a terminal, elsewhere a line after three seconds and then every five."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from .. import waiting
from ..files import importing, on_terminal
from ..waiting import PROGRESS_EVERY

with importing(None, "encode"):
    from tqdm import tqdm

T = TypeVar("T")

SAMPLED = 256  # texts


class _Bar(tqdm):
    """A bar that is drawn again every second: the time that it counts moves while one step lasts. Its numbers are as lines have
    them, thousands apart and a rate in words."""

    time_left: Callable[[], float | None] | None = None  # seconds, where its owner knows better than the rate

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._over = threading.Event()
        threading.Thread(target=_draw_until, args=[self._over, weakref.ref(self)], daemon=True).start()

    def close(self) -> None:
        if hasattr(self, "_over"):  # the constructor came to its end
            with self.get_lock():  # so that nothing is drawn below what is printed next
                self._over.set()
        super().close()

    @property
    def format_dict(self) -> dict[str, Any]:
        known = super().format_dict
        done, rate, unit = known["n"], known["rate"], self.unit.strip()
        if rate is None and done > known["initial"] and known["elapsed"] > 0:
            rate = (done - known["initial"]) / known["elapsed"]
        if self.time_left is not None:
            seconds = self.time_left()
        else:
            seconds = (known["total"] - done) / rate if rate else None
        return known | {
            "done": f"{done:,}",
            "whole": f"{known['total']:,}",
            "speed": _speed(rate, unit) if rate else f"? {unit}/s",
            "left": "?" if seconds is None else tqdm.format_interval(seconds),
        }


def _speed(rate: float, unit: str) -> str:
    if rate >= 10:
        return f"{rate:,.0f} {unit}/s"
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s a {unit.removesuffix('s')}"


def _draw_until(over: threading.Event, bar: weakref.ref[_Bar]) -> None:
    while not over.wait(waiting.LOOK):
        shown = bar()
        if shown is None:
            return
        with shown.get_lock():
            if not over.is_set():
                shown.refresh(nolock=True)


def drawn(total: int, done: int, unit: str, *, prefix: str = "", leave: bool = True) -> Any:
    """The bar of every command, of tqdm, on standard error: how many of all, how fast, the time it took and the time left.

    Args:
        unit: what is counted, as "texts".
        leave: whether the bar stays when it is closed.
    """
    form = prefix + f"{{done}} of {{whole}} {unit} {{bar}} {{speed}}{{postfix}}, {{elapsed}} gone, {{left}} left"
    return _Bar(
        total=total, initial=done, unit=f" {unit}", bar_format=form, file=sys.stderr, disable=False, leave=leave
    )


def spread(items: Sequence[T], most: int = SAMPLED) -> Sequence[T]:
    """About ``most`` of the items, from all of them: enough to tell how many tokens a text has."""
    return items[:: max(1, len(items) // most)]


def stepwise(items: Sequence[T], what: str, unit: str) -> Generator[T]:
    """The items one after the other; where that lasts, lines on standard error say how many of them are done, as "planning: 3 of
    20 files ...". No bar: what is planned is often a single large file."""
    done = 0
    with waiting.Lines(lambda: f"{what}: {done:,} of {len(items):,} {unit} ...", PROGRESS_EVERY):
        for item in items:
            yield item
            done += 1


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
        self._expected: float | None = None  # tokens of a text
        self.prefix = f"{part}: " if part else ""
        shown = on_terminal() if bar is None else bar
        self.bar: Any = drawn(total, done, "texts", prefix=self.prefix, leave=not part) if shown else None
        if self.bar is not None:
            self.bar.time_left = self.left
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

    def expect(self, tokens: float) -> None:
        """About so many tokens has a text, on average: the longest are encoded first, so that the first texts say nothing of the
        time that the others take."""
        self._expected = tokens

    def left(self) -> float | None:
        """Seconds; None while nothing says how many.

        By tokens where it is known how many to expect. A sample's mean is not exact, so the texts' own rate, which is exact in
        the end, counts the more the more of them are done."""
        passed, todo = waiting.clock() - self.start, self.total - self.before
        if not self.texts:
            return None
        by_texts = (todo - self.texts) * passed / self.texts
        if not self.tokens or self._expected is None:
            return by_texts
        by_tokens = max(0.0, todo * self._expected - self.tokens) * passed / self.tokens
        return by_tokens + (by_texts - by_tokens) * self.texts / todo

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
        said = f"{self.prefix}{self.before + self.texts:,} of {self.total:,} texts"
        left = self.left()
        if left is None:  # the first batch is in work
            return f"{said} ..."
        now = waiting.clock()
        rates = [self._rate(self.texts, now, "texts")]
        if self.tokens:
            rates.append(self._rate(self.tokens, now, "tokens"))
        return f"{said}, {', '.join(rates)}, {tqdm.format_interval(left)} left"

    def __enter__(self) -> Progress:
        if self.bar is None:
            self._ends.enter_context(self.lines)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ends.close()
        if self.bar is not None:
            self.bar.close()
