"""torch.ops.s2sent.*: schemas, implementations, fakes and autograd of the public ops.

    squeeze, gate, fuse          the three stages, differentiable on their own
    select_pool, select          the paper's formula with running statistics in one op: what inference runs
    squeeze_block                one block at a time into partial sums, for inference
    *_backward                   what the backward passes call; they have no derivatives themselves and say so

Every op takes ``backend`` as a str ("auto" included) and hands over to that backend's engine: a module with a function of
the op's name. No schema has defaults, because an op with a Tensor[] and a default fails in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import plain, validate
from .backend import choose
from .reference import GateParameters, compute_dtype

_BATCH = "Tensor[] hidden_states, Tensor? attention_mask, Tensor? cu_seqlens"
_PARAMETERS = (
    "Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? running_mean, Tensor? running_var, Tensor? block_prior"
)
NUM_PARAMETERS = len(GateParameters._fields)
_SCHEMAS = {
    "squeeze": f"({_BATCH}, int frequencies, str profile, str? pooling, str backend) -> (Tensor, Tensor)",
    "squeeze_backward": "(Tensor? grad_squeezed, Tensor? grad_pooled, Tensor? grad_fused, Tensor? gates, "
    "SymInt[] shape, ScalarType dtype, Device device, bool[] needed, Tensor? attention_mask, Tensor? cu_seqlens, "
    "int frequencies, str profile, str? pooling, str backend) -> Tensor[]",
    "squeeze_block": "(Tensor hidden_state, int block, int num_blocks, Tensor(a!) squeezed_groups, "
    "Tensor(b!)? pooled, Tensor? attention_mask, Tensor? cu_seqlens, int frequencies, str profile, str? pooling, "
    "str backend) -> ()",
    "gate": f"(Tensor squeezed, {_PARAMETERS}, int num_blocks, str activation, float eps, str backend) -> Tensor",
    "gate_backward": f"(Tensor grad_gates, Tensor squeezed, {_PARAMETERS}, str activation, float eps, str backend) "
    "-> Tensor[]",
    "gate_pool_backward": f"(Tensor grad_output, Tensor squeezed, Tensor pooled, {_PARAMETERS}, str activation, "
    "float eps, str backend) -> Tensor[]",
    "fuse": f"({_BATCH}, Tensor gates, str backend) -> Tensor",
    "fuse_backward": f"(Tensor grad_fused, {_BATCH}, str backend) -> Tensor",
    "select_pool": f"({_BATCH}, {_PARAMETERS}, int frequencies, str pooling, str activation, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    "select": f"({_BATCH}, {_PARAMETERS}, int frequencies, str activation, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
}

_library = torch.library.Library("s2sent", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def engine(backend: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The module that computes for ``backend``: plain PyTorch, the Triton kernels or the compiled ones (imported when first
    used)."""
    chosen = choose(backend, device, dtype)
    if chosen == "triton":
        from . import kernels

        return kernels
    if chosen == "native":
        from . import native

        return native
    return plain


def _engine_for(backend: str, hidden_states: Sequence[Tensor]) -> Any:
    return engine(backend, hidden_states[0].device, hidden_states[0].dtype)


def _implement(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CPU", "CUDA"):
            _library.impl(name, function, key)
        return function

    return register


def gradient_wanted(hidden_states: Sequence[Tensor], parameters: GateParameters) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*hidden_states, *parameters) if t is not None)


