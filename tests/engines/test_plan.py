"""The eager calls of a selector, whose plan is kept from call to call: the same bits as without one, and nothing stale."""

import copy
import gc
import pickle
import threading

import harness
import pytest
import torch
from harness import BACKEND, DEVICE, F32, INTERPRETED, make_selector, run
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

from s2sent_kernels import functional
from s2sent_kernels.formula.call import POOLINGS
from s2sent_kernels.plan import plan_of

# What a plan decides is decided before any kernel: the interpreter, which takes seconds a call, gets a sample.
POOLED = ("mean",) if INTERPRETED else ("mean", None)
MASKS = ("packed",) if INTERPRETED else ("none", "right", "left", "holes", "packed")
MASK_DTYPES = (
    (torch.int64, torch.float16)
    if INTERPRETED
    else (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.float16)
)


def make_batch(*shape, **options):
    """Hidden states, and the keyword arguments that tell which tokens are real."""
    batch = harness.make_batch(*shape, **options)
    return batch.hidden_states, batch.where


def without_plan(selector, hidden_states, where, pooling):
    """By the public op, which knows no selector."""
    parameters, eps = selector.gate_parameters(), 1e-6 if selector.norm is None else selector.norm.eps
    batch = hidden_states, where.get("attention_mask"), where.get("cu_seqlens")
    reading = (selector.frequencies,) if pooling is None else (selector.frequencies, pooling)
    op = torch.ops.s2sent.select if pooling is None else torch.ops.s2sent.select_pool
    return op(*batch, *parameters, *reading, selector.activation, eps, BACKEND)[0]


def assert_current(selector, batch, pooling):
    """A call of ``selector`` sees all that it is now. A copy has no plan yet."""
    fresh = copy.deepcopy(selector)
    assert "_plan" not in fresh.__dict__
    with torch.no_grad():
        assert torch.equal(run(selector, *batch, pooling), run(fresh, *batch, pooling))


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pooling", POOLED if INTERPRETED else [*POOLINGS, None])
def test_bits_are_those_of_a_call_without_plan(mask, pooling):
    selector = make_selector(backend=BACKEND, block_prior=True, gate_scale=4.0)
    hidden_states, where = make_batch(3, 3, 6, 24, mask=mask)
    with torch.no_grad():
        for _ in range(2):
            actual = run(selector, hidden_states, where, pooling)
            assert torch.equal(actual, without_plan(selector, hidden_states, where, pooling))
    assert selector.__dict__["_plan"] is plan_of(selector)


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("mask", ["right"] if INTERPRETED else ["right", "packed"])
def test_gradients_are_those_of_a_call_without_plan(mask, pooling):
    selector = make_selector(backend=BACKEND, block_prior=True, gate_scale=4.0)
    hidden_states, where = make_batch(3, 3, 6, 24, mask=mask)
    hidden_states = [u.requires_grad_(n != 1) for n, u in enumerate(hidden_states)]
    leaves = [hidden_states[0], hidden_states[2], *selector.parameters()]
    outputs = run(selector, hidden_states, where, pooling), without_plan(selector, hidden_states, where, pooling)
    assert torch.equal(*outputs)
    gradient = torch.linspace(-1, 1, outputs[0].numel(), device=DEVICE).view_as(outputs[0])
    ours, theirs = (torch.autograd.grad(output, leaves, gradient) for output in outputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pooling", POOLED)
def test_second_derivatives_are_refused(pooling, training):
    selector = make_selector(backend=BACKEND).train(training)
    hidden_states, where = make_batch(3, 2, 3, 24)
    leaf = hidden_states[0].requires_grad_()
    (first,) = torch.autograd.grad(run(selector, hidden_states, where, pooling).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


def test_a_second_derivative_by_the_parameters_is_refused_in_training():
    """Their gradients are the formula's, which knows only part of what they depend on."""
    selector, (hidden_states, _) = make_selector(backend=BACKEND).train(), make_batch(3, 4, 3, 24)
    output = run(selector, hidden_states, {}, "mean")
    (first,) = torch.autograd.grad(output.square().sum(), selector.up.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_masks_of_any_dtype(dtype):
    selector = make_selector(backend=BACKEND)
    hidden_states, _ = make_batch(3, 3, 6, 24)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], device=DEVICE)
    values = mask.to(dtype)
    if dtype.is_floating_point:
        values[0] *= 0.25
        values[1, 0] = -0.0
    for pooling in POOLED:
        with torch.no_grad():
            actual = run(selector, hidden_states, {"attention_mask": values}, pooling)
            assert torch.equal(actual, run(selector, hidden_states, {"attention_mask": mask.bool()}, pooling))


@pytest.mark.parametrize("layout", ["sliced"] if INTERPRETED else ["contiguous", "column", "sliced"])
@pytest.mark.parametrize("pooling", POOLED)
def test_strided_hidden_states_and_masks(layout, pooling):
    selector = make_selector(backend=BACKEND)
    hidden_states, where = make_batch(3, 2, 5, 24, mask="right", layout=layout)
    strided = where["attention_mask"].T.contiguous().T
    with torch.no_grad():
        expected = run(selector, [u.contiguous() for u in hidden_states], where, pooling)
        assert torch.equal(run(selector, hidden_states, {"attention_mask": strided}, pooling), expected)


# ---------------------------------------------------------------- nothing stale


def step(selector):
    optimizer = torch.optim.AdamW(selector.parameters(), lr=0.1)
    for parameter in selector.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def edit(selector):
    with torch.no_grad():
        selector.up.weight.mul_(2)
        selector.norm.running_var.add_(1)


def edit_data(selector):
    selector.down.weight.data.neg_()
    selector.block_prior.data[0] += 1
    if selector.gate_scale is not None:
        selector.gate_scale.data += 1


def other_data(selector):
    selector.up.bias.data = selector.up.bias.data + 1
    selector.norm.running_mean.data = selector.norm.running_mean.data - 1


def other_parameters(selector):
    selector.down.weight = nn.Parameter(selector.down.weight.detach() * 3)
    selector.norm.running_mean = selector.norm.running_mean + 1


def load_other_state(selector):
    selector.load_state_dict({name: tensor * 2 for name, tensor in selector.state_dict().items()})


def narrow(selector):
    """Pruned by slices of the same memory."""
    selector.down.weight.data = selector.down.weight.data[:3]
    selector.down.bias.data = selector.down.bias.data[:3]
    selector.up.weight.data = selector.up.weight.data[:, :3]


def assign(name, value):
    def change(selector):
        *parts, last = name.split(".")
        owner = selector
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, last, value)

    return change


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


