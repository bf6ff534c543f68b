"""squeeze, gate, fuse in plain PyTorch: the definition that every backend is held to.

    squeeze   f[b,d]   = sum_n sum_l alpha[m(d),n] beta[b,m(d),l] u_n[b,l,d]        frequency selection
              p[b,n,d] = sum_l w[b,l] u_n[b,l,d]                                    pooling of each block
    gate      s = act(W1 f + b1),  z_n = W2_n s + b2_n,  e_n = sigmoid(BN_n(z_n))   excitation
              g[b,n,d] = exp(tau e_n + c_n) / sum_n' exp(tau e_n' + c_n')           s-norm; c = 0 and tau = 1 in the paper
    fuse      v[b,l,d] = sum_n g[b,n,d] u_n[b,l,d]                                  spatial selection
    pool      o[b,d]   = sum_n g[b,n,d] p[b,n,d]

Source: arXiv 2508.18164, Figure 2. Everything is computed in float32 (float64 for float64 inputs), independent of the dtype of
the hidden states and the parameters. The ``*_backward`` functions are the formulas that fused backends implement; tests
compare them with autograd through the forward functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dct
from .call import (
    ACTIVATIONS,
    PROFILES,
    Activation,
    Batch,
    BatchStatistics,
    GateParameters,
    Gating,
    HiddenGradients,
    Layout,
    Place,
    Profile,
    Reading,
    compute_dtype,
)
from .tokens import Tokens


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast would compute the gate's float32 products in float16 or bfloat16. Entered only where it is on, because an
    exported graph would otherwise contain the region. Of the meta device torch cannot even be asked. (torch.amp's
    is_autocast_available could be, but torch 2.11 cannot trace it.)"""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


# ---------------------------------------------------------------- squeeze


def _beta(tokens: Tokens, padded: int, num_blocks: int, reading: Reading) -> Tensor:
    """beta as [B or 1, L, M] or [T, M], float64. ``padded`` is L."""
    if reading.profile == "official":
        return dct.grid_token_basis(padded, reading.frequencies, tokens.real.device).T[None]
    return dct.token_basis(tokens.rank, tokens.length.expand_as(tokens.rank), num_blocks, reading.frequencies)


def _per_part(values: Tensor, weights: Tensor) -> Tensor:
    """``values`` [..., D] times ``weights`` [..., M], each weight covering its part of D / M features."""
    parts = values.unflatten(-1, (weights.shape[-1], -1))
    return (parts * weights[..., None]).flatten(-2)


def squeeze_block(hidden_state: Tensor, place: Place, tokens: Tokens, reading: Reading) -> tuple[Tensor, Tensor | None]:
    """One block's share of f, [B, D], and its p, [B, D] (None without pooling)."""
    dtype = compute_dtype(hidden_state.dtype)
    values = hidden_state.to(dtype)
    real_values = tokens.keep_real(values)
    beta = _beta(tokens, hidden_state.shape[-2], place.num_blocks, reading).to(dtype)
    alpha = dct.block_basis(place.num_blocks, reading.frequencies, reading.profile, hidden_state.device)
    # The published module has no mask: it squeezes padding like any other token.
    seen = values if reading.profile == "official" else real_values
    share = _per_part(tokens.sum(_per_part(seen, beta)), alpha[:, place.block].to(dtype))
    if reading.pooling is None:
        return share, None
    weights = tokens.pooling_weights(reading.pooling).to(dtype)
    return share, tokens.sum(torch.where((weights > 0)[..., None], real_values * weights[..., None], 0))


def squeeze(batch: Batch, reading: Reading) -> tuple[Tensor, Tensor | None]:
    """f [B, D], and p [B, N, D] with a pooling. Formulas and dtypes as in the module docstring."""
    tokens = Tokens.of(batch)
    squeezed = None
    pooled = []
    for block, hidden_state in enumerate(batch.hidden_states):
        share, block_pooled = squeeze_block(hidden_state, Place(block, batch.num_blocks), tokens, reading)
        squeezed = share if squeezed is None else squeezed + share
        pooled.append(block_pooled)
    assert squeezed is not None  # N >= 1 was validated
    return squeezed, None if reading.pooling is None else torch.stack([p for p in pooled if p is not None], dim=1)