def without_dispatcher(hidden_states: Sequence[Tensor], parameters: GateParameters) -> bool:
    """Whether the dispatcher would do nothing but call an op's implementation, so that the caller may do it: no gradient is
    wanted, nothing traces, transforms or records, and every tensor is an ordinary one. On a small batch it costs more than the
    validation."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    if gradient_wanted(hidden_states, parameters):
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in (*hidden_states, *parameters) if t is not None)


def _num_sentences(hidden_states: Sequence[Tensor], cu_seqlens: Tensor | None) -> int:
    return hidden_states[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


# ---------------------------------------------------------------- squeeze


@_implement("squeeze")
def _squeeze(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    validate.arguments(hidden_states, attention_mask, cu_seqlens, pooling, profile)
    validate.batch(hidden_states, attention_mask, cu_seqlens, frequencies, profile)
    validate.cu_seqlens_values(cu_seqlens, hidden_states[0].shape[0])
    squeezed, pooled = _engine_for(backend, hidden_states).squeeze(
        hidden_states, attention_mask, cu_seqlens, frequencies, profile, pooling
    )
    if pooled is None:
        pooled = squeezed.new_empty(squeezed.shape[0], 0, squeezed.shape[1])
    return squeezed, pooled


@torch.library.register_fake("s2sent::squeeze", lib=_library)
def _(hidden_states, attention_mask, cu_seqlens, frequencies, profile, pooling, backend):  # type: ignore[no-untyped-def]
    validate.arguments(hidden_states, attention_mask, cu_seqlens, pooling, profile)
    validate.batch(hidden_states, attention_mask, cu_seqlens, frequencies, profile)
    first = hidden_states[0]
    rows, dtype = _num_sentences(hidden_states, cu_seqlens), compute_dtype(first.dtype)
    blocks = 0 if pooling is None else len(hidden_states)
    size = first.shape[-1]
    return first.new_empty(rows, size, dtype=dtype), first.new_empty(rows, blocks, size, dtype=dtype)


@_implement("squeeze_backward")
def _squeeze_backward(
    grad_squeezed: Tensor | None,
    grad_pooled: Tensor | None,
    grad_fused: Tensor | None,
    gates: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    needed: list[bool],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
    backend: str,
) -> list[Tensor]:
    rows, size = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, shape[-1]
    validate.shaped("grad_squeezed", grad_squeezed, (rows, size))
    validate.shaped("grad_pooled", grad_pooled, (rows, len(needed), size))
    validate.shaped("grad_fused", grad_fused, shape)
    validate.shaped("gates", gates, (rows, len(needed), size))
    grads = engine(backend, device, dtype).squeeze_backward(
        grad_squeezed, grad_pooled, grad_fused, gates, shape, dtype, device, needed, attention_mask, cu_seqlens,
        frequencies, profile, pooling,
    )  # fmt: skip
    return [torch.empty(0, dtype=dtype, device=device) if grad is None else grad for grad in grads]


@torch.library.register_fake("s2sent::squeeze_backward", lib=_library)
def _(  # type: ignore[no-untyped-def]
    grad_squeezed, grad_pooled, grad_fused, gates, shape, dtype, device, needed, attention_mask, cu_seqlens,
    frequencies, profile, pooling, backend,
):  # fmt: skip
    return [torch.empty(shape if need else [0], dtype=dtype, device=device) for need in needed]


@_implement("squeeze_block")
def _squeeze_block(
    hidden_state: Tensor,
    block: int,
    num_blocks: int,
    squeezed_groups: Tensor,
    pooled: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
    backend: str,
) -> None:
    validate.batch([hidden_state], attention_mask, cu_seqlens, 1, profile)
    validate.components(num_blocks, hidden_state.shape[-1], frequencies, profile)
    validate.cu_seqlens_values(cu_seqlens, hidden_state.shape[0])
    if not 0 <= block < num_blocks:
        raise ValueError(f"block: expected 0 to {num_blocks - 1}, got {block}")
    chosen, device = engine(backend, hidden_state.device, hidden_state.dtype), hidden_state.device
    dtype, size = compute_dtype(hidden_state.dtype), hidden_state.shape[-1]
    rows = _num_sentences([hidden_state], cu_seqlens)
    validate.buffer("squeezed_groups", squeezed_groups, (rows, chosen.num_groups(num_blocks), size), dtype, device)
    if pooled is not None:
        validate.buffer("pooled", pooled, (rows, num_blocks, size), dtype, device)
    chosen.squeeze_block(
        hidden_state, block, num_blocks, squeezed_groups, pooled, attention_mask, cu_seqlens, frequencies, profile,
        pooling,
    )  # fmt: skip


@torch.library.register_fake("s2sent::squeeze_block", lib=_library)
def _(*args):  # type: ignore[no-untyped-def]
    return None


# ---------------------------------------------------------------- gate


@_implement("gate")
def _gate(squeezed: Tensor, *rest: Any) -> Tensor:
    parameters, (num_blocks, activation, eps, backend) = _split(rest)
    _validate_gate(squeezed, parameters, num_blocks, activation)
    chosen = engine(backend, squeezed.device, squeezed.dtype)
    return chosen.gate(squeezed, parameters, num_blocks, activation, eps)


@torch.library.register_fake("s2sent::gate", lib=_library)
def _(squeezed, *rest):  # type: ignore[no-untyped-def]
    parameters, (num_blocks, activation, eps, backend) = _split(rest)
    _validate_gate(squeezed, parameters, num_blocks, activation)
    return squeezed.new_empty(squeezed.shape[0], num_blocks, squeezed.shape[1])


def _split(rest: Sequence[Any]) -> tuple[GateParameters, Sequence[Any]]:
    return GateParameters(*rest[:NUM_PARAMETERS]), rest[NUM_PARAMETERS:]


def _validate_gate(squeezed: Tensor, parameters: GateParameters, num_blocks: int, activation: str) -> None:
    validate.option("activation", activation, validate.ACTIVATIONS)
    validate.squeezed(squeezed)
    validate.gate_parameters(parameters, num_blocks, squeezed.shape[1], squeezed.device)
    validate.forward_mode((squeezed, *parameters))


@_implement("gate_backward")
def _gate_backward(grad_gates: Tensor, squeezed: Tensor, *rest: Any) -> list[Tensor]:
    parameters, (activation, eps, backend) = _split(rest)
    _validate_gate_backward(squeezed, parameters, activation, grad_gates=grad_gates)
    chosen = engine(backend, squeezed.device, squeezed.dtype)
    grad_squeezed, grads = chosen.gate_backward(grad_gates, squeezed, parameters, activation, eps)
    return [grad_squeezed, *_in_their_dtypes(grads, parameters)]


@torch.library.register_fake("s2sent::gate_backward", lib=_library)
def _(grad_gates, squeezed, *rest):  # type: ignore[no-untyped-def]
    parameters, (activation, _, _) = _split(rest)
    _validate_gate_backward(squeezed, parameters, activation, grad_gates=grad_gates)
    return [squeezed.new_empty(squeezed.shape), *_like_gradients(parameters)]


@_implement("gate_pool_backward")
def _gate_pool_backward(grad_output: Tensor, squeezed: Tensor, pooled: Tensor, *rest: Any) -> list[Tensor]:
    """dp, df and the gradients of the parameters that are there."""
    parameters, (activation, eps, backend) = _split(rest)
    _validate_gate_backward(squeezed, parameters, activation, grad_output=grad_output, pooled=pooled)
    chosen = engine(backend, squeezed.device, squeezed.dtype)
    grad_pooled, grad_squeezed, grads = chosen.gate_pool_backward(
        grad_output, squeezed, pooled, parameters, activation, eps
    )
    return [grad_pooled, grad_squeezed, *_in_their_dtypes(grads, parameters)]


@torch.library.register_fake("s2sent::gate_pool_backward", lib=_library)
def _(grad_output, squeezed, pooled, *rest):  # type: ignore[no-untyped-def]
    parameters, (activation, _, _) = _split(rest)
    _validate_gate_backward(squeezed, parameters, activation, grad_output=grad_output, pooled=pooled)
    return [pooled.new_empty(pooled.shape), squeezed.new_empty(squeezed.shape), *_like_gradients(parameters)]


def _validate_gate_backward(squeezed: Tensor, parameters: GateParameters, activation: str, **others: Tensor) -> None:
    """``others`` by name: grad_output [B, D], what else there is [B, N, D]."""
    validate.squeezed(squeezed)
    rows, size = squeezed.shape
    num_blocks = parameters.up_weight.shape[0] // size
    validate.option("activation", activation, validate.ACTIVATIONS)
    validate.gate_parameters(parameters, num_blocks, size, squeezed.device)
    for name, tensor in others.items():
        validate.shaped(name, tensor, (rows, size) if name == "grad_output" else (rows, num_blocks, size))


def _in_their_dtypes(grads: GateParameters, parameters: GateParameters) -> list[Tensor]:
    """The gradients that there are, each contiguous and in its parameter's dtype."""
    return [
        grad.to(tensor.dtype).contiguous()
        for grad, tensor in zip(grads, parameters, strict=True)
        if grad is not None and tensor is not None
    ]


