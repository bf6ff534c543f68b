"""A process's first call may be one that something traces: what is found out then holds for all later calls."""

import contextlib
import subprocess
import sys

import pytest
import torch

import s2sent_kernels as s2
from s2sent_kernels.engines.native import limits

BUILT = pytest.mark.skipif(not s2.backends()["native"].usable, reason=s2.backends()["native"].reason)
TRACERS = {
    "torch.jit.trace": "torch.jit.trace(module, states)",
    "torch.onnx.export, TorchScript": "torch.onnx.export(module, states, io.BytesIO(), dynamo=False)",
    "torch.export": "torch.export.export(module, states)",
    "make_fx": "make_fx(module)(*states)",
    "torch.fx": "torch.fx.symbolic_trace(module)",
    "torch.compile": "torch.compile(module, backend='eager', fullgraph=True)(*states)",
    "fake tensors": "with FakeTensorMode(allow_non_fake_inputs=True): module(*states)",
    "vmap": "torch.vmap(module)(*(state[None] for state in states))",
    "a mode of functions": "with torch.device('meta'): module(*states)",
}
SCRIPT = """
import contextlib, io, sys, threading, warnings
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from s2sent_kernels import S2SentSelector, backends

class Pool(torch.nn.Module):
    def forward(self, *states):
        with torch.no_grad():
            return selector.pool(states)

selector, module = S2SentSelector(32, 2, bottleneck=8).eval(), Pool()
states = (torch.randn(2, 4, 32), torch.randn(2, 4, 32))

def traced():
    with contextlib.suppress(Exception), warnings.catch_warnings():  # some tracers cannot record the call, which is no matter
        warnings.simplefilter("ignore")
        exec(sys.argv[1])

thread = threading.Thread(target=traced)  # a mode that a tracer leaves on ends with it
thread.start(), thread.join()
assert backends()["native"].usable, backends()["native"]
wanted = S2SentSelector(32, 2, bottleneck=8, backend="reference").eval()
wanted.load_state_dict(selector.state_dict())
with torch.no_grad():
    torch.testing.assert_close(selector.pool(states), wanted.pool(states), rtol=1e-5, atol=1e-6)
"""


@BUILT
@pytest.mark.parametrize("tracer", TRACERS)
def test_native_is_usable_after_a_first_call_that_is_traced(tracer):
    done = subprocess.run([sys.executable, "-c", SCRIPT, TRACERS[tracer]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


class _FakeOps:
    """The extension's, for a process with GPUs whose current device is ``current`` in a new thread."""

    def __init__(self, errors):
        self._errors, self.current, self.asked = list(errors), 0, []

    def cuda_architectures(self):
        return [90]

    def cuda_error(self, index):
        self.asked.append((index, self.current))
        return self._errors.pop(0)

    @contextlib.contextmanager
    def device(self, index):
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.fixture
def gpus(monkeypatch):
    """Makes fake GPUs whose kernels give these errors."""

    def make(errors):
        fake = _FakeOps(errors)
        monkeypatch.setattr(limits, "_ops", fake)
        monkeypatch.setattr(torch.cuda, "device", fake.device)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
        limits.cuda_refusal.cache_clear()
        return fake

    yield make
    limits.cuda_refusal.cache_clear()


def test_a_gpu_is_asked_while_it_is_the_current_one(gpus):
    """Else the extension would return to the first one, and CUDA would give that a context."""
    fake = gpus([""])
    assert limits.cuda_refusal(3) is None
    assert fake.asked == [(3, 3)]


def test_a_full_gpu_is_not_remembered(gpus):
    gpus(["out of memory", ""])
    with pytest.raises(torch.OutOfMemoryError, match="no kernel could be loaded on cuda:7"):
        limits.cuda_refusal(7)
    assert limits.cuda_refusal(7) is None
    gpus(["no kernel image"])
    assert limits.cuda_refusal(7) == limits.cuda_refusal(7) == "its kernels do not run on a GPU: no kernel image"
