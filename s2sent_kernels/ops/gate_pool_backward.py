"""s2sent::gate_pool_backward: dp, df, and the gradients of the parameters that are there, from do."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import validate
from ..engines.choice import engine_for
from ..formula.call import Call, GateParameters, Gating
from .gate_backward import validate_gate
from .library import PARAMETERS, Gradients, call, in_their_dtypes, register, split_parameters, with_gradient

SCHEMA = (
    f"(Tensor grad_output, Tensor squeezed, Tensor pooled, {PARAMETERS}, str activation, float eps, str backend) "
    "-> Tensor[]"
)


def run(
    grad_output: Tensor, squeezed: Tensor, pooled: Tensor, parameters: GateParameters, gating: Gating, backend: str
) -> tuple[Tensor, Tensor, Gradients]:
    """dp, df, and the parameters' gradients by name."""
    options = (gating.activation, gating.eps, backend)
    grad_pooled, grad_squeezed, *grads = call(
        "gate_pool_backward", (grad_output, squeezed, pooled), parameters, options
    )
    return grad_pooled, grad_squeezed, dict(zip(with_gradient(parameters), grads, strict=True))


def _validated(grad_output: Tensor, squeezed: Tensor, pooled: Tensor, rest: Any) -> tuple[GateParameters, Gating, str]:
    parameters, (activation, eps, backend) = split_parameters(rest)
    gating = Gating(activation, eps)
    num_blocks = validate_gate(squeezed, parameters, gating)
    shape = (squeezed.shape[0], num_blocks, squeezed.shape[1])
    validate.received("grad_output", grad_output, squeezed.shape, squeezed.device)
    validate.received("pooled", pooled, shape, squeezed.device)
    return parameters, gating, backend


def _implementation(grad_output: Tensor, squeezed: Tensor, pooled: Tensor, *rest: Any) -> list[Tensor]:
    parameters, gating, backend = _validated(grad_output, squeezed, pooled, rest)
    engine = engine_for(backend, Call(squeezed.device, squeezed.dtype, num_blocks=pooled.shape[1]))
    grad_pooled, grad_squeezed, grads = engine.gate_pool_backward(grad_output, squeezed, pooled, parameters, gating)
    return [grad_pooled, grad_squeezed, *in_their_dtypes(grads, parameters)]


def _fake(grad_output: Tensor, squeezed: Tensor, pooled: Tensor, *rest: Any) -> list[Tensor]:
    parameters, _, _ = _validated(grad_output, squeezed, pooled, rest)
    grads = (t.new_empty(t.shape) for t in with_gradient(parameters).values())
    return [pooled.new_empty(pooled.shape), squeezed.new_empty(squeezed.shape), *grads]


register("gate_pool_backward", SCHEMA, _implementation, _fake)
