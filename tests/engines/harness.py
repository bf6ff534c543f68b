"""What the engines' tests share: the engine under test, its device, builders on that device, and the tolerance policy.

S2SENT_TEST_BACKEND names the engine, any but the plain one ("triton" if unset). It runs on a GPU if there is one that it can
use, else on the CPU; S2SENT_TEST_DEVICE forces its device: "cpu" or "cuda".

Triton: with a GPU the kernels are compiled and run on it. Without one they run in Triton's interpreter, which a process must
choose before it first imports a kernel: ``make test`` sets TRITON_INTERPRET=1 and gives this folder a process of its own. The
interpreter needs tens of milliseconds per program, so shapes are tiny and parameters combined in pairs.

Tolerance: the truth is the reference in float64 on the same (rounded) inputs; the yardstick is the reference in the inputs'
own dtype. See ``assert_as_close``.
"""

import os

import builders
import torch
from builders import Batch, Packed, make_gradient
from torch import Tensor

from s2sent_kernels import GateParameters, S2SentSelector
from s2sent_kernels.engines.choice import BACKENDS, LIMITS
from s2sent_kernels.engines.triton.limits import triton_interprets
from s2sent_kernels.formula.call import KERNEL_DTYPES, Call

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BACKEND = os.environ.get("S2SENT_TEST_BACKEND") or "triton"
TESTED = tuple(name for name in BACKENDS if name != "reference")
if BACKEND not in TESTED:
    raise ValueError(f"S2SENT_TEST_BACKEND: expected one of {TESTED}, got {BACKEND!r}")
INTERPRETED = BACKEND == "triton" and triton_interprets()


def _device() -> str:
    if INTERPRETED:
        return "cpu"
    asked = os.environ.get("S2SENT_TEST_DEVICE")
    if asked:
        return asked
    refused = not torch.cuda.is_available() or LIMITS[BACKEND].refuses(Call(torch.device("cuda"), F32))
    return "cpu" if refused else "cuda"


DEVICE = torch.device(_device())
# The dtypes whose results are compared. The interpreter truncates where it stores bfloat16, a GPU rounds.
HIDDEN_DTYPES = tuple(dtype for dtype in KERNEL_DTYPES if not (INTERPRETED and dtype == BF16))
SIZE = 24  # of hidden states, where a test needs no other

# ---------------------------------------------------------------- builders on DEVICE, in float32 unless told otherwise


def randn(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return builders.randn(*shape, seed=seed, dtype=dtype, device=DEVICE)


def make_batch(
    N: int,
    B: int,
    L: int,
    D: int,
    dtype: torch.dtype = F32,
    mask: str = "none",
    layout: str = "contiguous",
    seed: int = 0,
) -> Batch | Packed:
    """Lengths depend on the row alone."""
    return builders.make_batch(N, B, L, D, dtype, mask, layout, device=DEVICE, seed=seed, drawn_lengths=False)


def pack(hidden_states: list[Tensor], lengths: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The first ``lengths[b]`` tokens of [B, L, D] one sentence after another, [T, D], and their cu_seqlens."""
    L = hidden_states[0].shape[1]
    mask = torch.arange(L, device=DEVICE) < torch.tensor(lengths, dtype=torch.int64, device=DEVICE)[:, None]
    packed = builders.pack([u[: len(lengths)] for u in hidden_states], mask)
    return packed.hidden_states, packed.where


def make_parameters(N: int, D: int, H: int, dtype: torch.dtype = F32, **options) -> GateParameters:
    """Of every dtype the same numbers, rounded from float32: the precision in which the engines compute."""
    return builders.make_parameters(N, D, H, F32, device=DEVICE, **options).each(lambda tensor: tensor.to(dtype))


def make_selector(N: int = 3, D: int = SIZE, M: int = 2, *, H: int = 5, **options) -> S2SentSelector:
    return builders.make_selector(N, D, M, H=H, dtype=F32, device=DEVICE, **options)


def run(selector, hidden_states, where, pooling):
    """pooling: of S2SentSelector.pool; None for the fused tokens, "gates" for the gates."""
    if pooling == "gates":
        return selector.gates(hidden_states, **where)
    if pooling is None:
        return selector(hidden_states, **where)
    return selector.pool(hidden_states, pooling=pooling, **where)


# ---------------------------------------------------------------- tolerance


def assert_as_close(actual: Tensor, same_dtype: Tensor, truth: Tensor, name: str = "output", draws=()) -> None:
    """``actual`` is as close to the float64 ``truth`` as the policy asks, ``same_dtype`` being the yardstick.

        error(actual) <= 2 few error(same_dtype) + u size(truth)              in the root mean square
        largest error(actual) <= 4 (2 few largest error(same_dtype) + u largest size(truth))

    The factor two is the policy. The second term allows for rounding alone: with the unit roundoff u (half an
    ulp of 1) a correctly rounded result is off by at most u |x| in every element, so by at most u size(truth) in the
    mean. It is needed because the yardstick may happen to be exact (one token, one block, a sum of two numbers) where
    another order of the same operations is not. u is that of the output's dtype, or of float32 where that is coarser
    (the float64 parameters of a gate that computes in float32).

    Rounding errors are random, and the mean of few of them is a noisy number. So the yardstick is taken over several
    ``draws``, further pairs (same_dtype, truth) of the same computation on slightly different inputs, and few =
    sqrt(1 + 4 / k) for a result of k elements, which leaves less than one false alarm in 10^5 even at k = 2. The second
    line finds a single wrong element, which a mean would hide; its slack has the same reason.

    Where the truth is zero up to its own rounding (up.bias under batch statistics), both errors are remainders of terms that
    cancel, and their ratio means little: twice the bound.

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
    """``t`` with each element changed by about a percent, in other memory."""
    return (t.double() * (1 + 0.01 * randn(*t.shape, seed=seed, dtype=torch.float64))).to(t.dtype)


def check(function, inputs, gradient="random", frozen=(), draws=3):
    """Assert the policy for ``function`` on BACKEND: its outputs, and the gradient of every input that is not ``frozen``.

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
