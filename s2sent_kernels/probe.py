"""Which blocks and which final norm an encoder has, found by running it on a few tokens and comparing what it returns.

What an encoder returns is its last block's hidden state, or a norm of it. Which module is that norm, no name tells for every
family. So a twin of the encoder runs once on its loaded weights: a tree of the same modules that shares the parameters and has
buffers, flags and hooks of its own. Nothing of the encoder is changed, and its own hooks do not run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import families
from .files import first_line

# Two sentences of so many tokens. A few suffice; an encoder that fails on them gets more.
LENGTHS = (5, 64)
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Found(NamedTuple):
    """The module that runs as block i, for every i; the norm behind the last one, None where there is none; and, of an encoder
    that adds tokens of its own to the probe's, how many it puts in front."""

    blocks: list[nn.Module]
    norm: nn.Module | None
    front: int | None = None


class Unproven(Exception):
    """The encoder ran, and what it returns is no norm of its last block's hidden state. Says what it is."""


class CannotRun(Exception):
    """The encoder does not run on token ids alone, or returns nothing to compare. Says why."""


class UnknownNorm(ValueError):
    """What BlockCapture raises where it needs the final norm of an encoder that is ``Unproven``."""


class _Call(NamedTuple):
    """Of a module outside of the blocks: its first argument and its output, copied."""

    module: nn.Module
    given: Tensor
    output: Tensor


class _Run(NamedTuple):
    """One run of the twins, which are known by the ids of the encoder's modules."""

    twins: dict[int, nn.Module]
    length: int  # L, of the token ids
    entering: dict[int, Tensor]  # what the first block of each list is given
    states: dict[int, list[Tensor | None]]  # of each run of each block
    calls: list[_Call]
    targets: list[Tensor]  # what the encoder returns: [B, L, D], or longer

    def state(self, block: nn.Module, blocks: list[nn.Module]) -> Tensor | None:
        """A block's hidden state: of the last run that BlockCapture keeps, which is one for each time that it is listed."""
        runs, listed = self.states.get(id(block), []), sum(each is block for each in blocks)
        return runs[listed - 1] if len(runs) >= listed else None

    def front(self, blocks: list[nn.Module]) -> int | None:
        """How many tokens the encoder puts in front of the given ones; None where it adds none, there or at the end. Two
        sentences that differ at every token enter the first block: what the encoder has added is the same in both."""
        state, entering = self.state(blocks[-1], blocks), self.entering.get(id(blocks[0]))
        if state is None or state.dim() != 3 or state.shape[1] <= self.length or entering is None:
            return None
        places = (entering[0] != entering[1]).any(dim=-1).nonzero().flatten().tolist()
        first = places[0] if places else 0
        return first if places == list(range(first, first + self.length)) else None


def ready(encoder: nn.Module) -> bool:
    """Whether the encoder has weights, and nothing traces what it does."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and not any(each.is_meta for each in (*encoder.parameters(), *encoder.buffers()))


def find(encoder: nn.Module) -> Found:
    """Blocks and final norm, proven: the last hidden state, normed, has the bits that the encoder returns.

    Raises:
        Unproven, CannotRun: as they say. torch.OutOfMemoryError: there was no memory to run it.
    """
    encoder = getattr(encoder, "_orig_mod", encoder)  # of torch.compile
    lists = families.block_lists(encoder)
    try:
        found = _compare(encoder, lists, _run(encoder, lists))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an encoder of remote code raises what it likes
        reason = str(error) if isinstance(error, CannotRun) else f"{type(error).__name__}: {first_line(error)}"
        raise CannotRun(reason) from error
    if isinstance(found, str):
        raise Unproven(found)
    return found


def front(encoder: nn.Module, length: int, total: int) -> int | None:
    """How many tokens the encoder puts in front of ``length`` token ids where its hidden states have ``total`` tokens. None where
    it makes no such states of token ids alone.

    Raises:
        torch.OutOfMemoryError: there was no memory to run it.
    """
    encoder = getattr(encoder, "_orig_mod", encoder)
    lists = families.block_lists(encoder)
    try:
        run = _run(encoder, lists, (length,))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # as in ``find``
        return None
    state = run.state(lists[0][-1], lists[0])
    return run.front(lists[0]) if state is not None and run.length == length and state.shape[1] == total else None


def of_input(state: Tensor, front: int | None, length: int) -> Tensor:
    """A hidden state without the tokens that the encoder has added, ``front`` of them before the input's."""
    if front is None or state.dim() != 3 or state.shape[1] <= length:
        return state
    return state[:, front : front + length]