def squeeze_backward(
    grads: HiddenGradients, layout: Layout, needed: Sequence[bool], reading: Reading
) -> list[Tensor | None]:
    """du_n = g_n dv + w dp_n + alpha_n beta df for the N blocks that ``needed`` marks: each gradient is written once."""
    dtype, shape, num_blocks = compute_dtype(layout.dtype), layout.shape, len(needed)
    tokens = Tokens.of(layout)
    zeros = torch.zeros(shape, dtype=dtype, device=layout.device)
    results: list[Tensor | None] = []
    for block in range(num_blocks):
        if not needed[block]:
            results.append(None)
            continue
        grad = zeros
        if grads.fused is not None and grads.gates is not None:
            grad = grad + tokens.keep_real(tokens.spread(grads.gates[:, block].to(dtype)) * grads.fused.to(dtype))
        if grads.pooled is not None and reading.pooling is not None:
            weights = tokens.pooling_weights(reading.pooling).to(dtype)[..., None]
            grad = grad + torch.where(weights > 0, tokens.spread(grads.pooled[:, block].to(dtype)) * weights, 0)
        if grads.squeezed is not None:
            alpha = dct.block_basis(num_blocks, reading.frequencies, reading.profile, layout.device)[:, block].to(dtype)
            beta = _beta(tokens, shape[-2], num_blocks, reading).to(dtype)
            share = _per_part(_per_part(tokens.spread(grads.squeezed.to(dtype)), alpha).expand(shape), beta)
            grad = grad + (share if reading.profile == "official" else tokens.keep_real(share))
        results.append(grad.to(layout.dtype))
    return results


# ---------------------------------------------------------------- gate


def activate(values: Tensor, activation: Activation) -> Tensor:
    if activation == "tanh":
        return torch.tanh(values)
    if activation == "relu":
        return torch.relu(values)
    raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")


def slope(activated: Tensor, activation: Activation) -> Tensor:
    """The derivative of ``activate``, from its result."""
    if activation == "tanh":
        return 1 - activated * activated
    if activation == "relu":
        return (activated > 0).to(activated.dtype)
    raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")


def normalise(excited: Tensor, parameters: GateParameters, gating: Gating) -> Tensor:
    """Batch norm of z [B, N * D] over b, or z itself where the gate has no norm. Training uses the batch's own statistics
    and updates the running ones in place, in float32, then rounded to the dtype that they are kept in."""
    mean, var = parameters.running_mean, parameters.running_var
    if mean is None or var is None or parameters.norm_weight is None or parameters.norm_bias is None:
        return excited
    dtype = excited.dtype
    weight, bias = parameters.norm_weight.to(dtype), parameters.norm_bias.to(dtype)
    if gating.training and excited.shape[0] != 0:  # an empty batch has no statistics: the running ones would become NaN
        new_mean, new_var = mean.to(dtype), var.to(dtype)
        result = F.batch_norm(excited, new_mean, new_var, weight, bias, True, gating.momentum, gating.eps)
        if mean.dtype != dtype:
            mean.copy_(new_mean)
            var.copy_(new_var)
        return result
    return F.batch_norm(excited, mean.to(dtype), var.to(dtype), weight, bias, False, gating.momentum, gating.eps)


def _running_statistics(parameters: GateParameters, gating: Gating) -> BatchStatistics:
    assert parameters.running_mean is not None and parameters.running_var is not None
    return BatchStatistics(parameters.running_mean, torch.rsqrt(parameters.running_var + gating.eps))


def _normalise_again(
    excited: Tensor, parameters: GateParameters, gating: Gating, statistics: BatchStatistics | None
) -> Tensor:
    """``normalise`` for a backward pass: with these statistics of the batch, or the running ones, and without an update."""
    if statistics is None or parameters.norm_weight is None or parameters.norm_bias is None:
        return normalise(excited, parameters, gating)
    return (excited - statistics.mean) * statistics.rstd * parameters.norm_weight + parameters.norm_bias


def normalise_in_training(
    excited: Tensor, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, BatchStatistics]:
    """``normalise`` in training, and the statistics that it used."""
    dtype = excited.dtype
    w = parameters.each(lambda t: t.to(dtype))
    if excited.shape[0] == 0:
        return excited, _running_statistics(w, gating)
    result, mean, rstd = torch.native_batch_norm(
        excited, w.norm_weight, w.norm_bias, w.running_mean, w.running_var, True, gating.momentum, gating.eps
    )
    for kept, new in ((parameters.running_mean, w.running_mean), (parameters.running_var, w.running_var)):
        if kept is not None and new is not None and kept is not new:
            kept.copy_(new)
    return result, BatchStatistics(mean, rstd)


