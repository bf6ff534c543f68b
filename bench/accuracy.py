"""How far results are from float64: every backend that is usable here, beside PyTorch in the same dtype on the same device.

    python bench/accuracy.py [--dtypes float32,bfloat16] [--blocks 1,3,6] [--tokens 16,128] [--jobs 4] [--output FILE]

Writes bench/results/accuracy/<device>.json; bench/report_accuracy.py makes bench/ACCURACY.md of it. Minutes on a CPU. On a GPU
most of the time is Triton's compiling, a process for each number of blocks.

The truth is the reference in float64 on the same (rounded) inputs. The yardstick is bench/eager.py: the formulas in the hidden
states' own dtype. Both are judged by tolerance.py's root mean squares, as everywhere in bench/, and in the largest element,
because a mean would hide a single wrong one. Errors are in units of what the rounding of the result alone may cause: the unit
roundoff (half an ulp of 1) times the tensor's size in the same norm. A ratio is ours over the larger of the yardstick's error
and one such unit: below that no result can be told from one that is computed exactly and rounded. It is divided by tolerance.py's
factor for few elements, whose mean error is noisy.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
from eager import EPS, Eager
from suite import Parser, guarded
from timing import on_gpu
from tolerance import Sums
from torch import Tensor

from s2sent_kernels import GateParameters, backends, functional

SECTION = "accuracy"
SENTENCES, SIZE, FREQUENCIES, WIDTH = 2, 64, 4, 16  # B, D, M, H: one kernel of each kind for every N and dtype
TOKENS = (16, 128, 512, 2048, 8192)  # L
BLOCKS = (1, 3, 6, 12, 24, 48)  # N
MIDDLE = 6
MAGNITUDES = (1e-6, 1e-3, 1.0, 1e2, 1e4)
DTYPES = ("float32", "bfloat16")
# ordinary: standard normal. huge token: one token of each sentence is 10^4 times as large. similar tokens: every token is the
# sentence's own vector but for a percent, as in a repeated word, so that roundings add up instead of cancelling.
KINDS = ("ordinary", "huge token", "similar tokens")
PRIOR_AND_SCALE = "d prior, scale"  # sums of terms that cancel
LIMIT = 1.5
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    tokens: int
    blocks: int
    kind: str
    magnitude: float
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.dtype}, L = {self.tokens}, N = {self.blocks}, {self.kind}, {self.magnitude:g}"


def cases(
    dtypes: Sequence[str] = DTYPES, blocks: Sequence[int] = BLOCKS, tokens: Sequence[int] = TOKENS
) -> Iterator[Case]:
    """Every L and magnitude at N = 6, every N at L = 512 and 2048, and the longest and deepest once. In a 16-bit dtype, whose
    rounding hides that of the sums, L = 16 and 2048 at N = 6, and every N at L = 512."""
    for dtype in dtypes:
        wide = dtype == "float32"
        for depth, length, kind in itertools.product(blocks, tokens, KINDS):
            if depth == MIDDLE and (wide or length in (16, 2048)):
                yield from (Case(length, depth, kind, size, dtype) for size in MAGNITUDES)
            elif (length == 512 or (wide and length == 2048)) or (
                wide and (depth, length, kind) == (BLOCKS[-1], TOKENS[-1], KINDS[-1])
            ):
                yield Case(length, depth, kind, 1.0, dtype)


@dataclass
class Inputs:
    hidden: list[Tensor]
    real: Tensor  # bool [B, L]
    parameters: GateParameters
    grad_pooled: Tensor
    grad_fused: Tensor

    def double(self) -> Inputs:
        wide = [t.double() for t in self.hidden]
        parameters = self.parameters.each(Tensor.double)
        return Inputs(wide, self.real, parameters, self.grad_pooled.double(), self.grad_fused.double())


def draw(case: Case, seed: int, device: str) -> Inputs:
    """Drawn on the CPU, so that every device gets the same numbers. The second sentence is padded."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * size

    lengths = torch.tensor([[case.tokens], [max(1, case.tokens * 3 // 4 - 1)]])
    hidden = []
    for _ in range(case.blocks):
        u = normal(SENTENCES, case.tokens, SIZE)
        if case.kind == "huge token":
            u[:, case.tokens // 3] *= 1e4
        elif case.kind == "similar tokens":
            u = normal(SENTENCES, 1, SIZE) * (1 + 0.01 * u)
        hidden.append((u * case.magnitude).to(dtype))
    real = torch.arange(case.tokens) < lengths
    f, _ = functional.squeeze([u.double() for u in hidden], real, frequencies=FREQUENCIES, backend="reference")
    both = case.blocks * SIZE
    parameters = GateParameters(
        normal(WIDTH, SIZE, size=SIZE**-0.5 / _size(f)),  # no tanh is saturated: 1 - s^2 would be rounding alone
        normal(WIDTH, size=0.1),
        normal(both, WIDTH, size=WIDTH**-0.5),
        normal(both, size=0.1),
        1 + normal(both, size=0.1),
        normal(both, size=0.1),
        normal(both, size=0.1),
        torch.rand(both, generator=generator) + 0.5,
        normal(case.blocks),
        torch.tensor(4.0),
    ).each(lambda tensor: tensor.to(device, dtype))
    grads = normal(SENTENCES, SIZE), normal(SENTENCES, case.tokens, SIZE)
    return Inputs(
        [u.to(device) for u in hidden], real.to(device), parameters, *(grad.to(device, dtype) for grad in grads)
    )


# ---------------------------------------------------------------- results by name


def _gradients(output: Tensor, grad: Tensor, hidden: list[Tensor], parameters: GateParameters) -> Found:
    named = {name: t for name, t in parameters._asdict().items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(output, [*hidden, *named.values()], grad)
    return {"hidden states": torch.stack(grads[: len(hidden)]), **dict(zip(named, grads[len(hidden) :], strict=True))}


def _leaves(inputs: Inputs) -> tuple[list[Tensor], GateParameters]:
    hidden = [u.detach().requires_grad_() for u in inputs.hidden]
    named = inputs.parameters._asdict().items()
    return hidden, GateParameters(**{n: t.detach().requires_grad_(not n.startswith("running")) for n, t in named})


def _with_gradients(
    found: Found, what: str, output: Tensor, grad: Tensor, leaves: tuple[list[Tensor], GateParameters]
) -> None:
    found[what] = output.detach()
    found |= {f"gradient of {name}, {what}": t for name, t in _gradients(output, grad, *leaves).items()}


def of_backend(inputs: Inputs, backend: str) -> Found:
    mask, options = inputs.real, {"frequencies": FREQUENCIES, "backend": backend}
    found: Found = {}
    with torch.no_grad():
        f, p = functional.squeeze(inputs.hidden, mask, pooling="mean", **options)
        found |= {"f": f, "p": p}
        found["gates"] = functional.gate(f, inputs.parameters, num_blocks=len(inputs.hidden), eps=EPS, backend=backend)
    hidden, parameters = leaves = _leaves(inputs)
    output = functional.select_pool(hidden, parameters, mask, eps=EPS, **options)
    _with_gradients(found, "pooled", output, inputs.grad_pooled, leaves)
    hidden, parameters = leaves = _leaves(inputs)
    output = functional.select(hidden, parameters, mask, eps=EPS, **options)
    _with_gradients(found, "tokens", output, inputs.grad_fused, leaves)
    return found


def of_eager(inputs: Inputs) -> Found:
    blocks = len(inputs.hidden)
    formula = Eager(inputs.real, blocks, FREQUENCIES, inputs.hidden[0].dtype)
    found: Found = {}
    for what, grad in (("pooled", inputs.grad_pooled), ("tokens", inputs.grad_fused)):
        hidden, parameters = leaves = _leaves(inputs)
        f, p = formula.squeeze(hidden)
        g = formula.gate(f, parameters, blocks)
        found |= {"f": f.detach(), "p": p.detach(), "gates": g.detach()}
        output = (g * p).sum(1) if what == "pooled" else formula.fuse(hidden, g)
        _with_gradients(found, what, output, grad, leaves)
    return found


# ---------------------------------------------------------------- errors


class Both:
    """tolerance.py's sums of one result, and its largest errors."""

    def __init__(self) -> None:
        self.sums = Sums()
        self.largest = self.eager_largest = self.size = 0.0

    def add(self, actual: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
        # f, p and gates are float32 for hidden states of 16 bits, too. Eager's are not, and both are judged in its dtype.
        actual = actual.to(same_dtype.dtype)
        self.sums.add(actual, same_dtype, truth)
        self.largest = _worst(self.largest, _largest(actual.double() - truth))
        self.eager_largest = _worst(self.eager_largest, _largest(same_dtype.double() - truth))
        self.size = max(self.size, _largest(truth))


class Errors(NamedTuple):
    """Of a quantity in one case, in units of the results' own rounding."""

    ours: float  # root mean squares
    eager: float
    largest: float
    eager_largest: float
    few: float  # of tolerance.py

    @property
    def ratio(self) -> float:
        return self.ours / max(1.0, self.eager) / self.few

    @property
    def ratio_of_largest(self) -> float:
        return self.largest / max(1.0, self.eager_largest) / self.few


def errors_of(results: Sequence[Both]) -> Errors:
    """Of the tensors of a quantity together, each in its own units."""
    squares = [0.0, 0.0]
    largest = [0.0, 0.0]
    for one in results:
        unit, most = one.sums.roundoff * one.sums.size**0.5, one.sums.roundoff * one.size
        for i, error in enumerate((one.sums.error, one.sums.yardstick)):
            squares[i] += error / unit**2 if unit else float(error != 0)
        for i, error in enumerate((one.largest, one.eager_largest)):
            largest[i] = _worst(largest[i], error / most if most else float(error != 0))
    few = (1 + 4 / sum(one.sums.carriers for one in results)) ** 0.5
    found = (*((square / len(results)) ** 0.5 for square in squares), *largest, few)
    return Errors(*(float(f"{value:.3g}") for value in found))


def _worst(one: float, other: float) -> float:
    """The larger; NaN is the largest."""
    return one if one != one or one > other else other


def _largest(values: Tensor) -> float:
    return float(values.abs().amax())  # a NaN stays one


def _size(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def quantity(name: str) -> str:
    """What the result ``name`` is counted as in the table."""
    if not name.startswith("gradient"):
        return name
    tensor, _, what = name.removeprefix("gradient of ").rpartition(", ")
    if tensor in ("block_prior", "gate_scale"):
        return PRIOR_AND_SCALE
    return f"d {'hidden' if tensor == 'hidden states' else 'weights'}, {what}"


def measure(case: Case, names: Sequence[str], device: str) -> Iterator[record.Row]:
    """A row a backend."""
    found: dict[str, dict[str, Both]] = {name: {} for name in names}
    for seed in range(draws(case)):
        inputs = draw(case, seed, device)
        same_dtype, truth = of_eager(inputs), of_backend(inputs.double(), "reference")
        for name in names:
            for what, actual in of_backend(inputs, name).items():
                found[name].setdefault(what, Both()).add(actual, same_dtype[what], truth[what])
    for name in names:
        grouped: dict[str, list[Both]] = {}
        for what, both in found[name].items():
            grouped.setdefault(quantity(what), []).append(both)
        yield {
            "section": SECTION, "case": case.name, "what": "selector", "mode": "eval", "contestant": name, "status": "ok",
            **dataclasses.asdict(case), "errors": {what: errors_of(group) for what, group in grouped.items()},
        }  # fmt: skip


def usable(device: str) -> list[str]:
    """Every backend but Triton's interpreter, which truncates."""
    return [name for name, status in backends().items() if status.usable and (device == "cuda" or name != "triton")]


def draws(case: Case) -> int:
    """Fewer of large batches, which take time."""
    return max(1, min(8, 2**14 // (case.tokens * case.blocks)))


def measure_all(chosen: Sequence[Case], device: str) -> list[record.Row]:
    torch.set_num_threads(1)  # the sizes are small, and the processes compete for the cores
    rows: list[record.Row] = []
    for case in chosen:
        begin = time.monotonic()
        rows += measure(case, usable(device), device)
        print(f"{case.name}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    return rows


def run(arguments: argparse.Namespace) -> int:
    device = "cuda" if on_gpu() else "cpu"
    chosen = list(cases(arguments.dtypes, arguments.blocks, arguments.tokens))
    jobs = arguments.jobs or (12 if device == "cuda" else 1)
    path = arguments.output or record.RESULTS / "accuracy" / f"{record.slug()}.json"
    results = record.Record(path, record.environment(), record.slug())
    # A job has all cases of some N and dtype, which share their kernels.
    parts: dict[tuple[str, int], list[Case]] = {}
    for case in chosen:
        parts.setdefault((case.dtype, case.blocks), []).append(case)
    shares = sorted(parts.values(), key=lambda part: -part[0].blocks)
    if jobs == 1:
        for part in shares:
            results.add(measure_all(part, device))
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
            for rows in pool.map(measure_all, shares, [device] * len(shares)):
                results.add(rows)
    judged = [
        (row, what, Errors(*of))
        for row in results.rows
        for what, of in row["errors"].items()
        if what != PRIOR_AND_SCALE
    ]
    beyond = [one for one in judged if not one[2].ratio <= LIMIT]
    for row, what, of in sorted(beyond, key=lambda one: one[2].ratio)[-10:]:
        print(f"{of.ratio:6.2f}  {row['contestant']}, {what}: {row['case']}", flush=True)
    print(f"{path}: {len(judged)} results, {len(beyond)} beyond {LIMIT} times eager PyTorch's error", flush=True)
    return 0


def _list(kind: type) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", type=_list(str), default=DTYPES, help="separated by commas")
    parser.add_argument("--blocks", type=_list(int), default=BLOCKS, help="N, separated by commas")
    parser.add_argument("--tokens", type=_list(int), default=TOKENS, help="L, separated by commas")
    parser.add_argument(
        "--jobs", type=int, default=0, help="processes (default: 12 on a GPU, which compile; 1 on a CPU)"
    )
    parser.add_argument("--output", type=Path, help="default: bench/results/accuracy/<device>.json")
    arguments = parser.parse_args(argv)
    return guarded("accuracy", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