# ---------------------------------------------------------------- running


def _twins(encoder: nn.Module) -> dict[int, nn.Module]:
    """A twin of each module by the module's id, in eval mode and uncompiled. It shares nothing that a call writes to."""
    twins: dict[int, nn.Module] = {}
    for module in encoder.modules():
        twin = twins[id(module)] = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin.__dict__.update({name: type(module.__dict__[name])() for name in _HOOKS if name in module.__dict__})
        buffers = {name: None if each is None else each.clone() for name, each in module._buffers.items()}
        twin.__dict__.update(_parameters=dict(module._parameters), _buffers=buffers, training=False)
        twin.__dict__["_compiled_call_impl"] = None
    for module in encoder.modules():
        twin = twins[id(module)]
        children = {name: None if each is None else twins[id(each)] for name, each in module._modules.items()}
        twin.__dict__["_modules"] = children
        for name, value in module.__dict__.items():
            bound = _bound_to(twins, value)
            if bound is None and name == "forward":
                raise CannotRun(f"the forward of its {type(module).__name__} was replaced")
            twin.__dict__[name] = twin.__dict__[name] if bound is None else bound
    return twins


def _bound_to(twins: dict[int, nn.Module], value: Any) -> Any:
    """A method or a partial function of modules as one of their twins, or None for anything else. Libraries that place modules on
    devices put such a function in a forward's place."""
    if isinstance(value, MethodType) and id(value.__self__) in twins:
        return MethodType(value.__func__, twins[id(value.__self__)])
    if isinstance(value, functools.partial) and any(id(each) in twins for each in value.args):
        return functools.partial(value.func, *(twins.get(id(each), each) for each in value.args), **value.keywords)
    return None


def _listen(run: _Run, lists: list[list[nn.Module]]) -> None:
    """Keep the hidden state of each block, what the first ones are given, and the calls of the modules outside of them."""
    blocks = {id(block) for each in lists for block in each}

    def keep_entering(block: int, args: Any, kwargs: Any) -> None:
        given = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.is_floating_point())
        state = next((each for each in given if each.dim() == 3 and len(each) == 2), None)
        if state is not None:
            run.entering.setdefault(block, state.clone())

    def keep_state(block: int, output: Any) -> None:
        state = families.hidden_state(output)
        run.states.setdefault(block, []).append(None if state is None else state.clone())

    def keep_call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if given is not None and isinstance(output, Tensor) and given.shape == output.shape:
            run.calls.append(_Call(module, given.clone(), output.clone()))

    for first in {id(each[0]) for each in lists}:
        run.twins[first].register_forward_pre_hook(
            lambda module, args, kwargs, block=first: keep_entering(block, args, kwargs), with_kwargs=True
        )
    for each, twin in run.twins.items():
        if each in blocks:
            twin.register_forward_hook(lambda module, args, output, block=each: keep_state(block, output))
        if not any(parameter.dim() > 1 for parameter in twin.parameters()):
            twin.register_forward_hook(keep_call, with_kwargs=True)


