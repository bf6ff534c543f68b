"""squeeze, gate, fuse, select, select_pool as functions of tensors: Python types, choice of backend and of path, nothing else.

Shapes: N hidden states ``[B, L, D]`` with an optional mask ``[B, L]``, or packed ``[T, D]`` with int32 ``cu_seqlens
[B + 1]``. Dtypes: ``formula.call.KERNEL_DTYPES`` on every backend, float64 on the reference. f, p and the gates are float32
(float64 for float64 inputs). The formulas are in ``formula.reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import ops, validate
from .engines.choice import choose, engine_of
from .formula import reference
from .formula.call import ACTIVATIONS, POOLINGS, PROFILES, Batch, Call, GateParameters, Gating, Reading
from .ops import direct
from .ops.library import is_ordinary
from .ops.write_once import FuseFromCarriers, SqueezeForFuse

GateFunction = Callable[[Tensor], Tensor]  # f [B, D] -> g [B, N, D]


def _reading(frequencies: int, profile: str, pooling: str | None) -> Reading:
    validate.positive_int("frequencies", frequencies)
    word = None if pooling is None else validate.word("pooling", pooling, POOLINGS)
    return Reading(frequencies, validate.word("profile", profile, PROFILES), word)


def _gating(activation: str, eps: float, profile: str, training: bool, momentum: float) -> Gating:
    validate.number("eps", eps)
    validate.flag("training", training)
    validate.share("momentum", momentum)  # no op has it
    return Gating(
        validate.word("activation", activation, ACTIVATIONS),
        eps,
        validate.word("profile", profile, PROFILES),
        training,
        momentum,
    )


def _validate_plain(batch: Batch, reading: Reading) -> None:
    """What an op would validate, for plain PyTorch without one."""
    validate.batch(batch, reading)
    validate.token_values(batch)


def _choose(backend: str, batch: Batch, others: Sequence[Tensor | None] = ()) -> str:
    """``choose`` for a batch. Where not plain PyTorch computes, forward-mode derivatives by its hidden states and ``others`` are
    refused, and transforms of them."""
    chosen = choose(backend, Call.of(batch))
    if chosen != "reference":
        validate.forward_mode((*batch.hidden_states, *others))
        validate.transforms((*batch.hidden_states, *others))
    return chosen


def squeeze(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    frequencies: int = 4,
    profile: str = "paper",
    pooling: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Frequency selection: f [B, D], and with ``pooling`` the pooled p [B, N, D], else None.

        f[b,d]   = sum_n sum_l alpha[m(d),n] beta[b,m(d),l] u_n[b,l,d]
        p[b,n,d] = sum_l w[b,l] u_n[b,l,d]

    Args:
        hidden_states: N tensors [B, L, D], lowest block first, any strides; or packed [T, D] with ``cu_seqlens``.
        attention_mask: [B, L] bool, integer or float, nonzero at real tokens; None means that every token is real. Negative
            numbers are refused: a mask that attention adds to its scores means the opposite. On a GPU that is seen of floats,
            for which the call waits, and of integers under S2SENT_DEBUG=1.
        cu_seqlens: int32 [B + 1], the packed sentences' first tokens and T.
        frequencies: M, the number of DCT components; divides D.
        pooling: "mean", "cls" (the first real token) or "last" (the last one).
        profile: "paper" (DCT over the N blocks and each sentence's real tokens) or "official" (the published code's 6 x 6
            grid over the padded plane).
        backend: "auto", or a name that ``backends()`` lists.

    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was expected and what was passed.
        NotImplementedError: on forward-mode or second derivatives, from an op; in plain PyTorch they are right.
    """
    batch = validate.types(hidden_states, attention_mask, cu_seqlens)
    return squeeze_batch(batch, _reading(frequencies, profile, pooling), backend)


def squeeze_batch(batch: Batch, reading: Reading, backend: str) -> tuple[Tensor, Tensor | None]:
    """``squeeze`` of records whose types are right."""
    chosen = _choose(backend, batch)
    if chosen == "reference":
        _validate_plain(batch, reading)
        return reference.squeeze(batch, reading)
    return ops.squeeze.run(batch, reading, chosen)


