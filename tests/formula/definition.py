"""The specification's formulas, written out a second time.

``definition_*`` share nothing with the package: they stack the hidden states, fill the bases number by number and use float64
throughout.
"""

import math

import torch
import torch.nn.functional as F

X = [int(k) for k in "00110221203401301234501234561234"]
Y = [int(k) for k in "01012012230043154321065432106543"]


def c(k, i, P):
    return math.cos(math.pi * k * (i + 0.5) / P) * (math.sqrt(2) if k > 0 else 1.0) / math.sqrt(P)


def definition_squeeze(hidden_states, mask, frequencies, profile="paper", dtype=torch.float64):
    """f [B, D]"""
    u = torch.stack(hidden_states, dim=1).to(dtype)  # [B, N, L, D]
    B, N, L, D = u.shape
    if profile == "official":
        grid = F.adaptive_avg_pool2d(u.permute(0, 3, 1, 2), (6, 6))  # [B, D, 6, 6]
        plane = torch.zeros(D, 6, 6, dtype=torch.float64)
        for d in range(D):
            m = d // (D // frequencies)
            for i in range(6):
                for j in range(6):
                    plane[d, i, j] = c(X[m], i, 6) * c(Y[m], j, 6)
        return (grid * plane).sum((2, 3))
    pairs = [pair for pair in zip(X, Y, strict=True) if pair[0] < N][:frequencies]
    real = torch.ones(B, L, dtype=torch.bool) if mask is None else mask.bool()
    alpha = torch.tensor([[c(x, n, N) for n in range(N)] for x, _ in pairs], dtype=torch.float64)
    beta = torch.zeros(B, frequencies, L, dtype=torch.float64)
    for b in range(B):
        places = real[b].nonzero().flatten().tolist()
        for m, (_, y) in enumerate(pairs):
            if y < len(places):
                row = [6 / math.sqrt(N * len(places)) * c(y, rank, len(places)) for rank in range(len(places))]
                beta[b, m, places] = torch.tensor(row, dtype=torch.float64)
    weights = (alpha[None, :, :, None] * beta[:, :, None, :]).to(dtype)  # [B, M, N, L]
    return torch.einsum("bnlmd,bmnl->bmd", u.unflatten(-1, (frequencies, -1)), weights).flatten(1)


def definition_pool_blocks(hidden_states, mask, pooling, dtype=torch.float64):
    """p [B, N, D]"""
    u = torch.stack(hidden_states, dim=1).to(dtype)
    B, _, L, _ = u.shape
    real = torch.ones(B, L, dtype=torch.bool) if mask is None else mask.bool()
    w = torch.zeros(B, L, dtype=torch.float64)
    for b in range(B):
        places = real[b].nonzero().flatten().tolist()
        if places:
            chosen = {"mean": places, "cls": places[:1], "last": places[-1:]}[pooling]
            w[b, chosen] = 1 / len(chosen)
    return torch.einsum("bnld,bl->bnd", u, w.to(dtype))


def definition_gate(f, parameters, N, activation="tanh", eps=1e-6, profile="paper", training=False):
    """g [B, N, D], in f's dtype"""
    p = type(parameters)(*(t if t is None else t.to(f.dtype) for t in parameters))
    D = f.shape[1]
    s = getattr(torch, activation)(torch.einsum("hd,bd->bh", p.down_weight, f) + p.down_bias)
    gates = []
    for n in range(N):
        part = slice(n * D, (n + 1) * D)
        z = torch.einsum("dh,bh->bd", p.up_weight[part], s) + p.up_bias[part]
        if p.norm_weight is not None:
            mean, variance = p.running_mean[part], p.running_var[part]
            if training:
                mean = z.mean(0)
                variance = ((z - mean) ** 2).mean(0)
            z = (z - mean) / torch.sqrt(variance + eps) * p.norm_weight[part] + p.norm_bias[part]
        gates.append(torch.sigmoid(z))
    e = torch.stack(gates, dim=1)
    if p.gate_scale is not None:
        e = e * p.gate_scale
    if p.block_prior is not None:
        e = e + p.block_prior[:, None]
    powers = torch.exp(e - e.max() if p.gate_scale is not None else e)
    return powers / (powers.sum() if profile == "official" else powers.sum(1, keepdim=True))


def definition_fuse(hidden_states, gates, mask):
    """v [B, L, D]"""
    v = sum(g[:, None] * u.double() for g, u in zip(gates.unbind(1), hidden_states, strict=True))
    return v if mask is None else v * mask.double()[..., None]


def definition_select(hidden_states, parameters, mask, frequencies, pooling=None, profile="paper", **gate_options):
    """v [B, L, D], or o [B, D]"""
    f = definition_squeeze(hidden_states, mask, frequencies, profile)
    g = definition_gate(f, parameters, len(hidden_states), profile=profile, **gate_options)
    if pooling is None:
        return definition_fuse(hidden_states, g, mask)
    return torch.einsum("bnd,bnd->bd", g, definition_pool_blocks(hidden_states, mask, pooling))
