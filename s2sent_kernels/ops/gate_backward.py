"""s2sent::gate_backward: df, and the gradients of the parameters that are there, from dg."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import validate
from ..engines.choice import engine_for
from ..formula.call import Call, GateParameters, Gating
from .library import PARAMETERS, Gradients, call, in_their_dtypes, register, split_parameters, with_gradient

SCHEMA = f"(Tensor grad_gates, Tensor squeezed, {PARAMETERS}, str activation, float eps, str backend) -> Tensor[]"


def run(
    grad_gates: Tensor, squeezed: Tensor, parameters: GateParameters, gating: Gating, backend: str
) -> tuple[Tensor, Gradients]:
    """df, and the parameters' gradients by name."""
    options = (gating.activation, gating.eps, backend)
    grad_squeezed, *grads = call("gate_backward", (grad_gates, squeezed), parameters, options)
    return grad_squeezed, dict(zip(with_gradient(parameters), grads, strict=True))


def _validated(grad_gates: Tensor, squeezed: Tensor, rest: Any) -> tuple[GateParameters, Gating, str]:
    parameters, (activation, eps, backend) = split_parameters(rest)
    gating = Gating(activation, eps)
    num_blocks = validate_gate(squeezed, parameters, gating)
    shape = (squeezed.shape[0], num_blocks, squeezed.shape[1])
    validate.received("grad_gates", grad_gates, shape, squeezed.device)
    return parameters, gating, backend


def validate_gate(squeezed: Tensor, parameters: GateParameters, gating: Gating) -> int:
    """N, where f and the parameters are right."""
    validate.squeezed(squeezed)
    num_blocks = parameters.up_weight.shape[0] // squeezed.shape[1]
    validate.gate(parameters, gating, num_blocks, squeezed)
    return num_blocks


def _implementation(grad_gates: Tensor, squeezed: Tensor, *rest: Any) -> list[Tensor]:
    parameters, gating, backend = _validated(grad_gates, squeezed, rest)
    engine = engine_for(backend, Call(squeezed.device, squeezed.dtype, num_blocks=grad_gates.shape[1]))
    grad_squeezed, grads = engine.gate_backward(grad_gates, squeezed, parameters, gating)
    return [grad_squeezed, *in_their_dtypes(grads, parameters)]


def _fake(grad_gates: Tensor, squeezed: Tensor, *rest: Any) -> list[Tensor]:
    parameters, _, _ = _validated(grad_gates, squeezed, rest)
    return [squeezed.new_empty(squeezed.shape), *(t.new_empty(t.shape) for t in with_gradient(parameters).values())]


register("gate_backward", SCHEMA, _implementation, _fake)