def gate(
    squeezed: Tensor,
    parameters: GateParameters,
    *,
    num_blocks: int,
    activation: str = "tanh",
    eps: float = 1e-6,
    profile: str = "paper",
    training: bool = False,
    momentum: float = 0.1,
    backend: str = "auto",
) -> Tensor:
    """Excitation and s-norm: the gates g [B, N, D] from f [B, D].

        s = act(W1 f + b1),  z_n = W2_n s + b2_n,  e_n = sigmoid(BN_n(z_n))
        g[b,n,d] = exp(tau e_n[b,d] + c_n) / sum_n' exp(tau e_n'[b,d] + c_n')

    Args:
        squeezed: f [B, D], float32 or float64.
        parameters: the gate's tensors, of any floating dtype. Without block prior c = 0, without gate scale tau = 1: the
            paper's formula.
        num_blocks: N.
        activation: "tanh" or "relu".
        eps: the batch norm's.
        profile: "official" sums the s-norm over batch and features too, and has neither block prior nor gate scale.
        training: batch statistics instead of the running ones, which are then updated in place with ``momentum``. This
            inside torch.compile or torch.func, and ``profile="official"``, are plain PyTorch on every backend.

    Raises:
        ValueError: an argument is wrong, or batch statistics of a single sentence are wanted.
    """
    validate.positive_int("num_blocks", num_blocks)
    validate.parameter_types(parameters)
    validate.squeezed(squeezed)
    return gate_squeezed(
        squeezed, parameters, num_blocks, _gating(activation, eps, profile, training, momentum), backend
    )


def gate_squeezed(
    squeezed: Tensor, parameters: GateParameters, num_blocks: int, gating: Gating, backend: str
) -> Tensor:
    """``gate`` of records whose types are right."""
    if gating.training and parameters.running_mean is not None:
        validate.batch_statistics(squeezed.shape[0])
    # While a graph is traced N may be symbolic, and the choice takes constants alone.
    known_blocks = None if torch.compiler.is_compiling() else num_blocks
    chosen = choose(backend, Call(squeezed.device, squeezed.dtype, num_blocks=known_blocks))
    if chosen == "reference" or gating.profile != "paper":
        validate.gate(parameters, gating, num_blocks, squeezed)
        return reference.gate(squeezed, parameters, num_blocks, gating)
    if gating.training:
        validate.gate(parameters, gating, num_blocks, squeezed)
        if not _trains_in_kernels((squeezed,), parameters, len(squeezed)):
            return reference.gate(squeezed, parameters, num_blocks, gating)
        how = direct.How(Reading(frequencies=1), gating, chosen, engine_of(chosen))
        return direct.GateInTraining.apply(how, squeezed, *parameters)
    validate.forward_mode((squeezed, *parameters))
    validate.transforms((squeezed, *parameters), mapped=True)
    return ops.gate.run(squeezed, parameters, num_blocks, gating, chosen)


def _trains_in_kernels(tensors: Sequence[Tensor], parameters: GateParameters, num_sentences: int) -> bool:
    """Whether an engine computes batch statistics. No op does: what is traced or transformed takes plain PyTorch, and so does
    what has no statistics, a gate without norm or fewer than two sentences."""
    if parameters.running_mean is None or not is_ordinary((*tensors, *parameters)):
        return False
    return num_sentences > 1


