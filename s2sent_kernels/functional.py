"""squeeze, gate, fuse, select, select_pool as functions of tensors: arguments, choice of backend and of path, nothing else.

Shapes: N hidden states ``[B, L, D]`` with an optional mask ``[B, L]``, or packed ``[T, D]`` with int32 ``cu_seqlens
[B + 1]``. Dtypes: float32, float16, bfloat16 on every backend, float64 on the reference. f, p and the gates are float32
(float64 for float64 inputs). The formulas stand in ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gradients, ops, reference, validate
from .backend import choose
from .reference import GateParameters
from .tokens import Tokens

GateFunction = Callable[[Tensor], Tensor]  # f [B, D] -> g [B, N, D]


def _choose(
    backend: str,
    hidden_states: Sequence[Tensor],
    attention_mask: Any,
    cu_seqlens: Any,
    frequencies: int,
    profile: str,
    tokens: bool = False,
) -> str:
    """The backend of a call. ``tokens``: it makes fused tokens and wants no gradient. On the plain PyTorch path, which no op
    guards, the tensors are validated here."""
    validate.positive_int("frequencies", frequencies)
    if len(hidden_states) == 0:
        raise ValueError("hidden_states: expected at least one tensor, got none")
    first = hidden_states[0]
    work = (len(hidden_states), int(first.shape[-1])) if tokens and first.ndim else None
    chosen = choose(backend, first.device, first.dtype, work)
    if chosen == "reference":
        validate.batch(hidden_states, attention_mask, cu_seqlens, frequencies, profile)
        if not torch.compiler.is_compiling():
            validate.cu_seqlens_values(cu_seqlens, first.shape[0])
    return chosen


def _tokens(hidden_states: Sequence[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
    return Tokens.of(hidden_states[0].shape, hidden_states[0].device, attention_mask, cu_seqlens)


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
    """Frequency selection: f [B, D], and with ``pooling`` ("mean", "cls", "last") the pooled p [B, N, D], else None.

        f[b,d]   = sum_n sum_l alpha[m(d),n] beta[b,m(d),l] u_n[b,l,d]
        p[b,n,d] = sum_l w[b,l] u_n[b,l,d]

    Args:
        hidden_states: N tensors [B, L, D], lowest block first, any strides; or packed [T, D] with ``cu_seqlens``.
        attention_mask: [B, L] bool, integer or float, nonzero at real tokens; None means that every token is real.
        cu_seqlens: int32 [B + 1], the packed sentences' first tokens and T.
        frequencies: M, the number of DCT components; divides D.
        profile: "paper" (DCT over the N blocks and each sentence's real tokens) or "official" (the published code's 6 x 6
            grid over the padded plane).
        backend: "auto", "reference", "triton" or "native".

    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was expected and what came.
        NotImplementedError: on forward-mode or second derivatives, from an op; in plain PyTorch they are right.
    """
    validate.arguments(hidden_states, attention_mask, cu_seqlens, pooling, profile)
    chosen = _choose(backend, hidden_states, attention_mask, cu_seqlens, frequencies, profile)
    if chosen == "reference":
        tokens = _tokens(hidden_states, attention_mask, cu_seqlens)
        return reference.squeeze(hidden_states, tokens, frequencies, profile, pooling)
    squeezed, pooled = torch.ops.s2sent.squeeze(
        hidden_states, attention_mask, cu_seqlens, frequencies, profile, pooling, chosen
    )
    return squeezed, None if pooling is None else pooled


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
        g[b,n,d] = exp(e_n[b,d] + c_n) / sum_n' exp(e_n'[b,d] + c_n')        (paper)

    Args:
        squeezed: f [B, D], float32 or float64.
        parameters: the gate's tensors, of any floating dtype.
        num_blocks: N.
        activation: "tanh" or "relu".
        eps: the batch norm's.
        profile: "official" sums the s-norm over batch and features too, and knows no block prior.
        training: batch statistics instead of the running ones, which are then updated in place with ``momentum``. This
            and ``profile="official"`` are plain PyTorch on every backend.

    Raises:
        ValueError: an argument is wrong, or batch statistics were asked of a single sentence.
    """
    validate.positive_int("num_blocks", num_blocks)
    validate.option("activation", activation, reference.ACTIVATIONS)
    validate.option("profile", profile, validate.dct.PROFILES)
    validate.squeezed(squeezed)
    if profile == "official" and parameters.block_prior is not None:
        raise ValueError("block_prior: profile 'official' has none")
    validate.gate_parameters(parameters, num_blocks, squeezed.shape[1], squeezed.device)
    chosen = choose(backend, squeezed.device, squeezed.dtype)
    if chosen == "reference" or training or profile == "official":
        return reference.gate(squeezed, parameters, num_blocks, activation, eps, profile, training, momentum)
    return torch.ops.s2sent.gate(squeezed, *parameters, num_blocks, activation, eps, chosen)


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
    validate.arguments(hidden_states, attention_mask, cu_seqlens)
    if not isinstance(gates, Tensor):
        raise TypeError(f"gates: expected a tensor, got {type(gates).__name__}")
    chosen = _choose(backend, hidden_states, attention_mask, cu_seqlens, 1, "paper")
    if chosen == "reference":
        validate.gates(gates, hidden_states, cu_seqlens)
        return reference.fuse(hidden_states, gates, _tokens(hidden_states, attention_mask, cu_seqlens))
    return torch.ops.s2sent.fuse(hidden_states, attention_mask, cu_seqlens, gates, chosen)