def s_norm(
    excited: Tensor, block_prior: Tensor | None, gate_scale: Tensor | None, profile: Profile = "paper"
) -> Tensor:
    """Gates from normalised z [B, N, D]: exp(tau sigmoid(z) + c) over its sum, which runs over the blocks in profile ``paper``
    and over blocks, batch and features in ``official``."""
    logits = torch.sigmoid(excited)
    if gate_scale is not None:
        logits = logits * gate_scale.to(logits.dtype)
    if block_prior is not None:
        prior = block_prior.to(logits.dtype)
        # c is unbounded. (amax with its dim: the ONNX exporter has no other.)
        logits = logits + (prior - prior.detach().amax(dim=0))[:, None]
    if gate_scale is not None:
        # tau is unbounded too, and where it is large no block may reach the bound that max c gives.
        logits = logits - logits.detach().amax(dim=1, keepdim=True)
    weights = logits.exp()
    if profile == "paper":
        return weights / weights.sum(dim=1, keepdim=True)
    if profile == "official":
        return weights / weights.sum()
    raise ValueError(f"profile: expected one of {PROFILES}, got {profile!r}")


def _excite(squeezed: Tensor, parameters: GateParameters, gating: Gating) -> tuple[Tensor, Tensor]:
    """s [B, H] and z [B, N * D] from f [B, D]."""
    dtype = squeezed.dtype
    down = F.linear(squeezed, parameters.down_weight.to(dtype), parameters.down_bias.to(dtype))
    bottleneck = activate(down, gating.activation)
    return bottleneck, F.linear(bottleneck, parameters.up_weight.to(dtype), parameters.up_bias.to(dtype))


def gate(squeezed: Tensor, parameters: GateParameters, num_blocks: int, gating: Gating) -> Tensor:
    """g [B, N, D] from f [B, D]."""
    with autocast_off(squeezed.device):
        _, excited = _excite(squeezed, parameters, gating)
        excited = normalise(excited, parameters, gating)
        excited = excited.unflatten(1, (num_blocks, -1))
        return s_norm(excited, parameters.block_prior, parameters.gate_scale, gating.profile)


def gate_in_training(
    squeezed: Tensor, pooled: Tensor | None, parameters: GateParameters, gating: Gating, dtype: torch.dtype
) -> tuple[Tensor, BatchStatistics]:
    """g, or with p [B, N, D] o in ``dtype``, and the statistics of the batch that the gate used, for profile ``paper``. Updates
    the running ones as ``normalise`` does."""
    with autocast_off(squeezed.device):
        _, excited = _excite(squeezed, parameters, gating)
        excited, statistics = normalise_in_training(excited, parameters, gating)
        excited = excited.unflatten(1, (-1, squeezed.shape[1]))
        gates = s_norm(excited, parameters.block_prior, parameters.gate_scale)
    return gates if pooled is None else pool(gates, pooled, dtype), statistics


