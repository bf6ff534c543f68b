"""How far a right engine may be from the float64 reference in one call: the fuzzers' error model.

Engines compute in float32 (float64 for float64 inputs), whatever the dtypes of the inputs. Each rounding moves a number by at
most half an ulp, a share u = 2^-24 (2^-53) of it. What that does to a result depends on the call: terms that cancel, a batch
norm over sentences that are alike, a large gate scale. So the bound of each tensor is measured on the call itself:

1. ``Wobbled`` computes the selector in float64 with all its inputs, hidden states, parameters and incoming gradients, and every
   intermediate result, forward and backward, moved up or down by a quarter to a half of a float32 ulp, as drawn: of one
   size, two moves would often cancel exactly. The largest change of a tensor's elements over DRAWS draws is its ``spread``:
   what roundings of single numbers do to it. Where its inputs have fewer bits the roundings are still float32's, so that an
   engine which computed in 16 bits is found.
   tanh and exp are not rounded so well on a GPU: up to 2 ulp (CUDA C++ Programming Guide, mathematical functions), and exp(x) is
   computed as 2^(x log2 e), whose argument is rounded. There they and their arguments are moved by as much.
2. A sum is no single number: each of its partial sums is rounded. So sums are taken one term after the other, and every partial
   sum is moved, forward and, where a tensor is used many times, backward. Engines sum in chunks, runs and trees, whose partial
   sums are fewer or smaller, and stay below that.
3. A spread is drawn and the error is too. The largest of a few draws underestimates, most of all for a tensor of one element,
   so the error is allowed three of it, times few = sqrt(1 + 4 / elements), or logits where those are fewer: all elements of
   a gradient then hang on the same few roundings. A result beyond that is judged again by the largest of MANY draws.

       |actual - truth| <= 3 few spread + u(output) |truth| + smallest(output)

The last two are the one rounding of the stored result; ``smallest`` is half the distance of subnormal numbers, or what float32
flushes to zero on the way. The truth is ``formula.reference`` in float64. ``Wobbled`` is a second way to write the formula, and
without wobble it has to agree with the truth to float64's rounding: so either is checked by the other.

Where a relu's argument is nearer to zero than its own bound, a right engine may take either slope; then ``unsettled`` says so,
and gradients are not compared.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from fuzz_cases import Case, Inputs
from torch import Tensor

from s2sent_kernels.formula import dct

DRAWS, MANY = 4, 64
ULPS_OF_FUNCTIONS = {"cpu": 0.5, "cuda": 2.0}
UNDERFLOW = 2.0**-100  # a number below float32's range, times gradients and inverse deviations of up to 2^26


def unit(case: Case) -> float:
    return 2.0**-53 if case.double else 2.0**-24


class _Wobble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: float, generator: torch.Generator) -> Tensor:
        ctx.share, ctx.generator = share, generator
        return _moved(values, share, generator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _moved(grad, ctx.share, ctx.generator), None, None


class _Saturating(torch.autograd.Function):
    """tanh or sigmoid, moved, with the slope that its moved result gives: backward passes keep the rounded result, and near
    saturation 1 - s^2 and 1 - e have no more digits than that."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, name: str, share: float, generator: torch.Generator) -> Tensor:
        result = _moved(getattr(torch, name)(values), share, generator)
        ctx.save_for_backward(result)
        ctx.name, ctx.share, ctx.generator = name, share, generator
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (result,) = ctx.saved_tensors
        slope = 1 - result * result if ctx.name == "tanh" else result * (1 - result)
        return _moved(grad * slope, ctx.share, ctx.generator), None, None, None


