"""How an op of torch.ops.s2sent is registered, and the way around the dispatcher where it would do nothing.

An op has one file: its schema, its implementation, its fake, and its gradient. ``register`` ties them together. Every op takes
``backend`` as a str ("auto" included) and unpacks its arguments into the records of ``formula.call`` at once; the engine that
``engines.choice`` picks computes.

No schema has defaults, because an op with a Tensor[] and a default fails in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..formula.call import Batch, GateParameters
from .namespace import NAMESPACE, OPS

BATCH = "Tensor[] hidden_states, Tensor? attention_mask, Tensor? cu_seqlens"
PARAMETERS = ", ".join(
    f"Tensor{'' if name in GateParameters.required() else '?'} {name}" for name in GateParameters._fields
)

# The gate scale came after the ops' schemas were promised: programs that were saved before call the ops without it. So an op of
# the gate's tensors has an overload "scaled" that takes it.
_SCALE = "Tensor? gate_scale, "

# A process can define an op once. importlib.reload keeps a module's globals, so that what is defined already is known, and the
# ops that are there stay.
_library: torch.library.Library = globals().get("_library") or torch.library.Library(NAMESPACE, "DEF")
_defined: set[str] = globals().get("_defined") or set()

Arguments = dict[str, Any]  # of an op, by the names in its schema
Gradients = dict[str, Any]  # of those that have one; the rest have none


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[[Any, Arguments, Any], None] | None = None,
    backward: Callable[..., Gradients] | None = None,
) -> None:
    """Define ``name`` in the package's namespace.

    Args:
        schema: its arguments and results.
        implementation: for CPU and CUDA tensors; validates.
        fake: shapes and dtypes of the results; validates what needs no values.
        save: ``save(ctx, arguments, output)`` keeps what ``backward`` needs.
        backward: ``backward(ctx, *grad_outputs)`` returns gradients by argument name. Without it, and without ``save``, the op
            is a backward pass itself: differentiating it raises.

    Where the schema has the gate's tensors, it becomes the overload "scaled", and the default one has no gate scale.
    """
    if _SCALE not in schema:
        _register(name, schema, implementation, fake, save, backward)
        return
    _register(f"{name}.scaled", schema, implementation, fake, save, backward)
    place = schema[: schema.index(_SCALE)].count(",")

    def unscaled(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(*arguments[:place], None, *arguments[place:])

    def save_unscaled(ctx: Any, arguments: Arguments, output: Any) -> None:
        assert save is not None
        save(ctx, {**arguments, "gate_scale": None}, output)

    keep = None if save is None else save_unscaled
    _register(name, schema.replace(_SCALE, ""), unscaled(implementation), unscaled(fake), keep, backward)


def _register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[[Any, Arguments, Any], None] | None,
    backward: Callable[..., Gradients] | None,
) -> None:
    if name in _defined:
        return
    register_in_place(name, schema, implementation, fake)
    names = tuple(argument.name for argument in torch._C.parse_schema(f"{NAMESPACE}::{name}{schema}").arguments)
    if save is None or backward is None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse, lib=_library)
        return

    known = frozenset(names)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, dict(zip(names, inputs, strict=True)), output)

    def in_order(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        grads = backward(ctx, *grad_outputs)
        assert grads.keys() <= known, grads.keys()
        return tuple(map(grads.get, names))

    torch.library.register_autograd(f"{NAMESPACE}::{name}", in_order, setup_context=setup_context, lib=_library)


def refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("s2sent: second derivatives are not implemented")


def register_in_place(name: str, schema: str, implementation: Callable[..., None], fake: Callable[..., None]) -> None:
    """Define an op without derivatives, as one that writes into its arguments. Nothing happens where it is defined."""
    if name in _defined:
        return
    _defined.add(name)
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


# ---------------------------------------------------------------- records, flat in a schema


def batch_of(arguments: Arguments) -> Batch:
    return Batch(arguments["hidden_states"], arguments["attention_mask"], arguments["cu_seqlens"])


def split_parameters(rest: Sequence[Any]) -> tuple[GateParameters, Sequence[Any]]:
    """GateParameters and what follows them among an op's arguments."""
    number = len(GateParameters._fields)
    return GateParameters(*rest[:number]), rest[number:]


def parameters_of(arguments: Arguments) -> GateParameters:
    return GateParameters(*map(arguments.__getitem__, GateParameters._fields))


def call(name: str, before: Sequence[Any], parameters: GateParameters, after: Sequence[Any]) -> Any:
    """An op with the gate's tensors between other arguments."""
    op = getattr(OPS, name)
    if parameters.gate_scale is None:
        return op.default(*before, *parameters[:-1], *after)
    return op.scaled(*before, *parameters, *after)


def with_gradient(parameters: GateParameters) -> dict[str, Tensor]:
    """The present parameters that have a gradient, by name: all but the running statistics."""
    return {
        name: tensor
        for name, tensor in zip(GateParameters._fields, parameters, strict=True)
        if tensor is not None and name not in ("running_mean", "running_var")
    }


def in_their_dtypes(grads: GateParameters, parameters: GateParameters) -> list[Tensor]:
    """The gradients that an op returns: each contiguous and in its parameter's dtype."""
    return [getattr(grads, name).to(tensor.dtype).contiguous() for name, tensor in with_gradient(parameters).items()]


def add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return right if left is None else left if right is None else left + right


# ---------------------------------------------------------------- around the dispatcher


def gradient_wanted(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)


def dispatcher_is_idle() -> bool:
    """Whether nothing traces, transforms or records the ops that are called now."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return torch.autograd.forward_ad._current_level < 0


def is_ordinary(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the dispatcher would do nothing but record a gradient and call an op's implementation, so that the caller may do
    both: it is idle, and every tensor is an ordinary one. On a small batch it costs more than the validation."""
    return dispatcher_is_idle() and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors if t is not None)


def without_dispatcher(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call is ordinary and wants no gradient."""
    present = [t for t in tensors if t is not None]
    return is_ordinary(present) and not gradient_wanted(present)
