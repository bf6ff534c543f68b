"""Measures the package in TREE and writes samples to a file. bench/compare.py runs it once for each tree and round.

    PYTHONPATH=TREE python bench/measure.py OUTPUT.json [--rows PATTERNS] [--cases NAMES] [--backends NAMES] [--check]

It must run on older trees, so it uses the package's public API alone, and of bench/ only modules that do not import the package.

A row is named function/mode/clock/case/backend:

    function   squeeze, gate, fuse, select, select_pool; tokens, pool (S2SentSelector's forward and pool); capture
               (BlockCapture.pool on a small encoder)
    mode       eval: no gradients; gradient: forward + backward in eval mode; training: the same in training mode
    clock      device: graph replays on a GPU, wall time on a CPU; host: what one eager call costs its caller, who does not wait
               for the GPU; wall: one eager call until its result is ready
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import BOTTLENECK, FREQUENCIES, Case, Inputs, cases_of, host_cases_of, input_sets
from timing import describe, device_samples, host_time, l2_bytes, on_gpu, synchronise, wall_time
from tolerance import Sums, judge, outputs_and_gradients
from torch import Tensor

import s2sent_kernels
from s2sent_kernels import GateParameters, S2SentSelector, backends, functional

FUNCTIONS = ("squeeze", "gate", "fuse", "select", "select_pool")
METHODS = ("tokens", "pool")
WHAT = {"select": "token", "tokens": "token", "select_pool": "pooled", "pool": "pooled"}  # the names of cases.py
# Device time: the cases whose traffic differs in kind. All names of cases_of can be chosen.
USUAL = ("A", "A-packed", "B", "C", "A-small", "A-small-packed")
REPEATS = 30
Outputs = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Row:
    function: str
    mode: str
    clock: str
    case: Case
    backend: str

    @property
    def name(self) -> str:
        return "/".join((self.function, self.mode, self.clock, self.case.name, self.backend))

    @property
    def what(self) -> str:
        return WHAT.get(self.function, self.function)

    def matches(self, patterns: Sequence[str]) -> bool:
        """A pattern is a shell pattern of the whole name, or one part of it."""
        parts = self.name.split("/")
        return any(pattern in parts or fnmatch.fnmatchcase(self.name, pattern) for pattern in patterns)


# ---------------------------------------------------------------- which rows


def rows_of(device: str, chosen: Sequence[str] | None, named: Sequence[str] | None) -> Iterator[Row]:
    """Device rows on compiled backends, or on the reference where none is usable; host rows on every backend and on "auto"."""
    usable = [name for name, status in backends().items() if status.usable]
    if device == "cpu" and "triton" in usable:
        usable.remove("triton")  # that is Triton's interpreter
    compiled = [name for name in usable if name != "reference"] or ["reference"]
    everywhere = ["auto", *usable]
    if named is not None:
        compiled = everywhere = [name for name in named if name in usable or name == "auto"]
    for case in cases_of(device):
        if case.name in (USUAL if chosen is None else chosen):
            for function in FUNCTIONS:
                for mode in ("eval", "gradient"):
                    yield from (Row(function, mode, "device", case, backend) for backend in compiled)
            for function in METHODS:
                # Batch statistics need two sentences.
                for mode in ("eval", "gradient", "training") if case.batch > 1 else ("eval", "gradient"):
                    yield from (Row(function, mode, "device", case, backend) for backend in compiled)
    for case in host_cases_of(device):
        if chosen is None or case.name in chosen:
            for function in METHODS:
                for mode in ("eval", "gradient"):
                    yield from (Row(function, mode, "host", case, backend) for backend in everywhere)
    encoder = encoder_case(device)
    if chosen is None or encoder.name in chosen:
        yield from (Row("capture", "eval", clock, encoder, name) for clock in ("wall", "host") for name in everywhere)


def encoder_case(device: str) -> Case:
    return Case("encoder", 2, 8, 2, 64, torch.bfloat16 if device == "cuda" else torch.float32)


# ---------------------------------------------------------------- what a row computes


class Work:
    """A row's computation as a function of a set of inputs, and the parameters that it is differentiated by."""

    def __init__(self, outputs: Outputs, parameters: dict[str, Tensor], double: Callable[[], Work] | None) -> None:
        self.outputs, self.parameters, self.double = outputs, parameters, double


