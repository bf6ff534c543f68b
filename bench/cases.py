"""What is measured: the cases, their inputs, and the bytes and floors of each stage and path.

squeeze, gate, fuse   the three stages, as public functions (squeeze with mean pooling, as in the pooled path)
pooled, token         the whole selector: sentence embeddings [B, D], or fused tokens [B, L, D]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

STAGES = ("squeeze", "gate", "fuse")
PATHS = ("pooled", "token")
MODES = ("forward", "backward", "both", "training")  # training: both, with the batch's statistics
BOTTLENECK, FREQUENCIES = 64, 4  # the published defaults, H and M
MAIN = ("A", "B", "C", "D", "E")  # measured beside all competitors


@dataclass(frozen=True)
class Case:
    name: str
    batch: int  # B
    tokens: int  # L
    blocks: int  # N
    size: int  # D
    dtype: torch.dtype = torch.bfloat16
    layout: str = "full"  # or ragged (lengths uniform in L/4..L), or packed (the ragged sentences without padding)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape(self) -> list[int]:
        return [self.batch, self.tokens, self.blocks, self.size]

    @property
    def element(self) -> int:
        return self.dtype.itemsize

    def lengths(self) -> Tensor:
        """Real tokens of each sentence; layouts ragged and packed have the same ones."""
        if self.layout == "full":
            return torch.full((self.batch,), self.tokens)
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.tokens // 4, self.tokens + 1, (self.batch,), generator=generator)

    @property
    def real_tokens(self) -> int:  # T
        return int(self.lengths().sum())

    @property
    def state_bytes(self) -> int:
        """All N hidden states in memory, padding included."""
        places = self.real_tokens if self.layout == "packed" else self.batch * self.tokens
        return self.blocks * places * self.size * self.element


_A = Case("A", 256, 128, 12, 768)
CASES = (
    _A,
    replace(_A, name="A-float16", dtype=torch.float16),
    replace(_A, name="A-float32", dtype=torch.float32),
    replace(_A, name="A-ragged", layout="ragged"),
    replace(_A, name="A-packed", layout="packed"),
    Case("B", 64, 32, 3, 768),
    Case("C", 1, 32, 12, 768),
    Case("D", 32, 512, 24, 1024),
    Case("E", 256, 128, 6, 384),
)

# On a CPU, A with fewer sentences, in float32; B and C are small enough.
_SMALL = Case("A-small", 8, 128, 12, 768, torch.float32)
CPU_CASES = (
    _SMALL,
    replace(_SMALL, name="A-small-ragged", layout="ragged"),
    replace(_SMALL, name="A-small-packed", layout="packed"),
    Case("B", 64, 32, 3, 768, torch.float32),
    Case("C", 1, 32, 12, 768, torch.float32),
)


def cases_of(device: str) -> tuple[Case, ...]:
    return CASES if device == "cuda" else CPU_CASES


# Small calls, whose time on a GPU is the host's: compare.py and section "caller" measure that. On a CPU in float32.
HOST_CASES = (
    Case("C", 1, 32, 12, 768),
    Case("B", 64, 32, 3, 768),
    Case("E6", 32, 64, 6, 384),
    Case("G", 1, 16, 6, 384),
)
CALLER = ("C", "B", "E6", "A")  # whose eager calls have targets on a GPU


def host_cases_of(device: str) -> tuple[Case, ...]:
    return HOST_CASES if device == "cuda" else tuple(replace(case, dtype=torch.float32) for case in HOST_CASES)


def caller_cases_of(device: str) -> tuple[Case, ...]:
    if device == "cuda":
        known = {case.name: case for case in (*HOST_CASES, *CASES)}
        return tuple(known[name] for name in CALLER)
    return (*host_cases_of(device), _SMALL)


def sweeps_of(device: str) -> dict[str, tuple[Case, ...]]:
    """The cases of the two line pictures: A (on a CPU A-small) with other L, and with other N."""
    base = CASES[0] if device == "cuda" else _SMALL
    lengths = (16, 32, 64, 128, 256) if device == "cuda" else (16, 32, 64, 128)
    depths = (1, 3, 6, 12, 24) if device == "cuda" else (1, 3, 6, 12)
    return {
        "tokens": tuple(replace(base, name=f"tokens-{length}", tokens=length) for length in lengths),
        "blocks": tuple(replace(base, name=f"blocks-{depth}", blocks=depth) for depth in depths),
    }


class Inputs:
    """One set of inputs of a case: hidden states, mask, f, g, and output gradients."""

    def __init__(self, case: Case, seed: int, grad: bool, device: str | None = None) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator(device).manual_seed(seed)
        lengths = case.lengths()
        self.case, self.real_tokens = case, case.real_tokens
        self.mask: Tensor | None = None
        self.cu_seqlens: Tensor | None = None
        shape: tuple[int, ...] = (case.batch, case.tokens, case.size)
        if case.layout == "packed":
            shape = (self.real_tokens, case.size)
            self.cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32).to(device)
        else:
            self.mask = (torch.arange(case.tokens) < lengths[:, None]).long().to(device)

        def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

        gates = (case.batch, case.blocks, case.size)
        self.blocks = [normal(*shape, dtype=case.dtype).requires_grad_(grad) for _ in range(case.blocks)]
        self.squeezed = normal(case.batch, case.size).requires_grad_(grad)  # f, the gate stage's input
        self.gates = normal(*gates).softmax(1).requires_grad_(grad)  # g, the fuse stage's
        self.grad_pooled = normal(case.batch, case.size, dtype=case.dtype)
        self.grad_fused = normal(*shape, dtype=case.dtype)
        self.grad_squeezed, self.grad_gates = normal(case.batch, case.size), normal(*gates)

    def output_gradients(self, what: str) -> list[Tensor]:
        """The gradients of a stage's or path's outputs, in their order."""
        if what == "squeeze":
            return [self.grad_squeezed, self.grad_gates]  # df, and dp, which has the shape of the gates
        return [{"gate": self.grad_gates, "pooled": self.grad_pooled}.get(what, self.grad_fused)]

    def leaves(self, what: str) -> dict[str, Tensor]:
        """The inputs that a stage or path is differentiated by, without parameters."""
        if what == "gate":
            return {"f": self.squeezed}
        named = {f"u{n}": block for n, block in enumerate(self.blocks)}
        return named | ({"g": self.gates} if what == "fuse" else {})

    def double(self) -> Inputs:
        """The same (rounded) numbers in float64."""
        other = object.__new__(Inputs)
        other.__dict__.update(self.__dict__)
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(other, name, value.detach().double().requires_grad_(value.requires_grad))
        other.blocks = [u.detach().double().requires_grad_(u.requires_grad) for u in self.blocks]
        return other


def traffic(case: Case, what: str, mode: str) -> tuple[int, int]:
    """Bytes that a stage or path must read and write. A path counts hidden states and its result, the token path in two passes;
    f, p, gates and weights are left out. A stage also counts the f, p and gates that it reads or writes."""
    real = case.real_tokens * case.size * case.element  # one hidden state's real tokens
    places = case.state_bytes // case.blocks  # one hidden state, padding included
    sentence = case.batch * case.size  # elements of o, and of f
    gates = case.blocks * sentence * 4
    weights = 4 * BOTTLENECK * case.size * (1 + case.blocks)
    blocks = case.blocks
    forward, backward = {
        "pooled": ((blocks * real, sentence * case.element), (0, blocks * places)),
        "token": ((2 * blocks * real, places), ((blocks + 2) * real, blocks * places)),
        "squeeze": ((blocks * real, 4 * sentence + gates), (4 * sentence + gates, blocks * places)),
        "gate": ((4 * sentence + weights, gates), (gates + 4 * sentence + weights, 4 * sentence + weights)),
        "fuse": ((blocks * real + gates, places), ((blocks + 2) * real + gates, blocks * places + gates)),
    }[what]
    if mode in ("both", "training"):
        return forward[0] + backward[0], forward[1] + backward[1]
    return forward if mode == "forward" else backward


def floor_us(case: Case, what: str, mode: str, ceilings: dict[str, float]) -> float:
    """The bytes over the ceilings (TB/s) of the same run, in microseconds."""
    read, write = traffic(case, what, mode)
    return read / ceilings["read"] / 1e6 + write / ceilings["write"] / 1e6


def input_sets(case: Case, l2_bytes: int, device: str) -> int:
    """How many sets of inputs to rotate through, so that together they exceed the L2 cache. On a CPU, where a call of the
    smallest case takes milliseconds, at most four."""
    most = 192 if device == "cuda" else 4
    return max(1, min(most, -(-(l2_bytes + l2_bytes // 4) // case.state_bytes)))