def _like_gradients(parameters: GateParameters) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for _, tensor in _with_gradient(parameters)]


def _with_gradient(parameters: GateParameters) -> list[tuple[int, Tensor]]:
    """The present parameters that have a gradient, with their places: all but the running statistics."""
    skipped = ("running_mean", "running_var")
    return [
        (place, tensor)
        for place, (name, tensor) in enumerate(zip(GateParameters._fields, parameters, strict=True))
        if tensor is not None and name not in skipped
    ]


def _full(grads: Sequence[Tensor], parameters: GateParameters) -> list[Tensor | None]:
    """The gradients of the present parameters as a list as long as GateParameters."""
    full: list[Tensor | None] = [None] * NUM_PARAMETERS
    for (place, _), grad in zip(_with_gradient(parameters), grads, strict=True):
        full[place] = grad
    return full


def _gate_gradients(
    grad_gates: Tensor, squeezed: Tensor, parameters: GateParameters, activation: str, eps: float, backend: str
) -> tuple[Tensor, list[Tensor | None]]:
    """df and a list as long as GateParameters with a gradient where there is one."""
    grads = torch.ops.s2sent.gate_backward(grad_gates, squeezed, *parameters, activation, eps, backend)
    return grads[0], _full(grads[1:], parameters)


def _gate_pool_gradients(
    grad_output: Tensor,
    squeezed: Tensor,
    pooled: Tensor,
    parameters: GateParameters,
    activation: str,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """dp, df and the list of ``_gate_gradients``."""
    grads = torch.ops.s2sent.gate_pool_backward(grad_output, squeezed, pooled, *parameters, activation, eps, backend)
    return grads[0], grads[1], _full(grads[2:], parameters)


# ---------------------------------------------------------------- fuse


@_implement("fuse")
def _fuse(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, gates: Tensor, backend: str
) -> Tensor:
    _validate_fuse(hidden_states, attention_mask, cu_seqlens, gates)
    validate.cu_seqlens_values(cu_seqlens, hidden_states[0].shape[0])
    return _engine_for(backend, hidden_states).fuse(hidden_states, gates, attention_mask, cu_seqlens)


@torch.library.register_fake("s2sent::fuse", lib=_library)
def _(hidden_states, attention_mask, cu_seqlens, gates, backend):  # type: ignore[no-untyped-def]
    _validate_fuse(hidden_states, attention_mask, cu_seqlens, gates)
    return hidden_states[0].new_empty(hidden_states[0].shape)


def _validate_fuse(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, gates: Tensor
) -> None:
    validate.arguments(hidden_states, attention_mask, cu_seqlens)
    validate.batch(hidden_states, attention_mask, cu_seqlens)
    validate.gates(gates, hidden_states, cu_seqlens)
    validate.forward_mode((gates,))


@_implement("fuse_backward")
def _fuse_backward(
    grad_fused: Tensor,
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    validate.batch(hidden_states, attention_mask, cu_seqlens)
    validate.shaped("grad_fused", grad_fused, hidden_states[0].shape)
    return _engine_for(backend, hidden_states).fuse_backward(grad_fused, hidden_states, attention_mask, cu_seqlens)


@torch.library.register_fake("s2sent::fuse_backward", lib=_library)
def _(grad_fused, hidden_states, attention_mask, cu_seqlens, backend):  # type: ignore[no-untyped-def]
    first, rows = hidden_states[0], _num_sentences(hidden_states, cu_seqlens)
    return first.new_empty(rows, len(hidden_states), first.shape[-1], dtype=compute_dtype(first.dtype))


# ---------------------------------------------------------------- the whole selector


def _validate_select(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: GateParameters,
    frequencies: int,
    activation: str,
    pooling: str | None,
) -> None:
    validate.arguments(hidden_states, attention_mask, cu_seqlens, pooling, "paper", activation)
    validate.batch(hidden_states, attention_mask, cu_seqlens, frequencies)
    first = hidden_states[0]
    validate.gate_parameters(parameters, len(hidden_states), first.shape[-1], first.device)
    validate.forward_mode(parameters)


@_implement("select_pool")
def _select_pool(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, f, p): f and p cost nothing, the kernels write them anyway, and they are all that the backward needs."""
    parameters, (frequencies, pooling, activation, eps, backend) = _split(rest)
    _validate_select(hidden_states, attention_mask, cu_seqlens, parameters, frequencies, activation, pooling)
    validate.cu_seqlens_values(cu_seqlens, hidden_states[0].shape[0])
    return _engine_for(backend, hidden_states).select_pool(
        hidden_states, attention_mask, cu_seqlens, parameters, frequencies, pooling, activation, eps
    )


@torch.library.register_fake("s2sent::select_pool", lib=_library)
def _(hidden_states, attention_mask, cu_seqlens, *rest):  # type: ignore[no-untyped-def]
    parameters, (frequencies, pooling, activation, eps, backend) = _split(rest)
    _validate_select(hidden_states, attention_mask, cu_seqlens, parameters, frequencies, activation, pooling)
    first, rows = hidden_states[0], _num_sentences(hidden_states, cu_seqlens)
    size, dtype = first.shape[-1], compute_dtype(first.dtype)
    return (
        first.new_empty(rows, size),
        first.new_empty(rows, size, dtype=dtype),
        first.new_empty(rows, len(hidden_states), size, dtype=dtype),
    )


@_implement("select")
def _select(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(v, f, g): f and g stand in memory between the kernels anyway, and the backward needs them."""
    parameters, (frequencies, activation, eps, backend) = _split(rest)
    _validate_select(hidden_states, attention_mask, cu_seqlens, parameters, frequencies, activation, None)
    validate.cu_seqlens_values(cu_seqlens, hidden_states[0].shape[0])
    return _engine_for(backend, hidden_states).select(
        hidden_states, attention_mask, cu_seqlens, parameters, frequencies, activation, eps
    )


@torch.library.register_fake("s2sent::select", lib=_library)
def _(hidden_states, attention_mask, cu_seqlens, *rest):  # type: ignore[no-untyped-def]
    parameters, (frequencies, activation, eps, backend) = _split(rest)
    _validate_select(hidden_states, attention_mask, cu_seqlens, parameters, frequencies, activation, None)
    first, rows = hidden_states[0], _num_sentences(hidden_states, cu_seqlens)
    size, dtype = first.shape[-1], compute_dtype(first.dtype)
    return (
        first.new_empty(first.shape),
        first.new_empty(rows, size, dtype=dtype),
        first.new_empty(rows, len(hidden_states), size, dtype=dtype),
    )