CHANGES = {
    "optimiser step": step,
    "in place": edit,
    "in place through data": edit_data,
    "other data": other_data,
    "other parameters": other_parameters,
    "load_state_dict": load_other_state,
    "load_state_dict with assign": lambda s: s.load_state_dict(
        {k: t + 1 for k, t in s.state_dict().items()}, assign=True
    ),
    "half": lambda s: s.half(),
    "float64 and back": lambda s: s.double().float(),
    "pruned": narrow,
    "eps": assign("norm.eps", 0.5),
    "frequencies": assign("frequencies", 3),
    "activation": assign("activation", "relu"),
    "reference": assign("backend", "reference"),
    "another part": lambda s: setattr(s, "down", nn.Sequential(s.down)),
    "another linear": lambda s: setattr(s, "up", nn.Linear(5, 72, device=DEVICE)),
    "no norm": lambda s: setattr(s, "norm", None),
    "forward hook": lambda s: s.up.register_forward_hook(lambda module, args, output: 2 * output),
    "forward pre-hook": lambda s: s.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "parametrised": lambda s: parametrize.register_parametrization(s.down, "weight", Doubled()),
    "patched forward": lambda s: setattr(s.up, "forward", lambda x: nn.functional.linear(x, s.up.weight)),
}


@pytest.mark.parametrize("change", ["in place through data", "other data", "pruned"] if INTERPRETED else CHANGES)
@pytest.mark.parametrize("pooling", POOLED)
def test_changes_count_at_once(change, pooling):
    selector = make_selector(M=2, backend=BACKEND, block_prior=True)
    batch = make_batch(3, 2, 4, 24, mask="right")
    with torch.no_grad():
        before = run(selector, *batch, pooling)
    CHANGES[change](selector)
    if change not in (
        "parametrised",
        "patched forward",
        "forward hook",
        "forward pre-hook",
    ):  # a copy keeps none of these
        assert_current(selector, batch, pooling)
    with torch.no_grad():
        after = run(selector, *batch, pooling)
        expected = selector.gates(*batch[:1], **batch[1])
        pooled = functional.squeeze(batch[0], **batch[1], frequencies=selector.frequencies, pooling="mean")[1]
    if pooling is not None:
        torch.testing.assert_close(after, (expected * pooled).sum(1), rtol=1e-4, atol=1e-5)
    if change not in ("float64 and back", "half", "reference", "another part"):
        assert not torch.allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLED)
