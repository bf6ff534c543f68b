"""What other libraries say unasked: the log of transformers and its hub while models are loaded, where what is wrong with one is
an error here; a warning of torch's exporter about itself."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from .files import require

P = ParamSpec("P")
T = TypeVar("T")


def quiet_transformers() -> Any:
    """The library transformers, silenced for good, as for a whole command. What a hub sends keeps its bar."""
    transformers = require("transformers", "transformers", "demo")
    transformers.logging.set_verbosity_error()
    _show_bars(transformers.logging, False)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return transformers


def quietly(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, during which transformers is silent. Its log is then its user's again, as it was."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            log: Any = importlib.import_module("transformers").logging
        except ImportError:  # which the function words
            return function(*args, **kwargs)
        hub = logging.getLogger("huggingface_hub")
        before = log.get_verbosity(), log.is_progress_bar_enabled(), hub.level
        quiet_transformers()
        try:
            return function(*args, **kwargs)
        finally:
            log.set_verbosity(before[0])
            _show_bars(log, before[1])
            hub.setLevel(before[2])

    return run


def without_bars(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, a loader, during which transformers has no bars for weights that it reads, unless its user has asked for its
    whole log (``transformers.logging.set_verbosity_info()``). Its warnings stay, and so does a hub's bar."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        log: Any = importlib.import_module("transformers").logging
        if log.get_verbosity() <= logging.INFO or not log.is_progress_bar_enabled():
            return function(*args, **kwargs)
        _show_bars(log, False)
        try:
            return function(*args, **kwargs)
        finally:
            _show_bars(log, True)

    return run


def _show_bars(log: Any, shown: bool) -> None:
    """Those of transformers alone, whose functions switch the hub's, too."""
    hub: Any = importlib.import_module("huggingface_hub.utils")
    of_hub = not hub.are_progress_bars_disabled()
    (log.enable_progress_bar if shown else log.disable_progress_bar)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # HF_HUB_DISABLE_PROGRESS_BARS decides, and says so
        (hub.enable_progress_bars if of_hub else hub.disable_progress_bars)()


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """In the ``with`` block torch's exporter does not warn of what it uses itself and torch will remove: whoever exports a model
    can do nothing about it. All other warnings stay."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield
