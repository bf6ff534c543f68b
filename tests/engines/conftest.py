"""What the kernels' tests share: the device, poisoned memory, small batches and the tolerance policy.

S2SENT_TEST_BACKEND names the backend under test: "triton", or "native", which runs on a GPU where there is one and the build
has a CUDA part, else on the CPU; S2SENT_TEST_DEVICE forces its device: "cpu" or "cuda".

Triton: with a GPU the kernels are compiled and run on it. Without one they run in Triton's interpreter, which a process must
choose before it first imports a kernel: ``make test`` sets TRITON_INTERPRET=1 and gives this directory a process of its
own. The interpreter takes tens of milliseconds per program, so shapes are tiny and combined in pairs.

Tolerance: the truth is the reference in float64 on the same (rounded) inputs; the yardstick is the reference in the
inputs' own dtype. See ``assert_as_close``.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from s2sent_kernels import GateParameters, backends
from s2sent_kernels.backend import native_cuda_refusal, triton_interprets

BACKEND = os.environ.get("S2SENT_TEST_BACKEND") or "triton"
if BACKEND not in ("triton", "native"):
    raise ValueError(f"S2SENT_TEST_BACKEND: expected 'triton' or 'native', got {BACKEND!r}")
NATIVE = BACKEND == "native"
INTERPRETED = not NATIVE and triton_interprets()


def _native_device() -> str:
    asked = os.environ.get("S2SENT_TEST_DEVICE")
    if asked:
        return asked
    usable = backends()["native"].usable and torch.cuda.is_available()
    return "cuda" if usable and native_cuda_refusal(None) is None else "cpu"


DEVICE = torch.device(_native_device() if NATIVE else "cpu" if INTERPRETED else "cuda")
NAN = float("nan")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# What a result of hidden states' dtype is judged in. The interpreter truncates where it stores bfloat16, a GPU rounds.
HIDDEN_DTYPES = (F32, F16) if INTERPRETED else (F32, F16, BF16)
POOLINGS = ("mean", "cls", "last")

if INTERPRETED:
    torch.set_num_threads(1)  # the tensors are tiny, and with pytest -n the threads would fight over the cores


def pytest_collection_modifyitems(items):
    if NATIVE:
        if backends()["native"].usable:
            return
        reason = backends()["native"].reason
    elif INTERPRETED or torch.cuda.is_available():
        return
    else:
        reason = "needs a CUDA device, or TRITON_INTERPRET=1 set before the start: see make test"
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh floating memory is NaN, so that an output that stays unwritten shows. ``monkeypatch.undo()`` lifts it."""

    def poisoned(create):
        @functools.wraps(create)
        def wrapper(*args, **kwargs):
            fresh = create(*args, **kwargs)
            if fresh.is_floating_point():
                with torch.no_grad():
                    fresh.fill_(NAN)
            return fresh

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


# ---------------------------------------------------------------- batches


class Batch(NamedTuple):
    hidden_states: list[Tensor]  # N x [B, L, D], or packed [T, D]
    where: dict[str, Tensor]  # attention_mask [B, L], or cu_seqlens [B + 1], or nothing
    real: Tensor  # bool [B, L] or [T]
    num_sentences: int