def _run(encoder: nn.Module, lists: list[list[nn.Module]], lengths: Sequence[int] = LENGTHS) -> _Run:
    """A run of the first length that the encoder takes. Raises what it raises at the last one."""
    for length in lengths:
        inputs = _inputs(encoder, length)
        run = _Run(_twins(encoder), inputs["input_ids"].shape[1], {}, {}, [], [])
        _listen(run, lists)
        try:
            with torch.no_grad(), _random_state_kept(encoder):
                output = run.twins[id(encoder)](**inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if length == lengths[-1]:
                raise
            continue
        run.targets.extend(_targets(output))
        return run
    raise AssertionError("lengths is empty")


def _inputs(encoder: nn.Module, length: int) -> dict[str, Any]:
    taken = inspect.signature(type(encoder).forward).parameters
    config: Any = encoder.config
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    passes_on = takes_all and "input_ids" not in taken  # as wrappers of an encoder do, that name no input
    if "input_ids" not in taken and not passes_on:
        raise CannotRun("it takes no token ids")
    vocabulary = getattr(config, "vocab_size", 100)
    special = {getattr(config, name, None) for name in SPECIAL}
    usual = [token for token in range(min(vocabulary, 1000)) if token not in special]
    length = min(length, families.positions(encoder) or length)
    # The two sentences differ at every place, by which ``_Run.front`` knows the encoder's own tokens.
    ids = torch.tensor([[usual[(7 * place + row) % len(usual)] for place in range(length)] for row in (1, 2)])
    ids = ids.to(families.float_parameter(encoder).device)
    inputs: dict[str, Any] = {"input_ids": ids, **families.without_cache(encoder)}
    if "attention_mask" in taken or passes_on:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = ids
    return inputs


@contextlib.contextmanager
def _random_state_kept(encoder: nn.Module) -> Iterator[None]:
    """Some encoders draw numbers in eval mode, too."""
    ours = random.getstate()
    numpy = sys.modules.get("numpy")
    theirs = None if numpy is None else numpy.random.get_state()
    devices = {each.device for each in encoder.parameters() if each.device.type == "cuda"}
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        random.setstate(ours)
        if numpy is not None:
            numpy.random.set_state(theirs)


# ---------------------------------------------------------------- comparing


def _targets(output: Any) -> list[Tensor]:
    """What the encoder returns, and where a decoder follows also what went into that."""
    names = ("last_hidden_state", "encoder_last_hidden_state")
    found = [getattr(output, name, None) for name in names] if hasattr(output, names[0]) else [output]
    if isinstance(output, (tuple, list)) and not hasattr(output, names[0]):
        found = list(output[:1])
    targets = [each for each in found if isinstance(each, Tensor) and each.dim() == 3]
    if not targets:
        raise CannotRun("it returns no last hidden state")
    for target in targets:
        if not torch.isfinite(target).all() or target.std() == 0:
            raise CannotRun("its last hidden state tells nothing: its numbers are equal or not finite")
    return targets


def _compare(encoder: nn.Module, lists: list[list[nn.Module]], run: _Run) -> Found | str:
    """The blocks and the norm that make what the encoder returns, or why there are none."""
    named = families.find_final_norm(encoder)
    likely = None if named is None else run.twins[id(named)]  # where several norms compute the same
    for blocks in lists:
        front = run.front(blocks)
        found = (run.state(block, blocks) for block in blocks)
        states = [None if state is None else of_input(state, front, run.length) for state in found]
        last = states[-1]
        targets = [of_input(target, front, run.length) for target in run.targets]
        for target in targets:
            # Of a list beside the first one, as of attentions and norms, all members must look like blocks.
            if last is None or (
                blocks is not lists[0] and any(each is None or each.shape != target.shape for each in states)
            ):
                continue
            if _same(last, target):
                return Found(blocks, None, front)
            norms = _norms_between(run, front, last, target)
            if norms:
                norm = likely if likely in norms else norms[-1]
                return Found(blocks, next(each for each in encoder.modules() if run.twins[id(each)] is norm), front)
    return _reason(run.state(lists[0][-1], lists[0]), run.targets[0])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def _norms_between(run: _Run, front: int | None, last: Tensor, target: Tensor) -> list[nn.Module]:
    """The modules that were given ``last`` and made ``target`` of it, each token for itself."""
    norms = []
    for module, *tensors in tuple(run.calls):
        given, output = (of_input(tensor, front, run.length) for tensor in tensors)
        if _same(given, last) and _same(output, target) and not _same(given, output):
            with torch.no_grad():
                alone = module(given[:, :1])
            if torch.allclose(alone.float(), output[:, :1].float(), rtol=1e-2, atol=1e-3):
                norms.append(module)
    return norms


def _reason(last: Tensor | None, target: Tensor) -> str:
    if last is None:
        return "its last block returns no tensor, or does not run"
    if last.shape == target.shape:
        return "what it returns is neither its last block's hidden state nor a norm of it"
    batch, length, *_ = target.shape
    if last.shape[:2] == (length, batch):
        return "its blocks' hidden states are [L, B, D], the sequence first"
    return f"its last block's hidden state is {list(last.shape)}, and what it returns {list(target.shape)}"
