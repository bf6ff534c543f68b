"""s2sent::gate: g [B, N, D] from f [B, D], for profile "paper" with running statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import validate
from ..engines.choice import engine_for
from ..formula.call import Call, GateParameters, Gating
from . import gate_backward
from .library import PARAMETERS, Arguments, Gradients, call, parameters_of, register, split_parameters

SCHEMA = f"(Tensor squeezed, {PARAMETERS}, int num_blocks, str activation, float eps, str backend) -> Tensor"


def run(squeezed: Tensor, parameters: GateParameters, num_blocks: int, gating: Gating, backend: str) -> Tensor:
    return call("gate", (squeezed,), parameters, (num_blocks, gating.activation, gating.eps, backend))


def _validated(squeezed: Tensor, rest: Any) -> tuple[GateParameters, int, Gating, str]:
    parameters, (num_blocks, activation, eps, backend) = split_parameters(rest)
    gating = Gating(activation, eps)
    validate.squeezed(squeezed)
    validate.gate(parameters, gating, num_blocks, squeezed)
    validate.forward_mode((squeezed, *parameters))
    return parameters, num_blocks, gating, backend


def _implementation(squeezed: Tensor, *rest: Any) -> Tensor:
    parameters, num_blocks, gating, backend = _validated(squeezed, rest)
    engine = engine_for(backend, Call(squeezed.device, squeezed.dtype, num_blocks=num_blocks))
    return engine.gate(squeezed, parameters, num_blocks, gating)


def _fake(squeezed: Tensor, *rest: Any) -> Tensor:
    _, num_blocks, _, _ = _validated(squeezed, rest)
    return squeezed.new_empty(squeezed.shape[0], num_blocks, squeezed.shape[1])


def _save(ctx: Any, arguments: Arguments, output: Tensor) -> None:
    ctx.gating, ctx.backend = Gating(arguments["activation"], arguments["eps"]), arguments["backend"]
    ctx.save_for_backward(arguments["squeezed"], *parameters_of(arguments))


def _backward(ctx: Any, grad_gates: Tensor) -> Gradients:
    squeezed, *parameters = ctx.saved_tensors
    grad_squeezed, grads = gate_backward.run(grad_gates, squeezed, GateParameters(*parameters), ctx.gating, ctx.backend)
    return {"squeezed": grad_squeezed, **grads}


register("gate", SCHEMA, _implementation, _fake, _save, _backward)