def work_of(row: Row, device: str, backend: str) -> Work:
    if row.function == "capture":
        return _captured(row.case, device, backend)
    if row.function in METHODS:
        selector = _selector(row.case, device, backend).train(row.mode == "training")
        return _of_selector(selector, row.function)
    return _of_function(row, _parameters(row.case, device), backend)


def _selector(case: Case, device: str, backend: str) -> S2SentSelector:
    torch.manual_seed(0)
    selector = S2SentSelector(case.size, case.blocks, BOTTLENECK, FREQUENCIES, block_prior=True, backend=backend)
    with torch.no_grad():
        for tensor in (selector.norm.weight, selector.norm.bias, selector.norm.running_mean):
            tensor.add_(0.1 * torch.randn_like(tensor))
        selector.norm.running_var.mul_(torch.rand_like(selector.norm.running_var) + 0.5)
    return selector.to(device).eval()


def _of_selector(selector: S2SentSelector, function: str) -> Work:
    method = selector.pool if function == "pool" else selector
    return Work(
        lambda inputs: method(inputs.blocks, inputs.mask, cu_seqlens=inputs.cu_seqlens),
        dict(selector.named_parameters()),
        lambda: _of_selector(copy.deepcopy(selector).double(), function),
    )


def _parameters(case: Case, device: str) -> GateParameters:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int, scale: float = 0.1, shift: float = 0.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale + shift).to(device).requires_grad_()

    wide = case.blocks * case.size
    return GateParameters(
        down_weight=normal(BOTTLENECK, case.size, scale=case.size**-0.5),
        down_bias=normal(BOTTLENECK),
        up_weight=normal(wide, BOTTLENECK, scale=BOTTLENECK**-0.5),
        up_bias=normal(wide),
        norm_weight=normal(wide, shift=1.0),
        norm_bias=normal(wide),
        running_mean=normal(wide).detach(),
        running_var=normal(wide).detach().exp(),
        block_prior=normal(case.blocks),
    )


def _of_function(row: Row, parameters: GateParameters, backend: str) -> Work:
    present = {name: value for name, value in parameters._asdict().items() if value is not None}
    named = {name: value for name, value in present.items() if value.requires_grad}

    def call(inputs: Inputs) -> Any:
        batch = {"cu_seqlens": inputs.cu_seqlens, "backend": backend}
        if row.function == "squeeze":
            return functional.squeeze(inputs.blocks, inputs.mask, frequencies=FREQUENCIES, pooling="mean", **batch)
        if row.function == "gate":
            return functional.gate(inputs.squeezed, parameters, num_blocks=row.case.blocks, backend=backend)
        if row.function == "fuse":
            return functional.fuse(inputs.blocks, inputs.gates, inputs.mask, **batch)
        function = getattr(functional, row.function)
        return function(inputs.blocks, parameters, inputs.mask, frequencies=FREQUENCIES, **batch)

    def double() -> Work:
        other = parameters.each(lambda value: value.detach().double().requires_grad_(value.requires_grad))
        return _of_function(row, other, backend)

    return Work(call, {} if row.function in ("squeeze", "fuse") else named, double)


def _captured(case: Case, device: str, backend: str) -> Work:
    """BlockCapture.pool on a small BERT. In float64 the selector alone runs, on the hidden states that the encoder returned."""
    from transformers import BertConfig, BertModel

    from s2sent_kernels.capture import BlockCapture

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=case.size,
        num_hidden_layers=case.blocks,
        num_attention_heads=2,
        intermediate_size=2 * case.size,
    )
    encoder = BertModel(config, add_pooling_layer=False).to(device, case.dtype).eval()
    ids = torch.randint(0, 100, (case.batch, case.tokens)).to(device)
    capture, selector = BlockCapture(encoder), _selector(case, device, backend)

    def double() -> Work:
        exact = copy.deepcopy(selector).double()
        exact.backend = "reference"

        def outputs(inputs: Inputs) -> Tensor:
            states = capture.collect(input_ids=ids, attention_mask=inputs.mask)
            return exact.pool([state.double() for state in states], inputs.mask)

        return Work(outputs, {}, None)

    def pooled(inputs: Inputs) -> Tensor:
        return capture.pool(selector, input_ids=ids, attention_mask=inputs.mask)

    return Work(pooled, {}, double)