class _BatchNorm(torch.autograd.Function):
    """(z - mean) rstd of moved statistics. The gradient is the closed form that every engine computes. It takes for granted
    that normed sums to zero, which after rounding it does not: where sentences are alike that is the largest error."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mean: Tensor, rstd: Tensor, share: float, generator: torch.Generator) -> Tensor:
        normed = _moved(_moved(z - mean, share, generator) * rstd, share, generator)
        ctx.save_for_backward(normed, rstd)
        ctx.share, ctx.generator = share, generator
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        normed, rstd = ctx.saved_tensors

        def wobble(values: Tensor) -> Tensor:
            return _moved(values, ctx.share, ctx.generator)

        def mean_of(terms: Tensor) -> Tensor:
            return _added(terms, 1, ctx.share, ctx.generator)[:, None] / terms.shape[1]

        mean, slope = mean_of(grad), mean_of(wobble(grad * normed))
        return wobble(wobble(wobble(grad - mean) - wobble(normed * slope)) * rstd), None, None, None, None


def _moved(values: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Draws in the first dimension: the first as it is, every other one with each number moved."""
    factors = torch.rand(values.shape, generator=generator, dtype=torch.float64).sub_(0.5)
    factors += factors.sign() / 2  # from -1 to -1/2, and from 1/2 to 1
    factors.mul_(share).add_(1)
    factors[:1] = 1
    return values * factors