def test_the_mode_of_the_norm_counts_at_once(pooling):
    selector, batch = make_selector(backend=BACKEND), make_batch(3, 4, 4, 24)
    with torch.no_grad():
        before = run(selector, *batch, pooling)
        in_training = run(selector.train(), *batch, pooling)
        assert not torch.equal(before, in_training)
        assert_current(selector.eval(), batch, pooling)  # the running statistics moved
        assert not torch.equal(run(selector, *batch, pooling), before)


@pytest.mark.parametrize("pooling", POOLED)
def test_gradients_are_wanted_anew_at_each_call(pooling):
    selector, batch = make_selector(backend=BACKEND).requires_grad_(False), make_batch(3, 2, 4, 24)
    assert not run(selector, *batch, pooling).requires_grad
    selector.up.bias.requires_grad_()
    output = run(selector, *batch, pooling)
    (gradient,) = torch.autograd.grad(output.sum(), selector.up.bias)
    assert gradient.abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(run(selector, *batch, pooling), output)


def test_the_variable_counts_at_once(monkeypatch):
    selector, batch = make_selector(backend="auto"), make_batch(3, 2, 4, 24)
    with torch.no_grad():
        run(selector, *batch, "mean")
        monkeypatch.setenv("S2SENT_BACKEND", "no such")
        with pytest.raises(ValueError, match="S2SENT_BACKEND"):
            run(selector, *batch, "mean")
        monkeypatch.delenv("S2SENT_BACKEND")
        run(selector, *batch, "mean")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs two devices")
def test_moved_between_devices():
    selector, batch = make_selector(backend="auto"), make_batch(3, 2, 4, 24)
    with torch.no_grad():
        before = run(selector, *batch, "mean")
        there = [u.cpu() for u in batch[0]]
        with pytest.raises(ValueError, match="down_weight"):
            run(selector, there, {}, "mean")
        torch.testing.assert_close(run(selector.cpu(), there, {}, "mean").to(DEVICE), before)
        assert torch.equal(run(selector.to(DEVICE), *batch, "mean"), before)


# ---------------------------------------------------------------- errors, copies, threads


WRONG = {
    "another N": lambda states: (states[:2], {}),
    "another D": lambda states: ([u[..., :20].contiguous() for u in states], {}),
    "another shape": lambda states: ([*states[:2], states[2][:1]], {}),
    "another dtype": lambda states: ([*states[:2], states[2].double()], {}),
    "no tensor": lambda states: ([*states[:2], states[2].tolist()], {}),
    "a tensor": lambda states: (torch.stack(states), {}),
    "a rank less": lambda states: ([u[0] for u in states], {}),
    "mask of another shape": lambda states: (states, {"attention_mask": torch.ones(2, 3, device=DEVICE)}),
    "mask that is no tensor": lambda states: (states, {"attention_mask": [[1, 1, 1, 1]] * 2}),
    "complex mask": lambda states: (states, {"attention_mask": torch.ones(2, 4, dtype=torch.complex64, device=DEVICE)}),
    "both": lambda states: (
        [u[0] for u in states],
        {
            "attention_mask": torch.ones(2, 4, device=DEVICE),
            "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32, device=DEVICE),
        },
    ),
    "ends of another dtype": lambda states: (
        [u[0] for u in states],
        {"cu_seqlens": torch.tensor([0, 4], device=DEVICE)},
    ),
    "no ends": lambda states: (
        [u[0] for u in states],
        {"cu_seqlens": torch.empty(0, dtype=torch.int32, device=DEVICE)},
    ),
}
WRONG_ENDS = {"decreasing": [0, 3, 2, 4], "short": [0, 2], "late": [1, 4], "negative": [-1, 4], "long": [0, 9]}


