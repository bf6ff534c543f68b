"""Whether a contestant computes what the reference computes. Asked first: one that does not gets no time printed.

Truth is the reference in float64 on the same (rounded) inputs, the yardstick the reference in the inputs' own dtype. Output and
gradients may be off by twice what the yardstick is off, plus what rounding the result alone may cost. Both errors are root mean
squares over several draws of the inputs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from cases import Case, Inputs
from contestants import Contestant, gate_parameters, make_selector, selector_call
from torch import Tensor


@dataclass
class Sums:
    """Squares summed over draws, of one output or gradient."""

    error: float = 0.0
    yardstick: float = 0.0
    size: float = 0.0
    fourth: float = 0.0  # powers of the truth
    roundoff: float = 0.0

    def add(self, actual: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
        if actual.shape != truth.shape or actual.dtype != same_dtype.dtype:
            self.error = float("nan")
        else:
            self.error += (actual.double() - truth).square().sum().item()
        self.yardstick += (same_dtype.double() - truth).square().sum().item()
        self.size += truth.square().sum().item()
        self.fourth += truth.pow(4).sum().item()
        self.roundoff = max(torch.finfo(actual.dtype).eps, torch.finfo(torch.float32).eps) / 2

    def share_of_bound(self) -> float:
        """Error over what is allowed. The mean of few errors is a noisy number, so small tensors are allowed more, and so are
        those whose size a few elements carry: of the prior's gradient it is the last block's alone."""
        carriers = self.size**2 / self.fourth if self.fourth else 1.0
        few = (1 + 4 / carriers) ** 0.5
        bound = 2 * few * self.yardstick**0.5 + self.roundoff * self.size**0.5
        return self.error**0.5 / bound if bound else float(self.error != 0)


@dataclass
class Outcome:
    """``ok``, and the largest share of the bound that an output or gradient took, with its name."""

    ok: bool
    worst: str
    share: float
    output_error: float  # relative, of the first output
    yardstick_error: float
    gradients: bool = field(default=False)

    def as_dict(self) -> dict[str, object]:
        return dict(self.__dict__)


def _both(call, inputs: Inputs, what: str, parameters: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    result = call(inputs)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    found = {f"output {n}": output.detach() for n, output in enumerate(outputs)}
    if gradients:
        leaves = inputs.leaves(what) | parameters
        given = [g.to(o.dtype) for g, o in zip(inputs.output_gradients(what), outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), given)
        found |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return found


def check(
    contestant: Contestant, case: Case, what: str, device: str, profile: str, gradients: bool, draws: int | None = None
) -> Outcome:
    reference = make_selector(case, device, profile, backend="reference")
    double = copy.deepcopy(reference).double()
    sums: dict[str, Sums] = {}
    for seed in range(draws or (3 if device == "cuda" else 2)):
        inputs = Inputs(case, 1000 + seed, gradients, device)
        with torch.set_grad_enabled(gradients):
            actual = _both(contestant.call, inputs, what, contestant.parameters, gradients)
            same_dtype = _both(
                selector_call(reference, what), inputs, what, gate_parameters(reference, what), gradients
            )
            truth = _both(selector_call(double, what), inputs.double(), what, gate_parameters(double, what), gradients)
        for name in truth:
            sums.setdefault(name, Sums()).add(actual[name], same_dtype[name], truth[name])
        del actual, same_dtype, truth, inputs
    return judge(sums, gradients)


def judge(sums: dict[str, Sums], gradients: bool) -> Outcome:
    shares = {name: value.share_of_bound() for name, value in sums.items()}
    # A NaN is the worst there is, and no comparison would find it.
    worst = max(shares, key=lambda name: float("inf") if shares[name] != shares[name] else shares[name])
    first = sums["output 0"]
    size = first.size**0.5 or 1.0
    errors = (first.error**0.5 / size, first.yardstick**0.5 / size)
    return Outcome(all(share <= 1 for share in shares.values()), worst, shares[worst], *errors, gradients)