def _added(values: Tensor, dim: int, share: float, generator: torch.Generator) -> Tensor:
    """The sum over ``dim``, term after term, each partial sum moved."""
    partial = values.cumsum(dim)
    moved = _moved(partial, share, generator) - partial
    moved.narrow(dim, 0, min(1, values.shape[dim])).zero_()  # the first is no sum
    return values.sum(dim) + moved.sum(dim)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int, share: float, generator: torch.Generator) -> Tensor:
        ctx.dim, ctx.shape = dim, values.shape
        return _added(values, dim, share, generator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.unsqueeze(ctx.dim).expand(ctx.shape), None, None, None


class _Repeat(torch.autograd.Function):
    """A new dimension of ``size``, whose gradient is a sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int, size: int, share: float, generator: torch.Generator) -> Tensor:
        ctx.dim, ctx.share, ctx.generator = dim, share, generator
        shape = list(values.shape)
        shape.insert(dim, size)
        return values.unsqueeze(dim).expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _added(grad, ctx.dim, ctx.share, ctx.generator), None, None, None, None


class Wobbled:
    """The selector of ``draws`` + 1 draws at once: every tensor has them in front, and the first is not moved."""

    def __init__(self, case: Case, inputs: Inputs, share: float, draws: int = DRAWS) -> None:
        self.case, self.inputs, self.share, self.draws = case, inputs, share, draws
        self.share_of_functions = share * 2 * ULPS_OF_FUNCTIONS[inputs.hidden_states[0].device.type]
        self.generator = torch.Generator().manual_seed(case.seed)
        self.leaves: dict[str, Tensor] = {}
        for name, tensor in self._tensors().items():
            self.leaves[name] = tensor.double().cpu().expand(draws + 1, *tensor.shape).requires_grad_()
        self.statistics: dict[str, Tensor] = {}
        self.before_relu = torch.ones(draws + 1, 0)

    def _tensors(self) -> dict[str, Tensor]:
        hidden = [self.inputs.padded(u.double()) for u in self.inputs.hidden_states]
        given = {name: t for name, t in self.inputs.parameters._asdict().items() if t is not None}
        return {"hidden states": torch.stack(hidden), **given}

    def wobble(self, values: Tensor) -> Tensor:
        return _Wobble.apply(values, self.share, self.generator)

    def sum(self, values: Tensor, dim: int) -> Tensor:
        return _Sum.apply(values, dim, self.share, self.generator)

    def repeat(self, values: Tensor, dim: int, size: int) -> Tensor:
        return _Repeat.apply(values, dim, size, self.share, self.generator)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[draw, B, K], [draw, C, K], [draw, C] to [draw, B, C]"""
        terms = self.wobble(self.repeat(x, 2, weight.shape[1]) * self.repeat(weight, 1, x.shape[1]))
        return self.wobble(self.sum(terms, 3) + self.repeat(bias, 1, x.shape[1]))

    def _saturating(self, values: Tensor, name: str) -> Tensor:
        return _Saturating.apply(self._argument(values), name, self.share_of_functions, self.generator)

    def _exp(self, values: Tensor) -> Tensor:
        return _Wobble.apply(self._argument(values).exp(), self.share_of_functions, self.generator)

    def _argument(self, values: Tensor) -> Tensor:
        return self.wobble(values) if self.share_of_functions > self.share else values

    def __call__(self) -> Tensor:
        """o [1 + draws, B, D] or v [1 + draws, B, L, D]"""
        case, real, wobble = self.case, self.inputs.real, self.wobble
        w = {name: wobble(leaf) for name, leaf in self.leaves.items()}
        u = w["hidden states"]  # [draw, N, B, L, D]
        g = self._gate(wobble(self._squeeze(u)), w)  # [draw, N, B, D]
        u = torch.where(real[..., None], u, 0)
        if case.pooling is None:
            return self.sum(wobble(self.repeat(g, 3, case.L) * u), 1)
        return self.sum(wobble(g * self.sum(wobble(u * self._pooling_weights()[..., None]), 3)), 1)

    def _squeeze(self, u: Tensor) -> Tensor:
        case, real = self.case, self.inputs.real
        if case.profile == "official":
            beta = dct.grid_token_basis(case.L, case.M).T.expand(case.B, case.L, case.M)
        else:
            rank, length = real.cumsum(1) - 1, real.sum(1, keepdim=True).expand(real.shape)
            beta = dct.token_basis(rank, length, case.N, case.M) * real[..., None]
        alpha = dct.block_basis(case.N, case.M, case.profile)  # [M, N]
        parts = case.D // case.M
        beta, alpha = beta.repeat_interleave(parts, -1), alpha.T.repeat_interleave(parts, -1)
        shares = self.sum(self.wobble(u * beta), 3)  # [draw, N, B, D]
        return self.sum(self.wobble(shares * alpha[:, None]), 1)

    def _pooling_weights(self) -> Tensor:
        real, rank = self.inputs.real, self.inputs.real.cumsum(1) - 1
        length = real.sum(1, keepdim=True)
        if self.case.pooling == "mean":
            return real / length.clamp(min=1).double()
        return (real & (rank == (0 if self.case.pooling == "cls" else length - 1))).double()

    def _gate(self, f: Tensor, w: dict[str, Tensor]) -> Tensor:
        case, wobble = self.case, self.wobble
        down = self.linear(f, w["down_weight"], w["down_bias"])
        if case.activation == "relu":
            self.before_relu = down.detach()
            s = torch.relu(down)
        else:
            s = self._saturating(down, "tanh")
        z = self.linear(s, w["up_weight"], w["up_bias"])  # [draw, B, N * D]
        if case.norm:
            z = self._norm(z, w)
        e = self._saturating(z, "sigmoid").unflatten(2, (case.N, case.D)).transpose(1, 2)  # [draw, N, B, D]
        logits = e
        if case.scale is not None:
            scale = self.repeat(w["gate_scale"], 1, e[0].numel())
            logits = wobble(e * scale.view_as(e))
        if case.prior is not None:
            prior = self.repeat(w["block_prior"], 2, e[0, 0].numel())
            logits = wobble(logits + prior.view_as(e))
        if case.profile == "paper" and logits.numel():
            logits = logits - logits.detach().amax(1, keepdim=True)
        powers = self._exp(logits)
        if case.profile == "official":
            total = self.repeat(self.sum(powers.flatten(1), 1), 1, powers[0].numel()).view_as(powers)
        else:
            total = self.repeat(self.sum(powers, 1), 1, case.N)
        return wobble(powers / wobble(total))  # the two terms of its gradient cancel where one block has all of the sum

    def _norm(self, z: Tensor, w: dict[str, Tensor]) -> Tensor:
        case, wobble = self.case, self.wobble
        mean, var = w["running_mean"], w["running_var"]
        if case.training and case.B:
            values = z.detach()
            batch_mean = self.sum(values, 1) / case.B
            batch_var = self.sum(wobble(wobble(values - batch_mean[:, None]).square()), 1) / case.B
            for name, kept, new in (
                ("running_mean", mean, batch_mean),
                ("running_var", var, batch_var * (case.B / (case.B - 1))),
            ):
                self.statistics[name] = (wobble(kept * (1 - case.momentum)) + wobble(new * case.momentum)).detach()
            rstd = wobble((batch_var + case.eps).rsqrt())[:, None]
            normed = _BatchNorm.apply(z, batch_mean[:, None], rstd, self.share, self.generator)
        else:
            normed = wobble(wobble(z - mean[:, None]) * wobble((var + case.eps).rsqrt())[:, None])
        weight, bias = (self.repeat(w[name], 1, case.B) for name in ("norm_weight", "norm_bias"))
        return wobble(wobble(normed * weight) + bias)

    def results(self, grad: Tensor | None) -> dict[str, Tensor]:
        """Every result by its name, [1 + draws, ...]; hidden states' gradients one by one."""
        out = self()
        found = {"output": out.detach(), **self.statistics}
        if grad is not None:
            wanted = {name: leaf for name, leaf in self.leaves.items() if not name.startswith("running")}
            moved = _moved(grad.double().cpu().expand(self.draws + 1, *grad.shape), self.share, self.generator)
            grads = torch.autograd.grad(out, list(wanted.values()), moved, allow_unused=True)
            for (name, leaf), got in zip(wanted.items(), grads, strict=True):
                found[f"gradient of {name}"] = torch.zeros_like(leaf) if got is None else got
            hidden = found.pop("gradient of hidden states")
            found |= {f"gradient of hidden state {n}": hidden[:, n] for n in range(self.case.N)}
        return found

    @property
    def unsettled(self) -> bool:
        """Whether a relu's argument is zero as far as its roundings tell."""
        if not self.before_relu.numel():
            return False
        first = self.before_relu[0].abs()
        return bool((first <= allowance(self.case, self.before_relu)).any())


def spread(draws: Tensor) -> float:
    return (draws[1:] - draws[:1]).abs().max().item() if draws.numel() else 0.0


def allowance(case: Case, draws: Tensor) -> float:
    """What roundings on the way to a result may do to it."""
    few = math.sqrt(1 + 4 / max(1, min(draws[0].numel(), case.N * case.B * case.D)))
    return 3 * few * spread(draws)


class Bound(NamedTuple):
    ratio: float  # the largest error in units of its bound
    error: float
    allowed: float


def judge(case: Case, actual: Tensor, truth: Tensor, draws: Tensor) -> Bound:
    """How far ``actual`` is from the truth. NaN counts as infinitely far."""
    if not actual.numel():
        return Bound(0.0, 0.0, 0.0)
    finfo = torch.finfo(actual.dtype)
    computed = 2.0**-1000 if case.double else UNDERFLOW
    smallest = max(computed, finfo.smallest_normal * finfo.eps / 2)
    bound = allowance(case, draws) + truth.abs() * (finfo.eps / 2 + unit(case)) + smallest
    error = (actual.detach().double().cpu() - truth).abs()
    # Beyond the output's range the right result is infinity, or its largest number where the bound reaches down to that.
    beyond = (truth.abs() + bound > finfo.max) & (
        (actual.cpu().abs() >= finfo.max / 2) & (actual.cpu().sign() == truth.sign())
    )
    ratio = torch.where(beyond, 0.0, (error / bound).nan_to_num(math.inf, math.inf))
    worst = int(ratio.flatten().argmax())
    return Bound(ratio.max().item(), error.flatten()[worst].item(), bound.flatten()[worst].item())
