"""squeeze, gate, fuse in plain PyTorch: the definition that every backend is held to.

    squeeze   f[b,d]   = sum_n sum_l alpha[m(d),n] beta[b,m(d),l] u_n[b,l,d]        frequency selection
              p[b,n,d] = sum_l w[b,l] u_n[b,l,d]                                    pooling of each block
    gate      s = act(W1 f + b1),  z_n = W2_n s + b2_n,  e_n = sigmoid(BN_n(z_n))   excitation
              g[b,n,d] = exp(e_n + c_n) / sum_n' exp(e_n' + c_n')                   s-norm
    fuse      v[b,l,d] = sum_n g[b,n,d] u_n[b,l,d]                                  spatial selection
    pool      o[b,d]   = sum_n g[b,n,d] p[b,n,d]

Source: arXiv 2508.18164, Figure 2. Everything is computed in float32 (float64 for float64 inputs), whatever the dtype of the
hidden states and the parameters. The ``*_backward`` functions are the formulas that fused backends implement; autograd
through the forward functions must agree with them, and a test says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dct
from .tokens import Tokens

ACTIVATIONS = ("tanh", "relu")


class GateParameters(NamedTuple):
    """The tensors of the gate, of any floating dtype; N blocks, D features, H bottleneck width.

    ``norm_weight`` to ``running_var`` are all present (batch norm) or all None (no norm).
    """

    down_weight: Tensor  # [H, D]
    down_bias: Tensor  # [H]
    up_weight: Tensor  # [N * D, H], n major
    up_bias: Tensor  # [N * D]
    norm_weight: Tensor | None = None  # [N * D]
    norm_bias: Tensor | None = None  # [N * D]
    running_mean: Tensor | None = None  # [N * D]
    running_var: Tensor | None = None  # [N * D]
    block_prior: Tensor | None = None  # [N]

    def each(self, function: Callable[[Tensor], Tensor]) -> GateParameters:
        """``function`` of every tensor that is there."""
        return GateParameters(*(None if t is None else function(t) for t in self))  # type: ignore[arg-type]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that f, p and the gates have for hidden states of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast would turn the gate's float32 products into float16 or bfloat16. Entered only where it is on, because an
    exported graph would otherwise carry the region."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


# ---------------------------------------------------------------- squeeze


def _beta(tokens: Tokens, size: int, num_blocks: int, frequencies: int, profile: str) -> Tensor:
    """beta as [B or 1, L, M] or [T, M], float64."""
    if profile == "official":
        return dct.grid_token_basis(size, frequencies, tokens.real.device).T[None]
    return dct.token_basis(tokens.rank, tokens.length.expand_as(tokens.rank), num_blocks, frequencies)


def _per_part(values: Tensor, weights: Tensor) -> Tensor:
    """``values`` [..., D] times ``weights`` [..., M], each weight covering its part of D / M features."""
    parts = values.unflatten(-1, (weights.shape[-1], -1))
    return (parts * weights[..., None]).flatten(-2)


def squeeze_one_block(
    hidden_state: Tensor,
    block: int,
    num_blocks: int,
    tokens: Tokens,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> tuple[Tensor, Tensor | None]:
    """One block's share of f, [B, D], and its p, [B, D] (None without pooling)."""
    dtype = compute_dtype(hidden_state.dtype)
    values = hidden_state.to(dtype)
    real_values = tokens.keep_real(values)
    beta = _beta(tokens, hidden_state.shape[-2], num_blocks, frequencies, profile).to(dtype)
    alpha = dct.block_basis(num_blocks, frequencies, profile, hidden_state.device)[:, block].to(dtype)
    # The published module knows no mask: it squeezes padding with everything else.
    seen = values if profile == "official" else real_values
    share = _per_part(tokens.sum(_per_part(seen, beta)), alpha)
    if pooling is None:
        return share, None
    weights = tokens.pooling_weights(pooling).to(dtype)
    return share, tokens.sum(torch.where((weights > 0)[..., None], real_values * weights[..., None], 0))


