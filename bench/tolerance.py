"""How far a result may be from the truth, given how far the reference in the same dtype is: without a constant to choose.

Output and gradients may have twice the yardstick's error, plus the rounding of the result itself. Both errors are root mean
squares over several draws of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from cases import Inputs
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

    @property
    def carriers(self) -> float:
        """How many elements carry the size: of the prior's gradient the last block's element alone."""
        return self.size**2 / self.fourth if self.fourth else 1.0

    @property
    def few(self) -> float:
        """The mean of few errors is noisy: the factor by which a bound is wider for small tensors."""
        return (1 + 4 / self.carriers) ** 0.5

    def share_of_bound(self) -> float:
        """Error over its bound."""
        bound = 2 * self.few * self.yardstick**0.5 + self.roundoff * self.size**0.5
        return self.error**0.5 / bound if bound else float(self.error != 0)


@dataclass
class Outcome:
    """``ok``, and the output or gradient with the largest share of its bound."""

    ok: bool
    worst: str
    share: float
    output_error: float  # relative, of the first output
    yardstick_error: float
    gradients: bool = field(default=False)

    def as_dict(self) -> dict[str, object]:
        return dict(self.__dict__)


def outputs_and_gradients(
    call: Callable[[Inputs], Tensor | tuple[Tensor, ...]],
    inputs: Inputs,
    what: str,
    parameters: dict[str, Tensor],
    gradients: bool,
) -> dict[str, Tensor]:
    """Outputs and, where wanted, gradients, by name."""
    result = call(inputs)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    found = {f"output {n}": output.detach() for n, output in enumerate(outputs)}
    if gradients:
        leaves = inputs.leaves(what) | parameters
        given = [g.to(o.dtype) for g, o in zip(inputs.output_gradients(what), outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), given)
        found |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return found


def judge(sums: dict[str, Sums], gradients: bool) -> Outcome:
    shares = {name: value.share_of_bound() for name, value in sums.items()}
    # A NaN is the worst; comparisons would miss it.
    worst = max(shares, key=lambda name: float("inf") if shares[name] != shares[name] else shares[name])
    first = sums["output 0"]
    size = first.size**0.5 or 1.0
    errors = (first.error**0.5 / size, first.yardstick**0.5 / size)
    return Outcome(all(share <= 1 for share in shares.values()), worst, shares[worst], *errors, gradients)