def make_mask(kind: str, B: int, L: int) -> Tensor:
    """[B, L] bool on the CPU. "mixed" is right, holed, empty, left, right, ... by rows."""
    place, row = torch.arange(L), torch.arange(B)[:, None]
    length = (L - row * 2).clamp(min=(L + 1) // 2)  # [B, 1]
    right, left = place < length, place >= L - length
    holes = ((place + row) % 3 != 1) & (place >= row)
    holes[:, L // 2] = True
    kinds = {"none": place >= 0, "right": right, "left": left, "holes": holes}
    if kind != "mixed":
        return kinds[kind].expand(B, L).clone()
    order = ("right", "holes", "empty", "left")
    kinds["empty"] = torch.zeros(B, L, dtype=torch.bool)
    return torch.stack([kinds[order[b % 4]].expand(B, L)[b] for b in range(B)])


def lay_out(values: Tensor, layout: str, index: int = 0) -> Tensor:
    """The same values under other strides or at another address; what lies around them is NaN."""
    shape = values.shape
    if layout == "different":
        layout = ("contiguous", "window", "column", "offset")[index % 4]
    if layout == "transposed":  # [L, B, D] in memory
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "column":  # features outermost in memory
        return values.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "offset":  # one element off every alignment
        result = values.new_full((values.numel() + 1,), NAN)[1:].view(shape)
        return result.copy_(values)
    if layout == "sliced":  # neither address nor row stride aligned
        return values.new_full((*shape[:-1], shape[-1] + 3), NAN)[..., 1:-2].copy_(values)
    if layout == "window":  # cut from a larger buffer, but aligned: read where it lies
        buffer = values.new_full((*shape[:-2], shape[-2] + 2, shape[-1] + 32), NAN)
        return buffer[..., : shape[-2], 16:-16].copy_(values)
    if layout == "expanded":  # the first sentence, or packed token, again and again
        return values[:1].expand(shape)
    assert layout == "contiguous"
    return values.contiguous()


def randn(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    """The same numbers on every device, but for rounding."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(DEVICE)


def make_batch(
    N: int,
    B: int,
    L: int,
    D: int,
    dtype: torch.dtype = F32,
    mask: str = "none",
    layout: str = "contiguous",
    seed: int = 0,
) -> Batch:
    """Standard normal hidden states. mask: "none", "right", "left", "holes", "mixed" (third row empty), or "packed":
    first an empty sentence, then B - 1 of L tokens and fewer."""
    if mask == "packed":
        lengths = torch.tensor([0] + [max(1, L - 2 * b) for b in range(B - 1)])
        ends = lengths.cumsum(0)
        shape = (int(ends[-1]), D)
        where = {"cu_seqlens": torch.cat([ends.new_zeros(1), ends]).to(torch.int32).to(DEVICE)}
        real = torch.ones(shape[0], dtype=torch.bool, device=DEVICE)
    else:
        shape = (B, L, D)
        real = make_mask(mask, B, L).to(DEVICE)
        where = {} if mask == "none" else {"attention_mask": real}
    values = [randn(*shape, seed=100 * seed + n, dtype=dtype) for n in range(N)]
    return Batch([lay_out(u, layout, n) for n, u in enumerate(values)], where, real, B)


def pack(hidden_states: list[Tensor], lengths: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The first ``lengths[b]`` tokens of [B, L, D] one sentence after another, [T, D], and their cu_seqlens."""
    packed = [torch.cat([u[0, :0], *(u[b, :length] for b, length in enumerate(lengths))]) for u in hidden_states]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return packed, {"cu_seqlens": ends.to(DEVICE)}


def make_parameters(
    N: int, D: int, H: int, dtype: torch.dtype = F32, *, norm: bool = True, prior: tuple[float, ...] | None = None
) -> GateParameters:
    """The gate's tensors, none of them at a special value. prior: repeated over the N blocks."""
    linear = [
        randn(H, D, seed=1) * D**-0.5, randn(H, seed=2), randn(N * D, H, seed=3) * H**-0.5 * 2, randn(N * D, seed=4)
    ]  # fmt: skip
    norms = [None] * 4
    if norm:
        norms = [randn(N * D, seed=5) + 1, randn(N * D, seed=6), randn(N * D, seed=7), randn(N * D, seed=8).exp()]
    block_prior = None if prior is None else torch.tensor([prior[n % len(prior)] for n in range(N)], device=DEVICE)
    return GateParameters(*(None if t is None else t.to(dtype) for t in (*linear, *norms, block_prior)))


def make_gradient(like: Tensor, kind: str, seed: int = 0) -> Tensor:
    """An output gradient: "random", "strided" (D outermost in memory) or "expanded" (zero strides but in D)."""
    values = randn(*like.shape, seed=900 + seed, dtype=like.dtype)
    if kind == "strided":
        return lay_out(values, "column")
    if kind == "expanded" and values.numel():
        return values.flatten(0, -2)[0].expand(values.shape)
    return values


# ---------------------------------------------------------------- tolerance


def assert_as_close(actual: Tensor, same_dtype: Tensor, truth: Tensor, name: str = "output", draws=()) -> None:
    """``actual`` is as close to the float64 ``truth`` as the policy asks, ``same_dtype`` being the yardstick.

        error(actual) <= 2 few error(same_dtype) + u size(truth)              in the root mean square
        largest error(actual) <= 4 (2 few largest error(same_dtype) + u largest size(truth))

    The factor two is the policy. The second term is what rounding alone may cost: with the unit roundoff u (half an
    ulp of 1) a correctly rounded result is off by at most u |x| in every element, so by at most u size(truth) in the
    mean. It is there because the yardstick may happen to be exact (one token, one block, a sum of two numbers) where
    another order of the same operations is not. u is that of the output's dtype, or of float32 where that is coarser
    (the float64 parameters of a gate that computes in float32).

    Rounding errors are random, and the mean of few of them is a noisy number. So the yardstick is taken over several
    ``draws``, further pairs (same_dtype, truth) of the same computation on slightly different inputs, and few =
    sqrt(1 + 4 / k) for a result of k elements, which leaves less than one false alarm in 10^5 even at k = 2. The second
    line finds the single wrong element that a mean would drown; its slack is for the same reason.

    Where the truth is zero but for its own rounding (up.bias under batch statistics), both errors are what is left of terms
    that cancel, and their ratio says little: twice the bound.

    NaN never passes: its comparison is false.
    """
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype}, expected {same_dtype.dtype}"
    if truth.numel() == 0:
        return
    u = max(torch.finfo(actual.dtype).eps, torch.finfo(F32).eps) / 2
    few = (1 + 4 / truth.numel()) ** 0.5
    errors = torch.stack([one.double() - other for one, other in ((same_dtype, truth), *draws)])
    for norm, slack in ((_rms, 1), (_largest, 4)):
        error, yardstick, size = norm(actual.double() - truth), norm(errors), norm(truth)
        noise = 2 if size < yardstick else 1
        bound = slack * (2 * noise * few * yardstick + u * size)
        assert error <= bound, f"{name}: {norm.__name__} {error:.3g} > {bound:.3g} ({yardstick=:.3g}, {size=:.3g})"


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def _jitter(t: Tensor, seed: int) -> Tensor:
    """``t`` up to a percent or so, in other memory."""
    return (t.double() * (1 + 0.01 * randn(*t.shape, seed=seed, dtype=torch.float64))).to(t.dtype)


def check(function, inputs, gradient="random", frozen=(), draws=3):
    """Hold ``function`` on BACKEND to the policy: its outputs, and the gradient of every input that is not ``frozen``.

    function(backend, inputs) returns outputs by name; ``inputs`` are tensors (or None) by name, whose strides are kept.
    Returns BACKEND's outputs and gradients by name.
    """
    given = None

    def run(backend, inputs, double=False):
        nonlocal given
        leaves = {
            name: t if t is None else (t.double() if double else t).detach().requires_grad_(name not in frozen)
            for name, t in inputs.items()
        }
        outputs = function(backend, leaves)
        found = {name: t.detach() for name, t in outputs.items()}
        if gradient is not None:
            if given is None:
                given = [make_gradient(t, gradient, seed) for seed, t in enumerate(outputs.values())]
            wanted = {f"gradient of {name}": t for name, t in leaves.items() if t is not None and t.requires_grad}
            grads = torch.autograd.grad(
                list(outputs.values()), list(wanted.values()), [g.double() if double else g for g in given]
            )
            found |= zip(wanted, grads, strict=True)
        return found

    actual = run(BACKEND, inputs)
    pairs = []
    for draw in range(1 + draws):
        if draw:
            moved = {name: t if t is None else _jitter(t, draw) for name, t in inputs.items()}
        else:
            moved = inputs
        pairs.append((run("reference", moved), run("reference", moved, double=True)))
    for name in actual:
        first, *others = [(same_dtype[name], truth[name]) for same_dtype, truth in pairs]
        assert_as_close(actual[name], *first, name, others)
    return actual