def squeeze(
    hidden_states: Sequence[Tensor],
    tokens: Tokens,
    frequencies: int,
    profile: str = "paper",
    pooling: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """f [B, D], and p [B, N, D] where ``pooling`` is given. Formulas and dtypes as in the module docstring."""
    num_blocks = len(hidden_states)
    squeezed = None
    pooled = []
    for block, hidden_state in enumerate(hidden_states):
        share, block_pooled = squeeze_one_block(hidden_state, block, num_blocks, tokens, frequencies, profile, pooling)
        squeezed = share if squeezed is None else squeezed + share
        pooled.append(block_pooled)
    assert squeezed is not None  # N >= 1 was validated
    return squeezed, None if pooling is None else torch.stack([p for p in pooled if p is not None], dim=1)


def squeeze_backward(
    grad_squeezed: Tensor | None,  # df [B, D]
    grad_pooled: Tensor | None,  # dp [B, N, D]
    grad_fused: Tensor | None,  # dv, shaped like a hidden state
    gates: Tensor | None,  # g [B, N, D], with grad_fused
    shape: Sequence[int],  # of each hidden state
    hidden_dtype: torch.dtype,
    needed: Sequence[bool],  # N of them: which hidden states want a gradient
    tokens: Tokens,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> list[Tensor | None]:
    """du_n = g_n dv + w dp_n + alpha_n beta df: every reader's share of a hidden state's gradient, written once."""
    dtype = compute_dtype(hidden_dtype)
    num_blocks, device = len(needed), tokens.real.device
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    grads: list[Tensor | None] = []
    for block in range(num_blocks):
        if not needed[block]:
            grads.append(None)
            continue
        grad = zeros
        if grad_fused is not None and gates is not None:
            grad = grad + tokens.keep_real(tokens.spread(gates[:, block].to(dtype)) * grad_fused.to(dtype))
        if grad_pooled is not None and pooling is not None:
            weights = tokens.pooling_weights(pooling).to(dtype)[..., None]
            grad = grad + torch.where(weights > 0, tokens.spread(grad_pooled[:, block].to(dtype)) * weights, 0)
        if grad_squeezed is not None:
            alpha = dct.block_basis(num_blocks, frequencies, profile, device)[:, block].to(dtype)
            beta = _beta(tokens, shape[-2], num_blocks, frequencies, profile).to(dtype)
            share = _per_part(_per_part(tokens.spread(grad_squeezed.to(dtype)), alpha).expand(shape), beta)
            grad = grad + (share if profile == "official" else tokens.keep_real(share))
        grads.append(grad.to(hidden_dtype))
    return grads


# ---------------------------------------------------------------- gate


def activate(values: Tensor, activation: str) -> Tensor:
    return torch.tanh(values) if activation == "tanh" else torch.relu(values)


def normalise(
    excited: Tensor, parameters: GateParameters, eps: float, training: bool = False, momentum: float = 0.1
) -> Tensor:
    """Batch norm of z [B, N * D] over b, or z itself where the gate has no norm. In training the batch's own statistics
    are used and the running ones updated in place, in float32 whatever dtype they are kept in."""
    mean, var = parameters.running_mean, parameters.running_var
    if mean is None or var is None or parameters.norm_weight is None or parameters.norm_bias is None:
        return excited
    dtype = excited.dtype
    weight, bias = parameters.norm_weight.to(dtype), parameters.norm_bias.to(dtype)
    if (
        training and excited.shape[0] != 0
    ):  # an empty batch has no statistics, and must not turn the running ones to NaN
        new_mean, new_var = mean.to(dtype), var.to(dtype)
        result = F.batch_norm(excited, new_mean, new_var, weight, bias, True, momentum, eps)
        if mean.dtype != dtype:
            mean.copy_(new_mean)
            var.copy_(new_var)
        return result
    return F.batch_norm(excited, mean.to(dtype), var.to(dtype), weight, bias, False, momentum, eps)


def s_norm(excited: Tensor, block_prior: Tensor | None, profile: str = "paper") -> Tensor:
    """Gates from normalised z [B, N, D]: exp(sigmoid(z) + c) over its sum, in profile ``paper`` over the blocks, in
    ``official`` over blocks, batch and features."""
    logits = torch.sigmoid(excited)
    if block_prior is not None:
        prior = block_prior.to(logits.dtype)
        # c is unbounded. (amax with its dim: the ONNX exporter has no other.)
        logits = logits + (prior - prior.detach().amax(dim=0))[:, None]
    weights = logits.exp()
    return weights / (weights.sum() if profile == "official" else weights.sum(dim=1, keepdim=True))


def gate(
    squeezed: Tensor,
    parameters: GateParameters,
    num_blocks: int,
    activation: str = "tanh",
    eps: float = 1e-6,
    profile: str = "paper",
    training: bool = False,
    momentum: float = 0.1,
) -> Tensor:
    """g [B, N, D] from f [B, D]."""
    with autocast_off(squeezed.device):
        dtype = squeezed.dtype
        down = F.linear(squeezed, parameters.down_weight.to(dtype), parameters.down_bias.to(dtype))
        excited = F.linear(activate(down, activation), parameters.up_weight.to(dtype), parameters.up_bias.to(dtype))
        excited = normalise(excited, parameters, eps, training, momentum)
        return s_norm(excited.unflatten(1, (num_blocks, -1)), parameters.block_prior, profile)


def gate_backward(
    grad_gates: Tensor,  # dg [B, N, D]
    squeezed: Tensor,  # f [B, D]
    parameters: GateParameters,
    activation: str,
    eps: float,
) -> tuple[Tensor, GateParameters]:
    """df and every parameter's gradient, for profile ``paper`` with running statistics (which get none). All of it is
    recomputed from f: the gate's tensors are [B, N, D] at most, and saving them would cost more than it spares."""
    dtype = squeezed.dtype
    num_blocks = grad_gates.shape[1]
    w = parameters.each(lambda t: t.to(dtype))
    with autocast_off(squeezed.device):
        down = F.linear(squeezed, w.down_weight, w.down_bias)
        bottleneck = activate(down, activation)
        z = F.linear(bottleneck, w.up_weight, w.up_bias)
        y = normalise(z, w, eps).unflatten(1, (num_blocks, -1))
        e = torch.sigmoid(y)
        g = s_norm(y, w.block_prior)

        dlogits = g * (grad_gates - (g * grad_gates).sum(dim=1, keepdim=True))
        dprior = None if w.block_prior is None else dlogits.sum(dim=(0, 2))
        dy = (dlogits * e * (1 - e)).flatten(1)
        dnorm_weight = dnorm_bias = None
        dz = dy
        if w.norm_weight is not None and w.running_mean is not None and w.running_var is not None:
            inv_std = torch.rsqrt(w.running_var + eps)
            dnorm_weight = (dy * (z - w.running_mean) * inv_std).sum(dim=0)
            dnorm_bias = dy.sum(dim=0)
            dz = dy * (w.norm_weight * inv_std)
        dbottleneck = dz @ w.up_weight
        slope = 1 - bottleneck * bottleneck if activation == "tanh" else (down > 0).to(dtype)
        ddown = dbottleneck * slope
        grads = GateParameters(
            ddown.T @ squeezed, ddown.sum(dim=0), dz.T @ bottleneck, dz.sum(dim=0),
            dnorm_weight, dnorm_bias, None, None, dprior,
        )  # fmt: skip
        return ddown @ w.down_weight, grads


def gate_pool_backward(
    grad_output: Tensor,  # do [B, D], in the hidden states' dtype
    squeezed: Tensor,  # f [B, D]
    pooled: Tensor,  # p [B, N, D]
    parameters: GateParameters,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, GateParameters]:
    """dp = g do, and what ``gate_backward`` makes of dg = do p: the backward of gate and pool together."""
    gates = gate(squeezed, parameters, pooled.shape[1], activation, eps)
    rows = grad_output.to(squeezed.dtype)[:, None]
    return gates * rows, *gate_backward(rows * pooled, squeezed, parameters, activation, eps)


def pool(gates: Tensor, pooled: Tensor, dtype: torch.dtype) -> Tensor:
    """o [B, D] = sum_n g p, in the hidden states' dtype."""
    return (gates * pooled).sum(dim=1).to(dtype)


# ---------------------------------------------------------------- fuse


def fuse(hidden_states: Sequence[Tensor], gates: Tensor, tokens: Tokens) -> Tensor:
    """v like a hidden state, in its dtype; 0 at padding."""
    dtype = compute_dtype(hidden_states[0].dtype)
    fused = None
    for block, hidden_state in enumerate(hidden_states):
        term = tokens.spread(gates[:, block].to(dtype)) * tokens.keep_real(hidden_state.to(dtype))
        fused = term if fused is None else fused + term
    assert fused is not None  # N >= 1 was validated
    # Once more, because a gate that is NaN would turn the zeros at padding into NaN.
    # Contiguous whatever the hidden states' strides: the op's fake says so, and compiled code relies on it.
    return tokens.keep_real(fused).to(hidden_states[0].dtype).contiguous()


def fuse_backward(grad_fused: Tensor, hidden_states: Sequence[Tensor], tokens: Tokens) -> Tensor:
    """dg [B, N, D] = sum_l dv u_n over real tokens."""
    dtype = compute_dtype(grad_fused.dtype)
    grad = tokens.keep_real(grad_fused.to(dtype))
    terms = [tokens.sum(grad * tokens.keep_real(u.to(dtype))) for u in hidden_states]
    return torch.stack(terms, dim=1)
