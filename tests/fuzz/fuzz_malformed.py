"""Calls of public functions, methods and ops with one or two arguments that are wrong. Run as a script: python
fuzz_malformed.py CALLS [SEED]; it prints every kind of finding once and exits with 1 where there is any.

A finding is an exception other than ValueError, TypeError and NotImplementedError, a wrong argument that is accepted, or an input
whose bits or version a refused call changed. Only values that are wrong whatever else is passed are drawn, so no call has to
succeed. A crash ends the process, and the number of the call is the last line printed.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # builders

import builders
import torch
from fuzz_wrong import N, wrong
from torch import Tensor, nn

import s2sent_kernels as s2
from s2sent_kernels.capture import BlockCapture

B, L, D, M, H = 4, 5, 12, 2, 5
ALLOWED = (ValueError, TypeError, NotImplementedError)
BACKENDS = ("auto", "reference", *(["native"] if s2.backends()["native"].usable else []))

# ---------------------------------------------------------------- right calls

Arguments = dict[str, tuple[str, Any]]  # name -> kind, right value; kind "" is never changed


class Target:
    """A function and its right arguments, each with the kind of what is wrong there."""

    def __init__(self, call: Callable[..., Any], arguments: Arguments) -> None:
        self.call, self.arguments = call, arguments


def batch(rng: random.Random, gradient: bool) -> tuple[list[Tensor], dict[str, tuple[str, Any]]]:
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    made = builders.make_batch(N, B, L, D, dtype, rng.choice(["none", "right", "packed"]), requires_grad=gradient)
    where: Arguments = {}
    if isinstance(made, builders.Packed):
        where["cu_seqlens"] = ("cu_seqlens", made.cu_seqlens)
    else:
        mask = made.real
        where["attention_mask"] = ("mask", mask)
    return made.hidden_states, where


def gate_tensors(gradient: bool) -> s2.GateParameters:
    return builders.make_parameters(N, D, H, torch.float32, prior=True, scale=4.0, requires_grad=gradient)


def functions(rng: random.Random) -> dict[str, Target]:
    gradient = rng.random() < 0.5
    hidden_states, where = batch(rng, gradient)
    parameters = gate_tensors(gradient)
    fields: Arguments = {
        f"parameters.{name}": ("tensor" if name in s2.GateParameters.required() else "optional", tensor)
        for name, tensor in parameters._asdict().items()
    }
    backend = {"backend": ("word", rng.choice(BACKENDS))}
    reading = {"frequencies": ("frequencies", M), "profile": ("word", "paper"), **backend}
    gating = {"activation": ("word", "tanh"), "eps": ("positive", 1e-6), "training": ("flag", rng.random() < 0.5)}
    gating |= {"momentum": ("share", 0.1)}
    states = {"hidden_states": ("states", hidden_states), **where}
    pooling = {"pooling": ("word", "mean")}
    f, g = torch.randn(B, D), torch.rand(B, N, D)
    whole = {**states, **fields, **reading, **gating}
    return {
        "squeeze": Target(s2.squeeze, {**states, **reading, **pooling}),
        "fuse": Target(s2.fuse, {**states, "gates": ("tensor", g), **backend}),
        "gate": Target(
            with_parameters(s2.gate),
            {"squeezed": ("tensor", f), **fields, "num_blocks": ("count", N), **gating, **backend},
        ),
        "select": Target(with_parameters(s2.select), whole),
        "select_pool": Target(with_parameters(s2.select_pool), {**whole, **pooling}),
    }


def with_parameters(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        fields = {name: arguments.pop(f"parameters.{name}") for name in s2.GateParameters._fields}
        return function(parameters=s2.GateParameters(**fields), **arguments)

    return call


def methods(rng: random.Random) -> dict[str, Target]:
    gradient = rng.random() < 0.5
    hidden_states, where = batch(rng, gradient)
    backend = rng.choice(BACKENDS)
    selector = s2.S2SentSelector(D, N, H, M, block_prior=True, gate_scale=4.0, backend=backend).train(
        rng.random() < 0.5
    )
    states: Arguments = {"hidden_states": ("states", hidden_states), **where}
    pooling: Arguments = {"pooling": ("word", "mean")}

    def blockwise(block: Any, hidden_state: Any, **options: Any) -> None:
        with torch.no_grad():
            stream = selector.eval().blockwise(**options)
            stream.add(block, hidden_state)

    constructor: Arguments = {
        "hidden_size": ("count", D),
        "num_blocks": ("count", N),
        "bottleneck": ("count", H),
        "frequencies": ("frequencies", M),
        "profile": ("word", "paper"),
        "gate_norm": ("word", "batch"),
        "block_prior": ("flag", rng.random() < 0.5),
        "gate_scale": ("finite", 4.0),
        "activation": ("word", "tanh"),
        "backend": ("word", backend),
        "device": ("device", "cpu"),
        "dtype": ("dtype", torch.float32),
    }

    def norm_options(eps: Any, momentum: Any) -> None:
        selector.norm.eps, selector.norm.momentum = eps, momentum
        selector.train().pool(hidden_states, **{name: value for name, (_, value) in where.items()})

    return {
        "S2SentSelector": Target(s2.S2SentSelector, constructor),
        "forward": Target(selector.forward, states),
        "pool": Target(selector.pool, {**states, **pooling}),
        "gates": Target(selector.gates, states),
        "gates_and_pooled": Target(selector.gates_and_pooled, {**states, **pooling}),
        "norm": Target(norm_options, {"eps": ("positive", 1e-6), "momentum": ("share", 0.1)}),
        "blockwise": Target(
            blockwise,
            {"block": ("index", 0), "hidden_state": ("tensor", hidden_states[0].detach()), **where, **pooling},
        ),
        "published_blocks": Target(
            s2.S2SentSelector.published_blocks, {"num_hidden_states": ("count", 13), "num_blocks": ("count", N)}
        ),
    }


def encoders(encoder: nn.Module) -> dict[str, Target]:
    def capture(encoder: Any, blocks: Any, block_norm: Any) -> None:
        BlockCapture(encoder, blocks, block_norm=block_norm).remove()

    return {
        "BlockCapture": Target(
            capture,
            {"encoder": ("encoder", encoder), "blocks": ("blocks", (-2, -1)), "block_norm": ("block_norm", "final")},
        )
    }


def ops(rng: random.Random) -> dict[str, Target]:
    """torch judges the Python types of an op's arguments by its schema, so tensors, words and numbers alone are changed, to
    others of these types."""
    hidden_states, where = batch(rng, False)
    layout: Arguments = {"attention_mask": ("", None), "cu_seqlens": ("", None), **where}
    fields: Arguments = {
        name: ("tensor" if name in s2.GateParameters.required() else "optional", tensor)
        for name, tensor in gate_tensors(False)._asdict().items()
    }
    backend: Arguments = {"backend": ("word", rng.choice(BACKENDS))}
    states: Arguments = {"hidden_states": ("states", hidden_states), **layout}
    reading: Arguments = {"frequencies": ("frequencies", M), "profile": ("word", "paper"), "pooling": ("word", "mean")}
    gating: Arguments = {"activation": ("word", "tanh"), "eps": ("positive", 1e-6)}
    f, g = ("tensor", torch.randn(B, D)), ("tensor", torch.rand(B, N, D))
    like = ("tensor", torch.randn(hidden_states[0].shape).to(hidden_states[0].dtype))
    sizes: Arguments = {
        "shape": ("", list(hidden_states[0].shape)),
        "dtype": ("", hidden_states[0].dtype),
        "device": ("", hidden_states[0].device),
        "needed": ("", [True] * N),
    }
    found: dict[str, Arguments] = {
        "squeeze": {**states, **reading, **backend},
        "squeeze_backward": {
            "grad_squeezed": f,
            "grad_pooled": g,
            "grad_fused": like,
            "gates": g,
            **sizes,
            **layout,
            **reading,
            **backend,
        },
        "fuse": {**states, "gates": g, **backend},
        "fuse_backward": {"grad_fused": like, **states, **backend},
        "gate": {"squeezed": f, **fields, "num_blocks": ("count", N), **gating, **backend},
        "gate_backward": {"grad_gates": g, "squeezed": f, **fields, **gating, **backend},
        "gate_pool_backward": {"grad_output": f, "squeezed": f, "pooled": g, **fields, **gating, **backend},
        "select": {**states, **fields, "frequencies": reading["frequencies"], **gating, **backend},
        "select_pool": {
            **states,
            **fields,
            "frequencies": reading["frequencies"],
            "pooling": ("word", "mean"),
            **gating,
            **backend,
        },
    }
    space = torch.ops.s2sent
    return {
        f"op {name}": Target(getattr(getattr(space, name), "scaled" if "gate_scale" in a else "default"), a)
        for name, a in found.items()
    }


def fits_schema(name: str, value: Any, right: Any) -> bool:
    """Whether an op's schema lets ``value`` pass where ``right`` belongs."""
    if isinstance(right, list):
        return type(value) is list and len(value) > 0 and all(isinstance(v, Tensor) for v in value)
    if isinstance(right, Tensor):
        return isinstance(value, Tensor)
    if isinstance(right, int | float) and type(value) in (int, float):
        return type(value) is type(right) and (type(value) is float or -(2**63) <= value < 2**63)
    return type(value) is type(right)


