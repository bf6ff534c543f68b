"""Each hidden state's gradient is written once, and the pooled path saves no hidden state."""

import pytest
import torch
from builders import (
    assert_close,
    make_batch,
    make_gradient,
    make_parameters,
    pack,
    through_ops,
)
from torch.utils._python_dispatch import TorchDispatchMode

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector, functional
from s2sent_kernels.formula.call import Batch, Reading

# ---------------------------------------------------------------- each hidden state's gradient is written once


class Count(TorchDispatchMode):
    """Calls of squeeze_backward and squeeze, and whatever else adds or copies tensors shaped like a hidden state."""

    WATCHED = ("aten::add", "aten::mul", "aten::copy", "aten::clone", "aten::zeros_like")

    def __init__(self, shape):
        super().__init__()
        self.shape, self.writes, self.reads, self.extra = shape, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith("s2sent::squeeze_backward"):
            self.writes += 1
        elif name.startswith("s2sent::fuse_backward"):
            self.reads += 1
        elif isinstance(out, torch.Tensor) and out.shape == self.shape and name.startswith(self.WATCHED):
            self.extra.append(name)
        return out


def backward_calls(function, hidden_states):
    with Count(hidden_states[0].shape) as count:
        out = function(hidden_states)
        out.backward(make_gradient(out))
    assert all(u.grad is not None for u in hidden_states)
    return count


def test_the_count_sees_what_autograd_adds():
    """The positive control: squeeze and fuse as two ops write twice, and autograd adds."""
    hidden_states, mask = make_batch(3, 6, 5, 8, requires_grad=True)
    parameters = make_parameters(3, 8)

    def function(u):
        f, _ = torch.ops.s2sent.squeeze(u, mask, None, 4, "paper", None, "reference")
        g = s2.gate(f, parameters, num_blocks=3, backend="reference")
        return torch.ops.s2sent.fuse(u, mask, None, g, "reference")

    count = backward_calls(function, hidden_states)
    assert count.writes == 2
    assert count.extra.count("aten::add.Tensor") == 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate_function", ["fused", "modules"])
@pytest.mark.parametrize("gate_needs", [True, False])
def test_the_token_path_writes_once(gate_function, gate_needs, packed):
    torch.manual_seed(0)
    hidden_states, mask = make_batch(3, 6, 5, 8)
    cu_seqlens = None
    if packed:
        hidden_states, cu_seqlens = pack(hidden_states, mask)
        mask = None
    hidden_states = [u.requires_grad_() for u in hidden_states]
    parameters = make_parameters(3, 8, requires_grad=gate_needs)
    linear = torch.nn.Linear(8, 24).double().requires_grad_(gate_needs)

    def gate(f):
        if gate_function == "fused":
            return s2.gate(f, parameters, num_blocks=3, backend="reference")
        return linear(f).sigmoid().unflatten(1, (3, 8))

    def by_reference(u):
        return functional.select_with(gate, Batch(u, mask, cu_seqlens), Reading(4), "reference")

    by_reference(hidden_states).backward(make_gradient(hidden_states[0]))
    expected = [u.grad for u in hidden_states]
    for u in hidden_states:
        u.grad = None

    with pytest.MonkeyPatch.context() as monkeypatch:
        backend = through_ops(monkeypatch)
        count = backward_calls(
            lambda u: functional.select_with(gate, Batch(u, mask, cu_seqlens), Reading(4), backend), hidden_states
        )
    assert (count.writes, count.reads, count.extra) == (1, 1, [])
    for u, grad in zip(hidden_states, expected, strict=True):
        assert_close(u.grad, grad, 1e-12)


@pytest.mark.parametrize("pooling", [None, "mean", "cls"])
@pytest.mark.parametrize("profile", ["paper", "official"])
@pytest.mark.parametrize("training", [False, True])
def test_the_selector_writes_once(pooling, profile, training, monkeypatch):
    torch.manual_seed(0)
    selector = S2SentSelector(8, 3, 5, 4, profile=profile).double().train(training)
    selector.backend = through_ops(monkeypatch)
    hidden_states, mask = make_batch(3, 6, 5, 8, requires_grad=True)

    def function(u):
        return selector(u, mask) if pooling is None else selector.pool(u, mask, pooling=pooling)

    count = backward_calls(function, hidden_states)
    assert (count.writes, count.extra) == (1, [])
    assert count.reads == (1 if pooling is None else 0)  # the pooled backward reads no hidden state


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_the_pooled_path_saves_no_hidden_state(pooling, monkeypatch):
    selector = S2SentSelector(8, 3, 5, 4).double().eval()
    selector.backend = through_ops(monkeypatch)
    hidden_states, mask = make_batch(3, 6, 5, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = selector(hidden_states, mask) if pooling is None else selector.pool(hidden_states, mask)
    shapes = [t.shape for t in saved]
    assert shapes.count(hidden_states[0].shape) == (3 if pooling is None else 0)
    out.sum().backward()
