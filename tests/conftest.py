"""Threads, less garbage collection, one compilation of cards' template, and the backends "reference" and "op" as a fixture."""

import functools
import gc
import importlib.util
import os

import pytest
import torch
from builders import through_ops

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network, or waits for one
if os.environ.get("S2SENT_TEST_BACKEND") != "native":  # it divides work among threads itself
    torch.set_num_threads(1)  # the tensors are tiny, and under pytest -n the workers would compete for the cores


# Of minutes of CPU time each, or of tests that keep a worker for long.
LONG = (
    "project/test_compile_kernels.py",
    "project/test_build.py",
    "project/test_readme.py",
    "project/test_walkthrough.py",
    "project/test_servers_of_docs.py",
    "tools/test_resuming.py",
    "tools/test_saving.py",
    "tools/test_ray_engine.py",
    "tools/test_processes.py",
)


def pytest_collection_modifyitems(items):
    """The longest first. A worker without tests steals those that another has left, but not the one that it is in, nor the next:
    with long tests at the end a worker ran two minutes alone."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


def pytest_collection_finish(session):
    """The libraries' million objects live until the end: looking for garbage among them again and again was a fifth of the time.
    A test that needs garbage to be gone calls gc.collect, which finds what was made since."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def the_template_of_cards_is_compiled_once():
    """Whoever saves a model compiles its card's long template anew: more than half of the time of a small training, which saves
    its checkpoints."""
    if not importlib.util.find_spec("jinja2"):
        yield
        return
    import jinja2

    compile, known = jinja2.Environment.compile, {}

    @functools.wraps(compile)
    def once(self, source, *rest, **options):
        if rest or options or not isinstance(source, str):
            return compile(self, source, *rest, **options)
        if (self, source) not in known:
            known[self, source] = compile(self, source)
        return known[self, source]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", once)
        yield


@pytest.fixture(params=["reference", "op"])
def backend(request, monkeypatch):
    """The ``backend`` to pass. "op": through torch.ops.s2sent.* over the reference."""
    return "reference" if request.param == "reference" else through_ops(monkeypatch)