def fuse(
    hidden_states: Sequence[Tensor],
    gates: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Spatial selection: v[b,l,d] = sum_n g[b,n,d] u_n[b,l,d], 0 at padding; shaped and typed like a hidden state.

    Args and errors as in ``squeeze``; ``gates`` is g [B, N, D].
    """
    batch = validate.types(hidden_states, attention_mask, cu_seqlens)
    validate.tensor("gates", gates)
    chosen = _choose(backend, batch, (gates,))
    if chosen == "reference":
        _validate_plain(batch, Reading(frequencies=1))
        validate.gates(gates, batch)
        return reference.fuse(batch, gates)
    return ops.fuse.run(batch, gates, chosen)


def select_with(gate_function: GateFunction, batch: Batch, reading: Reading, backend: str) -> Tensor:
    """v with any differentiable gate between squeeze and fuse; each hidden state's gradient is written once."""
    chosen = _choose(backend, batch)
    if chosen == "reference":
        _validate_plain(batch, reading)
        squeezed, _ = reference.squeeze(batch, reading)
        return reference.fuse(batch, gate_function(squeezed))
    validate.no_transform()
    hidden_states, attention_mask, cu_seqlens = batch
    squeezed, like_fused, like_gates = SqueezeForFuse.apply(attention_mask, cu_seqlens, reading, chosen, *hidden_states)
    detached = [hidden_state.detach() for hidden_state in hidden_states]
    return FuseFromCarriers.apply(
        gate_function(squeezed), like_fused, like_gates, attention_mask, cu_seqlens, chosen, *detached
    )


def select_pool_with(gate_function: GateFunction, batch: Batch, reading: Reading, backend: str) -> Tensor:
    """o with any differentiable gate: pooling and the weighted sum commute, so v is never formed."""
    squeezed, pooled = squeeze_batch(batch, reading, backend)
    assert pooled is not None
    return reference.pool(gate_function(squeezed), pooled, batch.dtype)


def select_pool_in_training(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating, backend: str
) -> Tensor:
    """o with batch statistics."""
    chosen = _choose(backend, batch)
    if chosen == "reference" or not _trains_in_kernels(batch.hidden_states, parameters, batch.num_sentences):
        return select_pool_with(_gate_function(batch, parameters, gating, backend), batch, reading, backend)
    validate.select(batch, reading, parameters, gating)
    validate.token_values(batch)
    how = direct.How(reading, gating, chosen, engine_of(chosen))
    return direct.SelectPool.apply(how, batch.attention_mask, batch.cu_seqlens, *parameters, *batch.hidden_states)


def _gate_function(batch: Batch, parameters: GateParameters, gating: Gating, backend: str) -> GateFunction:
    return partial(gate_squeezed, parameters=parameters, num_blocks=batch.num_blocks, gating=gating, backend=backend)


def select(
    hidden_states: Sequence[Tensor],
    parameters: GateParameters,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    frequencies: int = 4,
    profile: str = "paper",
    activation: str = "tanh",
    eps: float = 1e-6,
    training: bool = False,
    momentum: float = 0.1,
    backend: str = "auto",
) -> Tensor:
    """The whole selector, token output: v [B, L, D] (packed [T, D]), 0 at padding. Arguments as in the three stages."""
    batch = validate.types(hidden_states, attention_mask, cu_seqlens)
    validate.parameter_types(parameters)
    reading, gating = _reading(frequencies, profile, None), _gating(activation, eps, profile, training, momentum)
    if profile != "paper" or training:
        return select_with(_gate_function(batch, parameters, gating, backend), batch, reading, backend)
    return select_fused(batch, reading, parameters, gating, backend)


def select_fused(batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating, backend: str) -> Tensor:
    """v for profile "paper" with running statistics: one op."""
    chosen = _choose(backend, batch, parameters)
    if chosen != "reference":
        return ops.select.run(batch, reading, parameters, gating, chosen)
    return select_with(_gate_function(batch, parameters, gating, chosen), batch, reading, chosen)


def select_pool(
    hidden_states: Sequence[Tensor],
    parameters: GateParameters,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    frequencies: int = 4,
    profile: str = "paper",
    pooling: str = "mean",
    activation: str = "tanh",
    eps: float = 1e-6,
    training: bool = False,
    momentum: float = 0.1,
    backend: str = "auto",
) -> Tensor:
    """The whole selector, pooled: sentence embeddings o [B, D], o[b,d] = sum_n g[b,n,d] p[b,n,d], in the hidden states'
    dtype. Every hidden state is read once and v is never formed, nor, with running statistics, g. Arguments as in the three
    stages."""
    batch = validate.types(hidden_states, attention_mask, cu_seqlens)
    validate.word("pooling", pooling, POOLINGS)  # None is for squeeze alone
    validate.parameter_types(parameters)
    reading, gating = _reading(frequencies, profile, pooling), _gating(activation, eps, profile, training, momentum)
    if profile == "paper" and training:
        return select_pool_in_training(batch, reading, parameters, gating, backend)
    if profile != "paper":
        return select_pool_with(_gate_function(batch, parameters, gating, backend), batch, reading, backend)
    return select_pool_fused(batch, reading, parameters, gating, backend)


def select_pool_fused(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating, backend: str
) -> Tensor:
    """o for profile "paper" with running statistics: one op."""
    chosen = _choose(backend, batch, parameters)
    if chosen != "reference":
        return ops.select_pool.run(batch, reading, parameters, gating, chosen)
    return select_pool_with(_gate_function(batch, parameters, gating, chosen), batch, reading, chosen)