@pytest.mark.parametrize("wrong", list(WRONG)[::5] if INTERPRETED else WRONG)
@pytest.mark.parametrize("pooling", POOLED)
def test_errors_are_those_of_the_first_call(wrong, pooling):
    hidden_states, _ = make_batch(3, 2, 4, 24)
    said = []
    for warm in (False, True):
        selector = make_selector(backend=BACKEND)
        with torch.no_grad():
            if warm:
                run(selector, hidden_states, {}, pooling)
            with pytest.raises((ValueError, TypeError)) as error:
                run(selector, *WRONG[wrong](hidden_states), pooling)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="values on a GPU are not looked at")
@pytest.mark.parametrize("ends", ["short"] if INTERPRETED else WRONG_ENDS)
@pytest.mark.parametrize("pooling", POOLED)
def test_wrong_ends_are_refused_at_every_call(ends, pooling):
    selector, (hidden_states, _) = make_selector(backend=BACKEND), make_batch(3, 1, 4, 24)
    packed = [u[0] for u in hidden_states]
    with torch.no_grad():
        run(selector, packed, {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, pooling)
        with pytest.raises(ValueError, match="cu_seqlens"):
            run(selector, packed, {"cu_seqlens": torch.tensor(WRONG_ENDS[ends], dtype=torch.int32)}, pooling)


@pytest.mark.parametrize("word", ["sum", None, 3, ["mean"]])
def test_an_unknown_pooling_is_an_error_at_every_call(word):
    selector, (hidden_states, _) = make_selector(backend=BACKEND), make_batch(3, 1, 4, 24)
    with torch.no_grad():
        selector.pool(hidden_states)
        with pytest.raises(ValueError, match="pooling"):
            selector.pool(hidden_states, pooling=word)


def test_copies_and_files_have_no_plan():
    selector, batch = make_selector(backend=BACKEND), make_batch(3, 2, 4, 24)
    with torch.no_grad():
        expected = run(selector, *batch, "mean")
        for copied in (copy.deepcopy(selector), copy.copy(selector), pickle.loads(pickle.dumps(selector))):
            assert "_plan" not in copied.__dict__
            assert torch.equal(run(copied, *batch, "mean"), expected)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter has one state for all threads")
def test_threads_share_a_selector():
    selector, batch = make_selector(backend=BACKEND), make_batch(3, 2, 4, 24)
    with torch.no_grad():
        expected = run(selector, *batch, "mean")
    found = []

    def work():
        with torch.no_grad():
            for turn in range(20):
                selector.__dict__.pop("_plan", None) if turn % 2 else None
                found.append(run(selector, *batch, "mean"))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 * 20 and all(torch.equal(one, expected) for one in found)


@pytest.mark.skipif(BACKEND != "native", reason="the compiled library keeps plans by number")
def test_the_library_forgets_a_plan_with_its_selector():
    selector, (hidden_states, _) = make_selector(backend=BACKEND), make_batch(3, 2, 4, 24, dtype=F32)
    pool = torch.ops.s2sent_native.planned_pool
    with torch.no_grad():
        expected = selector.pool(hidden_states)
    (how,) = selector.__dict__["_plan"]._hows.values()
    number = how.prepared._number
    assert torch.equal(pool(hidden_states, None, None, number, 1, False)[0], expected)
    del selector, how
    gc.collect()
    assert pool(hidden_states, None, None, number, 1, False) == []


def selector_with_a_plan():
    selector = make_selector(backend=BACKEND)
    with torch.no_grad():
        selector.pool(make_batch(3, 2, 4, 24, dtype=F32)[0])
    assert any(plan_of(selector)._hows.values())
    return selector


TRACERS = {
    "export": lambda module, x: torch.export.export(module, (x,), strict=False).graph,
    "make_fx": lambda module, x: make_fx(module)(x).graph,
    "jit": lambda module, x: torch.jit.trace(module, x, check_trace=False).graph,
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_plan_that_goes_while_something_is_traced_leaves_no_trace(tracer):
    dying = [selector_with_a_plan()]

    class Doubling(nn.Module):
        def forward(self, x):
            dying.clear()
            gc.collect()
            return 2 * x

    assert "s2sent" not in str(TRACERS[tracer](Doubling(), torch.ones(2)))
    assert dying == []
