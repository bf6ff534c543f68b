"""One drawn call: an engine's results, the reference's in float64, and what the error model allows between them."""

from __future__ import annotations

import builders
import fuzz_errors
import torch
from fuzz_cases import Case, Inputs, build
from torch import Tensor

import s2sent_kernels as s2
from s2sent_kernels import GateParameters


class Wrong(AssertionError):
    """A result that no rounding explains."""


def check(case: Case, backend: str, device: torch.device | str = "cpu") -> dict[str, float]:
    """Raises Wrong where ``backend`` is. Returns every result's error in units of its bound, by name."""
    inputs = build(case, device)
    given = [t.clone() for t in (*inputs.hidden_states, *inputs.where.values())]
    actual, grad = run(case, inputs, backend, None)
    unchanged = zip(given, (*inputs.hidden_states, *inputs.where.values()), strict=True)
    if not all(torch.equal(before, after) for before, after in unchanged):
        raise Wrong(f"an input was written to: {case.as_json()}")
    double = inputs._replace(
        hidden_states=[u.double() for u in inputs.hidden_states], parameters=inputs.parameters.each(torch.Tensor.double)
    )
    truth, _ = run(case._replace(module=False, frozen="nothing"), double, "reference", grad)
    wobbled = fuzz_errors.Wobbled(case, inputs, fuzz_errors.unit(case))
    padded_grad = None if grad is None else grad.cpu() if case.pooling is not None else inputs.padded(grad)
    draws = wobbled.results(padded_grad)
    if grad is not None and wobbled.unsettled:
        actual = {name: t for name, t in actual.items() if not name.startswith("gradient")}
    many: dict[str, Tensor] = {}
    found = {}
    for name, tensor in actual.items():
        shape, expected, wanted = tensor.shape, truth[name].cpu(), _dtype(case, inputs, name)
        if shape != expected.shape or tensor.dtype != wanted:
            raise Wrong(f"{name}: {list(shape)} {tensor.dtype}, not {list(expected.shape)} {wanted}: {case.as_json()}")
        of_tokens = name.startswith("gradient of hidden") or (name == "output" and case.pooling is None)
        if of_tokens:  # the model's are padded
            tensor, expected = inputs.padded(tensor), inputs.padded(expected)
        _same_formula(case, name, expected, draws[name])
        bound = fuzz_errors.judge(case, tensor, expected, draws[name])
        if not bound.ratio <= 1:
            if not many:
                unit = fuzz_errors.unit(case)
                many = fuzz_errors.Wobbled(case, inputs, unit, fuzz_errors.MANY).results(padded_grad)
            bound = fuzz_errors.judge(case, tensor, expected, many[name])
        if not bound.ratio <= 1:
            raise Wrong(f"{name}: error {bound.error:.3g} > {bound.allowed:.3g}: {case.as_json()}")
        found[name] = bound.ratio
    return found


def _same_formula(case: Case, name: str, truth: Tensor, draws: Tensor) -> None:
    """The reference and the error model's own formula agree as two computations in float64 do: a spread shrinks with u."""
    shrunk = fuzz_errors.allowance(case, draws) * (2.0**-53 / fuzz_errors.unit(case))
    allowed = 16 * shrunk + 1e-13 * truth.abs() + 1e-200
    if not ((draws[0] - truth).abs() <= allowed).all():
        worst = (draws[0] - truth).abs().max().item()
        raise Wrong(f"{name}: the reference and the error model differ by {worst:.3g}: {case.as_json()}")


def _dtype(case: Case, inputs: Inputs, name: str) -> torch.dtype:
    if name == "output" or name.startswith("gradient of hidden"):
        return inputs.hidden_states[0].dtype
    return inputs.parameters.down_weight.dtype


def run(case: Case, inputs: Inputs, backend: str, grad: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
    """Output, running statistics after training, and gradients, by name; and the incoming gradient, drawn where none is given."""
    some = {"some hidden states": [n % 2 == 0 for n in range(case.N)], "hidden states": [False] * case.N}
    wanted = some.get(case.frozen, [True] * case.N)
    records = case.gradient is not None
    hidden_states = [
        u.detach().requires_grad_(w and records) for u, w in zip(inputs.hidden_states, wanted, strict=True)
    ]
    trained = records and case.frozen != "parameters"
    parameters = GateParameters(
        *(
            None if t is None else t.detach().clone().requires_grad_(trained and not name.startswith("running"))
            for name, t in inputs.parameters._asdict().items()
        )
    )
    if case.module:
        out, parameters = _call_module(case, hidden_states, inputs.where, parameters, backend)
    else:
        out = _call_function(case, hidden_states, inputs.where, parameters, backend)
    found = {"output": out.detach()}
    if case.training and case.norm and case.B:
        found |= {name: getattr(parameters, name).clone() for name in ("running_mean", "running_var")}
    if not records:
        return found, None
    leaves = {f"gradient of hidden state {n}": u for n, u in enumerate(hidden_states) if u.requires_grad}
    leaves |= {
        f"gradient of {name}": t for name, t in parameters._asdict().items() if t is not None and t.requires_grad
    }
    grad = builders.make_gradient(out, case.gradient, case.seed % 1000) if grad is None else grad
    given = grad.clone()
    if leaves:
        grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        found |= zip(leaves, grads, strict=True)
    if not torch.equal(given, grad):
        raise Wrong(f"an incoming gradient was written to: {case.as_json()}")
    return found, grad


def _call_function(
    case: Case, hidden_states: list[Tensor], where: dict[str, Tensor], parameters: GateParameters, backend: str
) -> Tensor:
    options = {"frequencies": case.M, "profile": case.profile, "activation": case.activation, "backend": backend}
    options |= {"eps": case.eps, "training": case.training, "momentum": case.momentum}
    if case.pooling is None:
        return s2.select(hidden_states, parameters, **where, **options)
    return s2.select_pool(hidden_states, parameters, pooling=case.pooling, **where, **options)


def _call_module(
    case: Case, hidden_states: list[Tensor], where: dict[str, Tensor], parameters: GateParameters, backend: str
) -> tuple[Tensor, GateParameters]:
    selector = s2.S2SentSelector(
        case.D,
        case.N,
        case.H,
        case.M,
        profile=case.profile,
        gate_norm="batch" if case.norm else None,
        block_prior=case.prior is not None,
        gate_scale=case.scale,
        activation=case.activation,
        backend=backend,
        device=parameters.down_weight.device,
        dtype=parameters.down_weight.dtype,
    ).train(case.training)
    if selector.norm is not None:
        selector.norm.eps, selector.norm.momentum = case.eps, case.momentum
    own = {name.replace(".", "_"): tensor for name, tensor in (*selector.named_parameters(), *selector.named_buffers())}
    own = {name.removeprefix("norm_") if "running" in name else name: tensor for name, tensor in own.items()}
    with torch.no_grad():
        for name, tensor in parameters._asdict().items():
            if tensor is not None:
                own[name].copy_(tensor)
                own[name].requires_grad_(tensor.requires_grad)
    if case.pooling is None:
        out = selector(hidden_states, **where)
    else:
        out = selector.pool(hidden_states, pooling=case.pooling, **where)
    return out, GateParameters(**{name: own.get(name) for name in GateParameters._fields})
