"""Files written by earlier code load, and give the bits they gave then: folders, pickles, a cache, exported programs.

``tests/data`` has the files and what they gave. Compiled kernels on stored hidden states must give the same bits everywhere;
encoders and plain PyTorch where processor and libraries are those of the record, elsewhere the same but for rounding.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
safetensors = pytest.importorskip("safetensors.torch")

from s2sent_kernels import backends  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
specification = importlib.util.spec_from_file_location("saved", DATA / "saved.py")
saved = importlib.util.module_from_spec(specification)
sys.modules["saved"] = saved
specification.loader.exec_module(saved)

RECORD = json.loads((DATA / "environment.json").read_text())
RELATIVE = 1e-5
# PyTorch summed the gradients of the gate's parameters when the record was made: those after df, and after dp and df.
SUMMED_BY_PYTORCH = re.compile(r"native gate_(backward [1-9]|pool_backward [2-9])")


def release(version):
    return tuple(int(number) for number in version.split("+")[0].split(".")[:2])


@pytest.fixture(scope="module")
def expected():
    return safetensors.load_file(DATA / "expected.safetensors")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as when the record was made: it decides how sums are split
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", saved.CASES)
@torch.no_grad()
def test_a_saved_file_gives_the_same_bits(name, expected, monkeypatch):
    if not backends()["native"].usable:
        if name.endswith("native"):
            pytest.skip("the compiled extension is not built")
        monkeypatch.setattr(saved, "BACKENDS", ("reference",))
    if name.startswith("exported") and release(torch.__version__) < release(RECORD["torch"]):
        pytest.skip(f"exported by torch {RECORD['torch']}")
    found = saved.CASES[name]()
    assert found
    same_environment = saved.environment() == RECORD
    for key, tensor in found.items():
        recorded = expected[f"{name}: {key}"]
        assert tensor.shape == recorded.shape and tensor.dtype == recorded.dtype, key
        if not SUMMED_BY_PYTORCH.match(key) and (same_environment or key.startswith("native")):
            assert torch.equal(tensor, recorded), key
        else:
            bound = RELATIVE * recorded.abs().max().clamp(min=1)
            assert (tensor - recorded).abs().max() <= bound, key


def test_the_record_holds_nothing_else(expected):
    assert {key.partition(":")[0] for key in expected} == set(saved.CASES)