def gate_backward(
    grad_gates: Tensor,  # dg [B, N, D]
    squeezed: Tensor,  # f [B, D]
    parameters: GateParameters,
    gating: Gating,
    statistics: BatchStatistics | None = None,
) -> tuple[Tensor, GateParameters]:
    """df and every parameter's gradient, for profile ``paper``. ``statistics``: the batch's, through which gradients flow;
    None for the running ones, which have none. Everything is recomputed from f: the gate's tensors are [B, N, D] at most,
    and recomputing them is cheaper than saving them."""
    dtype = squeezed.dtype
    num_blocks = grad_gates.shape[1]
    w = parameters.each(lambda t: t.to(dtype))
    with autocast_off(squeezed.device):
        bottleneck, z = _excite(squeezed, w, gating)
        y = _normalise_again(z, w, gating, statistics).unflatten(1, (num_blocks, -1))
        e = torch.sigmoid(y)
        g = s_norm(y, w.block_prior, w.gate_scale)

        dlogits = g * (grad_gates - (g * grad_gates).sum(dim=1, keepdim=True))
        dprior = None if w.block_prior is None else dlogits.sum(dim=(0, 2))
        dscale = None if w.gate_scale is None else (dlogits * e).sum()
        de = dlogits if w.gate_scale is None else dlogits * w.gate_scale
        dy = (de * e * (1 - e)).flatten(1)
        dnorm_weight = dnorm_bias = None
        dz = dy
        if w.norm_weight is not None and w.running_mean is not None and w.running_var is not None:
            mean, inv_std = _running_statistics(w, gating) if statistics is None else statistics
            normed = (z - mean) * inv_std
            dnorm_weight, dnorm_bias = (dy * normed).sum(dim=0), dy.sum(dim=0)
            if statistics is not None and len(squeezed) != 0:
                # z moves its column's mean and variance, and with them every sentence's y.
                dz = dy - dnorm_bias / len(squeezed) - normed * (dnorm_weight / len(squeezed))
            dz = dz * (w.norm_weight * inv_std)
        dbottleneck = dz @ w.up_weight
        ddown = dbottleneck * slope(bottleneck, gating.activation)
        grads = GateParameters(
            down_weight=ddown.T @ squeezed,
            down_bias=ddown.sum(dim=0),
            up_weight=dz.T @ bottleneck,
            up_bias=dz.sum(dim=0),
            norm_weight=dnorm_weight,
            norm_bias=dnorm_bias,
            block_prior=dprior,
            gate_scale=dscale,
        )
        return ddown @ w.down_weight, grads


def gate_pool_backward(
    grad_output: Tensor,  # do [B, D], in the hidden states' dtype
    squeezed: Tensor,  # f [B, D]
    pooled: Tensor,  # p [B, N, D]
    parameters: GateParameters,
    gating: Gating,
    statistics: BatchStatistics | None = None,
) -> tuple[Tensor, Tensor, GateParameters]:
    """dp = g do, and ``gate_backward`` of dg = do p: the backward of gate and pool together."""
    with autocast_off(squeezed.device):
        w = parameters.each(lambda t: t.to(squeezed.dtype))
        _, excited = _excite(squeezed, w, gating)
        excited = _normalise_again(excited, w, gating, statistics).unflatten(1, (pooled.shape[1], -1))
        gates = s_norm(excited, w.block_prior, w.gate_scale)
    rows = grad_output.to(squeezed.dtype)[:, None]
    return gates * rows, *gate_backward(rows * pooled, squeezed, parameters, gating, statistics)


def gate_in_training_backward(
    grad: Tensor,  # dg [B, N, D], or with p do [B, D]
    squeezed: Tensor,
    pooled: Tensor | None,
    statistics: BatchStatistics,
    parameters: GateParameters,
    gating: Gating,
) -> tuple[Tensor | None, Tensor, GateParameters]:
    """dp (None without p), df and every parameter's gradient, behind ``gate_in_training``."""
    if pooled is None:
        return None, *gate_backward(grad, squeezed, parameters, gating, statistics)
    return gate_pool_backward(grad, squeezed, pooled, parameters, gating, statistics)


def pool(gates: Tensor, pooled: Tensor, dtype: torch.dtype) -> Tensor:
    """o [B, D] = sum_n g p, in the hidden states' dtype."""
    return (gates * pooled).sum(dim=1).to(dtype)


# ---------------------------------------------------------------- fuse


def fuse(batch: Batch, gates: Tensor) -> Tensor:
    """v like a hidden state, in its dtype; 0 at padding."""
    dtype, tokens = compute_dtype(batch.dtype), Tokens.of(batch)
    fused = None
    for block, hidden_state in enumerate(batch.hidden_states):
        term = tokens.spread(gates[:, block].to(dtype)) * tokens.keep_real(hidden_state.to(dtype))
        fused = term if fused is None else fused + term
    assert fused is not None  # N >= 1 was validated
    # A gate that is NaN turns the zeros at padding into NaN, so they are masked again.
    # Contiguous for any strides of the hidden states: the op's fake promises it, and compiled code relies on it.
    return tokens.keep_real(fused).to(batch.dtype).contiguous()


def fuse_backward(grad_fused: Tensor, batch: Batch) -> Tensor:
    """dg [B, N, D] = sum_l dv u_n over real tokens."""
    dtype, tokens = compute_dtype(grad_fused.dtype), Tokens.of(batch)
    grad = tokens.keep_real(grad_fused.to(dtype))
    terms = [tokens.sum(grad * tokens.keep_real(u.to(dtype))) for u in batch.hidden_states]
    return torch.stack(terms, dim=1)