def select_with(
    gate_function: GateFunction,
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    backend: str,
) -> Tensor:
    """v with any differentiable gate between squeeze and fuse; each hidden state's gradient is written once."""
    validate.arguments(hidden_states, attention_mask, cu_seqlens, None, profile)
    chosen = _choose(backend, hidden_states, attention_mask, cu_seqlens, frequencies, profile)
    if chosen == "reference":
        tokens = _tokens(hidden_states, attention_mask, cu_seqlens)
        squeezed, _ = reference.squeeze(hidden_states, tokens, frequencies, profile)
        return reference.fuse(hidden_states, gate_function(squeezed), tokens)
    squeezed, like_fused, like_gates = gradients.SqueezeForFuse.apply(
        attention_mask, cu_seqlens, frequencies, profile, chosen, *hidden_states
    )
    detached = [hidden_state.detach() for hidden_state in hidden_states]
    return gradients.FuseFromCarriers.apply(
        gate_function(squeezed), like_fused, like_gates, attention_mask, cu_seqlens, chosen, *detached
    )


def select_pool_with(
    gate_function: GateFunction,
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str,
    backend: str,
) -> Tensor:
    """o with any differentiable gate: pooling and the weighted sum commute, so v is never formed."""
    squeezed, pooled = squeeze(
        hidden_states, attention_mask, cu_seqlens=cu_seqlens, frequencies=frequencies, profile=profile,
        pooling=pooling, backend=backend,
    )  # fmt: skip
    assert pooled is not None
    return reference.pool(gate_function(squeezed), pooled, hidden_states[0].dtype)


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
    validate.arguments(hidden_states, attention_mask, cu_seqlens, None, profile, activation)
    validate.parameter_types(parameters)
    validate.number("eps", eps)
    in_one = profile == "paper" and not training
    direct = in_one and ops.without_dispatcher(hidden_states, parameters)
    tokens = direct or (in_one and not ops.gradient_wanted(hidden_states, parameters))
    chosen = _choose(backend, hidden_states, attention_mask, cu_seqlens, frequencies, profile, tokens)
    if chosen != "reference" and in_one:
        op = ops._select if direct else torch.ops.s2sent.select
        return op(hidden_states, attention_mask, cu_seqlens, *parameters, frequencies, activation, eps, chosen)[0]
    gate_function = partial(
        gate, parameters=parameters, num_blocks=len(hidden_states), activation=activation, eps=eps, profile=profile,
        training=training, momentum=momentum, backend=chosen,
    )  # fmt: skip
    return select_with(gate_function, hidden_states, attention_mask, cu_seqlens, frequencies, profile, chosen)


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
    validate.arguments(hidden_states, attention_mask, cu_seqlens, pooling, profile, activation)
    validate.option("pooling", pooling, validate.POOLINGS)
    validate.parameter_types(parameters)
    validate.number("eps", eps)
    chosen = _choose(backend, hidden_states, attention_mask, cu_seqlens, frequencies, profile)
    if chosen != "reference" and profile == "paper" and not training:
        op = ops._select_pool if ops.without_dispatcher(hidden_states, parameters) else torch.ops.s2sent.select_pool
        return op(
            hidden_states, attention_mask, cu_seqlens, *parameters, frequencies, pooling, activation, eps, chosen
        )[0]
    gate_function = partial(
        gate, parameters=parameters, num_blocks=len(hidden_states), activation=activation, eps=eps, profile=profile,
        training=training, momentum=momentum, backend=chosen,
    )  # fmt: skip
    return select_pool_with(
        gate_function, hidden_states, attention_mask, cu_seqlens, frequencies, profile, pooling, chosen
    )
