"""How far a command is with its texts: a bar on a terminal, elsewhere a line after three seconds and then every half minute."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from .. import waiting
from ..files import PROGRESS_EVERY, importing, on_terminal

with importing(None, "encode"):
    from tqdm import tqdm


class Progress:
    """Texts, tokens a second and time left, on standard error.

    Args:
        total: texts in all.
        done: texts encoded by earlier runs.
        bar: a bar; by default where standard error is a terminal.
    """

    def __init__(self, total: int, done: int = 0, *, bar: bool | None = None) -> None:
        self.total, self.before, self.texts, self.tokens = total, done, 0, 0
        self.start = self.said = time.monotonic()
        self.wait = waiting.first(PROGRESS_EVERY)
        shown = on_terminal() if bar is None else bar
        form = "{n_fmt} of {total_fmt} texts {bar} {rate_fmt}{postfix}, {remaining} left"
        self.bar: Any = (
            tqdm(total=total, initial=done, unit=" texts", bar_format=form, file=sys.stderr, disable=False)
            if shown
            else None
        )

    def advance(self, texts: int, tokens: int | None) -> None:
        """So many more are encoded; ``tokens`` is None where nobody counts them."""
        self.texts += texts
        self.tokens += tokens or 0
        now = time.monotonic()
        if self.bar is not None:
            if self.tokens:
                self.bar.set_postfix_str(self._rate(self.tokens, now, "tokens"), refresh=False)
            self.bar.update(texts)
        elif now - self.said >= self.wait:
            self.said, self.wait = now, PROGRESS_EVERY
            waiting.say(self._line(now))

    def _rate(self, count: int, now: float, what: str) -> str:
        return f"{count / max(now - self.start, 1e-9):,.0f} {what}/s"

    def _line(self, now: float) -> str:
        if not self.texts:
            return f"{self.before:,} of {self.total:,} texts"
        rates = [self._rate(self.texts, now, "texts")]
        if self.tokens:
            rates.append(self._rate(self.tokens, now, "tokens"))
        done = self.before + self.texts
        left = (self.total - done) * (now - self.start) / self.texts
        return f"{done:,} of {self.total:,} texts, {', '.join(rates)}, {tqdm.format_interval(left)} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
