"""Whole calls of the selector drawn by hypothesis, and the tensors that they stand for.

A ``Case`` is numbers and words alone, so that hypothesis can make it smaller and a person can send it to another: the tensors
follow from its ``seed``. ``as_json`` and ``from_json`` carry it over a command line.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import builders
import torch
from hypothesis import strategies as st
from torch import Tensor

from s2sent_kernels import GateParameters
from s2sent_kernels.formula import dct
from s2sent_kernels.formula.call import ACTIVATIONS, POOLINGS

MASKS = ("none", "right", "left", "holes", "packed")
MASK_DTYPES = ("bool", "int64", "uint8", "float32", "float16")
STRIDES = ("contiguous", "transposed", "column", "offset", "sliced", "cut", "window", "expanded", "different")
PRIORS = (None, 0.0, 1.0, 30.0, 1e3)
SCALES = (None, None, 0.0, 1.0, 4.0, -4.0, 1e2, -1e2)
FREQUENCIES = (1, 2, 3, 4, 5, 7, 8, 16, 32)
FROZEN = ("nothing", "parameters", "some hidden states", "hidden states")
MOST_VALUES = 30_000  # of the hidden states together, and of W2: a case takes milliseconds
LEAST_LOGARITHM = -20


class Case(NamedTuple):
    N: int
    B: int
    L: int
    D: int
    M: int
    H: int
    dtype: str  # of the hidden states
    magnitude: float  # of the hidden states
    parameter_dtype: str
    mask: str
    mask_dtype: str
    empty: bool  # some sentences have no real token
    strides: str
    profile: str
    norm: bool
    prior: float | None  # the size of its numbers
    scale: float | None
    activation: str
    pooling: str | None  # None: the fused tokens
    training: bool
    eps: float
    momentum: float
    module: bool  # S2SentSelector, or the public function
    gradient: str | None  # how the incoming one is laid out; None: the call records no gradient
    frozen: str
    seed: int

    def as_json(self) -> str:
        return json.dumps(self._asdict())

    @staticmethod
    def from_json(text: str) -> Case:
        return Case(**json.loads(text))

    @property
    def double(self) -> bool:
        return self.dtype == "float64"


@st.composite
def cases(draw: Any, dtypes: tuple[str, ...], small: bool = False) -> Case:
    """Every combination that is legal; ``small`` for Triton's interpreter, which needs milliseconds a program and truncates where
    it stores bfloat16."""

    def one(values: Any) -> Any:
        return draw(st.sampled_from(values))

    def size(least: int, most: int) -> int:
        return draw(st.integers(least, max(least, most)))

    N, B, L = (size(1, 3), size(0, 3), size(0, 6)) if small else (size(1, 30), size(0, 6), size(0, 40))
    mask = one(MASKS)
    profile = one(("paper", "paper", "paper", "official")) if mask != "packed" else "paper"
    if profile == "official":
        M = one(dct.OFFICIAL_FREQUENCIES)
    else:
        M = one([m for m in FREQUENCIES if m <= sum(x < N for x, _ in dct.FREQUENCY_TABLE)])
    most = 300 if small else MOST_VALUES
    D = M * size(1, min(48, most // max(1, N * B * L * M)))
    H = size(1, min(300, most // (N * D)))
    norm, training = draw(st.booleans()), draw(st.booleans())
    if norm and training and B == 1:
        B = 2  # one sentence has no statistics
    paper = profile == "paper"
    gradient = one((*builders.GRADIENTS, None))
    return Case(
        N=N,
        B=B,
        L=L,
        D=D,
        M=M,
        H=H,
        dtype=one(dtypes),
        magnitude=one((1.0, 1.0, 1e-3, 30.0)),
        parameter_dtype=one(("float32", "float32", "float16", "float64") + ("bfloat16",) * (not small)),
        mask=mask,
        mask_dtype=one(MASK_DTYPES),
        empty=draw(st.booleans()),
        strides=one(STRIDES),
        profile=profile,
        norm=norm,
        prior=one(PRIORS) if paper else None,
        scale=one(SCALES) if paper else None,
        activation=one(ACTIVATIONS),
        pooling=one((None, *POOLINGS)),
        training=training,
        eps=one((1e-6, 1e-5, 1e-2)),
        momentum=one((0.1, 0.9, 0.0, 1.0)),
        module=draw(st.booleans()),
        gradient=gradient,
        frozen="nothing" if gradient is None else one(("nothing", "nothing", *FROZEN)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


# What selects a compiled Triton kernel, fixed: a new one costs seconds of compiling. Together these have every mask and pooling,
# both profiles, three dtypes, both activations, a gate with and without each optional tensor, training, frozen hidden states, and
# sizes with and without vector loads. A process that draws from one of them compiles it once.
_PLAIN = {
    "N": 6, "D": 64, "M": 4, "H": 16, "dtype": "float32", "parameter_dtype": "float32", "mask": "right", "mask_dtype": "bool",
    "strides": "contiguous", "profile": "paper", "norm": True, "prior": 1.0, "scale": 4.0, "activation": "tanh",
    "pooling": "mean", "training": False, "module": False, "gradient": "random", "frozen": "nothing",
}  # fmt: skip
CONFIGURATIONS: tuple[dict[str, Any], ...] = tuple(
    _PLAIN | changed
    for changed in (
        {},
        {"mask": "packed", "dtype": "bfloat16", "N": 12, "module": True},
        {"mask": "holes", "pooling": None, "dtype": "float16"},
        {"mask": "left", "pooling": "last", "training": True, "N": 3, "D": 96, "M": 3, "H": 33},
        {"mask": "none", "pooling": "cls", "norm": False, "prior": None, "scale": None, "activation": "relu"},
        {"mask": "packed", "pooling": None, "N": 24, "D": 32, "training": True, "module": True},
        {"D": 21, "M": 3, "H": 5, "N": 8, "pooling": None, "mask_dtype": "int64"},
        {"profile": "official", "prior": None, "scale": None, "pooling": "mean", "N": 5},
        {"frozen": "some hidden states", "gradient": "strided", "strides": "window", "N": 7, "training": True},
        {"N": 1, "M": 1, "mask": "holes", "dtype": "bfloat16", "prior": None, "gradient": "expanded"},
    )
)


@st.composite
def cases_of(draw: Any, configuration: dict[str, Any], longest: int = 40) -> Case:
    """The cases of one of CONFIGURATIONS: lengths, masks and numbers are drawn."""
    least = 2 if configuration["norm"] and configuration["training"] else 0
    return Case(
        **configuration,
        B=draw(st.integers(least, 6)),
        L=draw(st.integers(0, longest)),
        magnitude=draw(st.sampled_from((1.0, 1.0, 1e-3, 30.0))),
        empty=draw(st.booleans()),
        eps=1e-6,
        momentum=0.1,
        seed=draw(st.integers(0, 2**31 - 1)),
    )


class Inputs(NamedTuple):
    hidden_states: list[Tensor]  # N x [B, L, D] or [T, D]
    where: dict[str, Tensor]
    parameters: GateParameters
    real: Tensor  # bool [B, L] on the CPU, of packed batches too

    def padded(self, values: Tensor) -> Tensor:
        """[B, L, ...] on the CPU; what padding holds in a packed batch is 0."""
        if "cu_seqlens" not in self.where:
            return values.cpu()
        result = values.new_zeros((*self.real.shape, *values.shape[1:]), device="cpu")
        result[self.real] = values.cpu()
        return result


def build(case: Case, device: torch.device | str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    N, B, L, D = case.N, case.B, case.L, case.D
    lengths = torch.randint(0 if case.empty else min(1, L), L + 1, (B, 1), generator=generator)
    place = torch.arange(L)
    if case.mask == "none":
        real = torch.ones(B, L, dtype=torch.bool)
    elif case.mask == "left":
        real = place >= L - lengths
    elif case.mask == "holes":
        real = torch.rand(B, L, generator=generator) < torch.rand(B, 1, generator=generator)
        if not case.empty:
            real[:, L // 2 : L // 2 + 1] = True
    else:
        real = place < lengths
    if case.empty and case.mask != "none":
        real &= torch.rand(B, 1, generator=generator) < 0.7
    packed = case.mask == "packed"
    shape = (int(real.sum()), D) if packed else (B, L, D)
    dtype = getattr(torch, case.dtype)

    def values() -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * case.magnitude).to(dtype)

    hidden_states = [builders.lay_out(values().to(device), case.strides, n).detach() for n in range(N)]
    where = {}
    if packed:
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), real.sum(1).cumsum(0)])
        where["cu_seqlens"] = ends.to(torch.int32).to(device)
    elif case.mask != "none":
        where["attention_mask"] = real.to(getattr(torch, case.mask_dtype)).to(device)
    parameters = builders.make_parameters(
        N, D, case.H, torch.float64, norm=case.norm, prior=case.prior is not None, scale=case.scale
    )
    drawn = torch.randn(N * D, generator=generator, dtype=torch.float64)
    parameters = parameters._replace(
        up_bias=drawn
    )  # else the parameters would be the same in every case of these sizes
    if parameters.block_prior is not None and case.prior is not None:
        drawn = torch.randn(N, generator=generator, dtype=torch.float64)
        parameters = parameters._replace(block_prior=drawn * case.prior)
    kept = torch.float64 if case.double else getattr(torch, case.parameter_dtype)
    return Inputs(hidden_states, where, parameters.each(lambda t: t.to(kept).to(device)), real)