# ---------------------------------------------------------------- one call


def tensors_in(values: Any) -> list[Tensor]:
    """Those whose bits can be compared."""
    if isinstance(values, Tensor):
        ordinary = values.layout == torch.strided and values.device.type == "cpu" and not values.is_quantized
        return [values] if ordinary and not values.is_nested else []
    if isinstance(values, dict):
        values = list(values.values())
    return [t for value in values for t in tensors_in(value)] if isinstance(values, list | tuple) else []


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().flatten().view(torch.uint8)


def attempt(rng: random.Random, encoder: nn.Module) -> str | None:
    """One call; the finding in words, or None."""
    targets = {}
    for family, weight in ((functions, 3), (methods, 3), (ops, 3), (None, 1)):
        targets[family] = weight
    family = rng.choices(list(targets), list(targets.values()))[0]
    made = encoders(encoder) if family is None else family(rng)
    name = rng.choice(list(made))
    target = made[name]
    arguments = {key: value for key, (_, value) in target.arguments.items()}
    changed = []
    candidates = [key for key, (kind, _) in target.arguments.items() if kind]
    for key in rng.sample(candidates, rng.choice([1, 1, 1, 2]) if len(candidates) > 1 else 1):
        kind, right = target.arguments[key]
        value = wrong(kind, right, rng)
        if name.startswith("op ") and not fits_schema(key, value, right):
            continue
        arguments[key] = value
        changed.append(key)
    if not changed:
        return None
    before = [(t, t._version, bits(t)) for t in tensors_in(arguments)]
    what = f"{name}({', '.join(f'{key}={show(arguments[key])}' for key in changed)}"
    if "backend" in arguments and "backend" not in changed:
        what += f", backend={arguments['backend']!r}"
    what += ")"
    try:
        if name.startswith("op "):
            target.call(*arguments.values())
        else:
            target.call(**arguments)
    except ALLOWED as error:
        # The caller has to read which argument it was.
        named = any(key.rpartition(".")[2] in str(error) for key in (*arguments, "backend", "hidden size"))
        dispatched = name.startswith("op ") and isinstance(
            error, NotImplementedError
        )  # by torch, before any code of ours
        if not named and not dispatched:
            return f"{what}: {type(error).__name__} names no argument: {str(error)[:150]}"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {str(error)[:150]}"
    else:
        return f"{what}: accepted"
    for tensor, version, old in before:
        if tensor._version != version or not torch.equal(bits(tensor), old):
            return f"{what}: refused, and an input was written to"
    return None


def show(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "nested " if value.is_nested else ""
        shape = "" if value.is_nested else list(value.shape)
        return f"<{kind}{value.layout} {value.dtype} {shape} {value.device}>".replace("torch.", "")
    if isinstance(value, list) and value and any(isinstance(v, Tensor) for v in value):
        return "[" + ", ".join(map(show, value)) + "]"
    return repr(value)[:60]


def main(calls: int, seed: int) -> int:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    encoder, _ = builders.make_encoder_and_tokenizer()
    findings: Counter[str] = Counter()
    for number in range(calls):
        print(number, end="\r", flush=True)
        found = attempt(random.Random(seed * 1_000_003 + number), encoder)
        if found is not None:
            findings[found] += 1
    for found, count in sorted(findings.items()):
        print(f"{count:4} {found}")
    print(f"{calls} calls, {sum(findings.values())} findings")
    return int(bool(findings))


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