# ---------------------------------------------------------------- parity and bits


def checked(row: Row, device: str) -> dict[str, Any]:
    """Parity with the tree's own reference in float64, and a checksum of every output's and gradient's bits."""
    gradients = row.mode != "eval"
    work, reference = work_of(row, device, row.backend), work_of(row, device, "reference")
    assert reference.double is not None
    exact = reference.double()
    sums: dict[str, Sums] = {}
    bits: list[int] = []
    for seed in range(2):
        inputs = Inputs(row.case, 1000 + seed, gradients, device)
        with torch.set_grad_enabled(gradients):
            actual, same_dtype, truth = (
                outputs_and_gradients(each.outputs, batch, row.what, each.parameters, gradients)
                for each, batch in ((work, inputs), (reference, inputs), (exact, inputs.double()))
            )
        for name in truth:
            sums.setdefault(name, Sums()).add(actual[name], same_dtype[name], truth[name])
        bits += [checksum(tensor) for tensor in actual.values()]
    return {"parity": judge(sums, gradients).as_dict(), "bits": bits}


def checksum(tensor: Tensor) -> int:
    """Of the bits, in order; computed where the tensor is."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integers).flatten().long()
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 0x9E3779B1 | 1
    return int((bits * weights).sum())


# ---------------------------------------------------------------- times


def samples_of(row: Row, device: str, seconds: float) -> list[float]:
    """Microseconds of one call, a sample a round."""
    work = work_of(row, device, row.backend)
    count = input_sets(row.case, l2_bytes(), device) if row.clock == "device" else 1
    sets = [Inputs(row.case, seed, row.mode != "eval", device) for seed in range(count)]
    calls = [partial(_call, row, work, inputs) for inputs in sets]
    with torch.set_grad_enabled(row.mode != "eval"):
        if row.clock == "device":
            return device_samples({row.name: calls}, REPEATS, seconds=seconds)[row.name]
        return _rounds(calls[0], seconds, row.clock == "host")


def _call(row: Row, work: Work, inputs: Inputs) -> object:
    outputs = work.outputs(inputs)
    if row.mode == "eval":
        return outputs
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted = [*inputs.leaves(row.what).values(), *work.parameters.values()]
    return torch.autograd.grad(outputs, wanted, inputs.output_gradients(row.what))


def _rounds(call: Callable[[], object], seconds: float, host: bool) -> list[float]:
    once = min(wall_time(call) for _ in range(3))
    count = max(5, min(100, int(5e3 / once))) if host else 1
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or (len(found) < REPEATS and time.perf_counter() < end):
        found.append(host_time(call, count) if host else wall_time(call))
    return found


def measure(row: Row, device: str, seconds: float, check: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        if check:
            found |= checked(row, device)
            _free()
            if not found["parity"]["ok"]:
                return found
        return found | {"samples": samples_of(row, device, seconds)}
    except Exception as error:
        return found | {"error": describe(error)}
    finally:
        _free()


def _free() -> None:
    gc.collect()
    if on_gpu():
        synchronise()
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    for name in ("--rows", "--cases", "--backends"):
        parser.add_argument(name, type=lambda text: text.split(","), help="separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, default=0.5, help="limit for the rounds of one row")
    parser.add_argument("--check", action="store_true", help="parity and bits, too")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    device = "cuda" if on_gpu() else "cpu"
    rows = list(rows_of(device, arguments.cases, arguments.backends))
    if arguments.rows is not None:
        rows = [row for row in rows if row.matches(arguments.rows)]
    found = {}
    for row in rows:
        print(f"  {row.name}", file=sys.stderr, flush=True)
        found[row.name] = measure(row, device, arguments.seconds, arguments.check)
    content = {
        "package": str(Path(s2sent_kernels.__file__).resolve().parent),
        "usable": {name: status.usable for name, status in backends().items()},
        "reasons": {name: status.reason for name, status in backends().items()},
        "rows": found,
    }
    arguments.output.write_text(json.dumps(content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
