"""Importing gives no warning. That it needs torch alone: tests/ops/test_choice.py."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import s2sent_kernels

PACKAGE = Path(s2sent_kernels.__file__).parent
# What modules of the package import of others, which may warn by themselves: imported before warnings are errors.
OTHERS = (
    "torch",
    "triton",
    "transformers",
    "sentence_transformers",
    "numpy",
    "matplotlib",
    "pyarrow",
    "datasets",
    "ray",
)
EVERY_MODULE = """
import pkgutil
for each in pkgutil.walk_packages(s2sent_kernels.__path__, "s2sent_kernels."):
    if not each.name.endswith("._C"):
        importlib.import_module(each.name)
"""


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)


def strictly(code, others):
    """The outcome of ``code`` where every warning is an error, after the ``others`` were imported."""
    before = "".join(f"import {name}\n" for name in others)
    return python(
        "-c", f"import importlib, warnings\n{before}warnings.simplefilter('error')\nimport s2sent_kernels\n{code}"
    )


def test_the_package_under_w_error():
    torch = python("-W", "error", "-c", "import torch")
    if torch.returncode:
        pytest.skip(f"torch itself warns: {torch.stderr.strip().splitlines()[-1]}")
    done = python("-W", "error", "-c", "import s2sent_kernels")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("extra", ["transformers", "sentence_transformers"])
def test_an_integration_with_every_warning_an_error(extra):
    pytest.importorskip(extra)
    done = strictly(f"import s2sent_kernels.{extra}", ["torch", extra])
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in OTHERS), reason="some module of the package lacks its extra here"
)
def test_every_module_with_every_warning_an_error():
    done = strictly(EVERY_MODULE, OTHERS)
    assert done.returncode == 0, done.stderr


def test_a_warning_would_be_seen():
    done = strictly("warnings.warn('seen')", ["torch"])
    assert done.returncode == 1 and "UserWarning: seen" in done.stderr


def test_no_source_compiles_with_a_warning():
    """Which a cached file would hide, as that of an invalid escape."""
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in sources:
            compile(path.read_text(encoding="utf-8"), path, "exec", dont_inherit=True)
