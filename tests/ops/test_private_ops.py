"""Ops survive whatever they are called with: the native backend's private ones, and the public backward ops, which no function
of ours calls with a wrong layout."""

import random
import subprocess
import sys
from pathlib import Path

import malformed
import pytest
import torch

import s2sent_kernels as s2

BUILT = pytest.mark.skipif(not s2.backends()["native"].usable, reason=s2.backends()["native"].reason)
BACKENDS = [name for name, status in s2.backends().items() if status.usable and name != "triton"]


@BUILT
def test_wrong_calls_of_the_private_ops_do_not_crash():
    script = Path(__file__).with_name("malformed.py")
    done = subprocess.run([sys.executable, script, "1000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]


@BUILT
@pytest.mark.parametrize(
    ("op", "changes"),
    [
        (op, {"cu_seqlens": torch.empty(0, dtype=torch.int32)})
        for op in ("squeeze", "squeeze_backward", "fuse", "fuse_backward")
    ]
    + [
        ("squeeze", {"first_block": 2**63 - 1}),
        ("squeeze", {"first_block": -1}),
        ("squeeze", {"num_blocks": 2**62}),
        ("squeeze", {"y": [0, -(2**63)]}),
        ("gate", {"num_blocks": 2**62, "squeezed": torch.rand(0, malformed.D)}),
        ("squeeze_backward", {"shape": [2**31, malformed.L, malformed.D]}),
        ("squeeze_backward", {"shape": [2**62, 2**62, malformed.D]}),
    ],
)
def test_the_private_ops_refuse(op, changes):
    call = malformed.Call(op, random.Random(0), packed="cu_seqlens" in changes)
    with pytest.raises(RuntimeError, match="s2sent_native: "):
        getattr(torch.ops.s2sent_native, op)(*(call.arguments | changes).values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(3, 4)}, r"attention_mask: expected shape \[B, L\] = \[3, 5\], got \[3, 4\]"),
        ({"shape": [3, 8]}, r"shape: expected \[B, L, D\], got \[3, 8\]"),
        ({"shape": [3, 5, 0]}, "the hidden size"),
        ({"needed": []}, "needed: expected an entry for each hidden state, got none"),
        ({"frequencies": 3}, "frequencies: "),
        ({"cu_seqlens": torch.empty(0, dtype=torch.int32), "shape": [15, 8]}, r"cu_seqlens: expected shape \[B \+ 1\]"),
        (
            {"cu_seqlens": torch.tensor([0, 5, 10, 16], dtype=torch.int32), "shape": [15, 8]},
            "cu_seqlens: expected to end at T = 15, got 16",
        ),
    ],
)
def test_squeeze_backward_judges_its_layout(backend, changes, message):
    arguments = {
        "grad_squeezed": torch.rand(3, 8),
        "grad_pooled": None,
        "grad_fused": None,
        "gates": None,
        "shape": [3, 5, 8],
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "needed": [True] * 4,
        "attention_mask": None,
        "cu_seqlens": None,
        "frequencies": 2,
        "profile": "paper",
        "pooling": None,
        "backend": backend,
    }
    assert [list(grad.shape) for grad in torch.ops.s2sent.squeeze_backward(**arguments)] == [[3, 5, 8]] * 4
    with pytest.raises(ValueError, match=message):
        torch.ops.s2sent.squeeze_backward(**arguments | changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fuse_backward_judges_what_cu_seqlens_holds(backend):
    hidden_states, grad = [torch.rand(15, 8) for _ in range(4)], torch.rand(15, 8)
    for values in ([0, 5, 10, 16], [0, 9, 3, 15], [1, 5, 10, 15]):
        with pytest.raises(ValueError, match="cu_seqlens: expected"):
            torch.ops.s2sent.fuse_backward(grad, hidden_states, None, torch.tensor(values, dtype=torch.int32), backend)
