"""Whether a contestant computes what the reference computes. Checked before timing: one that fails gets no times.

``tolerance`` has the bounds. Truth is the reference in float64 on the same (rounded) inputs, the yardstick the reference in the
inputs' own dtype.
"""

from __future__ import annotations

import copy

import torch
from cases import Case, Inputs
from contestants import Contestant, differentiated, make_selector, selector_call
from tolerance import Outcome, Sums, judge, outputs_and_gradients


def check(
    contestant: Contestant, case: Case, what: str, device: str, profile: str, gradients: bool, draws: int | None = None
) -> Outcome:
    """A contestant in training mode is compared with a reference in training mode."""
    reference = make_selector(case, device, profile, "reference", contestant.scale).train(contestant.training)
    double = copy.deepcopy(reference).double()
    sums: dict[str, Sums] = {}
    for seed in range(draws or (3 if device == "cuda" else 2)):
        inputs = Inputs(case, 1000 + seed, gradients, device)
        with torch.set_grad_enabled(gradients):
            actual = outputs_and_gradients(contestant.call, inputs, what, contestant.parameters, gradients)
            same_dtype = outputs_and_gradients(
                selector_call(reference, what), inputs, what, differentiated(reference, what), gradients
            )
            truth = outputs_and_gradients(
                selector_call(double, what), inputs.double(), what, differentiated(double, what), gradients
            )
        for name in truth:
            sums.setdefault(name, Sums()).add(actual[name], same_dtype[name], truth[name])
        del actual, same_dtype, truth, inputs
    return judge(sums, gradients)
