"""What the eager calls of one selector have in common, found out once.

A call has to find the gate's tensors, judge its arguments, choose an engine and pass the dispatcher; on a small batch that costs
more than the kernels. A ``Plan`` keeps the answers that do not change from call to call. It copies no weight: its tensors are
the selector's own, so that an edit in place counts at once. ``plan_of`` compares what a plan was made from with what the
selector is now, by identity, and makes another where anything differs.

A plan never judges a call. Where one is not as expected (traced, transformed, of unusual tensors, or wrong) its methods return
None, and the caller goes through ``functional``, which serves everything, validates, and words the errors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import validate
from .engines.choice import BACKEND_VARIABLE, choose, engine_of
from .formula.call import (
    KERNEL_DTYPES,
    POOLINGS,
    Activation,
    Batch,
    Call,
    GateParameters,
    Gating,
    Profile,
    Reading,
)
from .ops.direct import How, Select, SelectPool, select_pool
from .ops.library import dispatcher_is_idle
from .recomputed import in_backward

_TENSORS = ({Tensor}, {Tensor, nn.Parameter}, {nn.Parameter})


class Planned(Protocol):
    """What a plan is made for: a selector."""

    num_blocks: int
    hidden_size: int
    frequencies: int
    profile: Profile
    activation: Activation
    backend: str
    _modules: dict[str, nn.Module | None]
    _parameters: dict[str, nn.Parameter | None]

    def reading(self, pooling: str | None) -> Reading: ...

    def gating(self) -> Gating: ...


class Plan:
    """The eager calls of a selector whose gate is ``parameters`` alone."""

    def __init__(self, selector: Planned, parameters: GateParameters, identity: tuple[Any, ...]) -> None:
        self.identity, self.parameters = identity, parameters
        self.num_blocks, self.hidden_size, self.backend = selector.num_blocks, selector.hidden_size, selector.backend
        norm = selector._modules.get("norm")
        self.norm = norm if isinstance(norm, nn.BatchNorm1d) and norm.training else None  # where batch statistics count
        self.gating = selector.gating()._replace(training=self.norm is not None)
        self._readings: dict[str | None, Reading] = {word: selector.reading(word) for word in (None, *POOLINGS)}
        self._present = [tensor for tensor in parameters if tensor is not None]
        self._memory = self._where()
        self._hows: dict[tuple[Any, ...], How | None] = {}

    def pool(
        self, hidden_states: Sequence[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, pooling: str
    ) -> Tensor | None:
        """o [B, D], or None."""
        if type(pooling) is not str or not self._are_plain(hidden_states, attention_mask, cu_seqlens):
            return None
        gradient = self._wants_gradient(hidden_states)
        how = self._how(hidden_states, pooling)
        if how is None:
            return None
        if not gradient and self.norm is None and how.prepared is not None:
            try:
                found = how.prepared.select_pool(hidden_states, attention_mask, cu_seqlens, how.reading.pooling)
            except NotImplementedError:  # the dispatcher's, of tensors without strides: asking each would take longer
                return None
            if found:
                return found[0]
        batch = self._batch(hidden_states, attention_mask, cu_seqlens)
        if batch is None:
            return None
        if self.norm is not None:
            if batch.num_sentences < 2:
                return None
            how = how._replace(gating=self.gating._replace(momentum=count_batch(self.norm)))
        if gradient:
            return SelectPool.apply(how, attention_mask, cu_seqlens, *self.parameters, *hidden_states)
        return select_pool(how, batch, self.parameters)[0]

    def fuse(
        self, hidden_states: Sequence[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor | None:
        """v like a hidden state, or None. With batch statistics the three stages are computed one by one."""
        if self.norm is not None or not self._are_plain(hidden_states, attention_mask, cu_seqlens):
            return None
        gradient = self._wants_gradient(hidden_states)
        how = self._how(hidden_states, None)
        if how is None:
            return None
        if not gradient and how.prepared is not None:
            try:
                found = how.prepared.select(hidden_states, attention_mask, cu_seqlens)
            except NotImplementedError:
                return None
            if found:
                return found[0]
        batch = self._batch(hidden_states, attention_mask, cu_seqlens)
        if batch is None:
            return None
        if gradient:
            return Select.apply(how, attention_mask, cu_seqlens, *self.parameters, *hidden_states)
        return how.engine.select(batch, how.reading, self.parameters, how.gating)[0]

    def _are_plain(
        self, hidden_states: Sequence[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> bool:
        """Whether a call's tensors are ordinary ones, N of them."""
        if type(hidden_states) not in (list, tuple) or len(hidden_states) != self.num_blocks:
            return False
        if attention_mask is not None and (type(attention_mask) is not Tensor or cu_seqlens is not None):
            return False
        if attention_mask is not None and attention_mask.is_floating_point():  # whose values are judged
            return False
        if cu_seqlens is not None and (type(cu_seqlens) is not Tensor or os.environ.get(validate.DEBUG_VARIABLE)):
            return False
        return set(map(type, hidden_states)) in _TENSORS

    def _where(self) -> list[Any]:
        """Memory and shapes of the gate's tensors: a parameter that stays the same can get another ``.data``."""
        return [t.data_ptr() for t in self._present] + [t.shape for t in self._present]

    def _wants_gradient(self, hidden_states: Sequence[Tensor]) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in (*self._present, *hidden_states))

    def _batch(
        self, hidden_states: Sequence[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Batch | None:
        """The call's batch, where it and the gate's tensors are right."""
        memory = self._where()
        if memory != self._memory:
            self._memory, self._hows = memory, {}
            return None
        first, strided = hidden_states[0], torch.strided
        try:
            shape, dtype, device = first.shape, first.dtype, first.device
            if len(shape) != (3 if cu_seqlens is None else 2) or shape[-1] != self.hidden_size:
                return None
            for u in hidden_states:
                if u.shape != shape or u.dtype is not dtype or u.device != device or u.layout is not strided:
                    return None
        except RuntimeError:  # a nested tensor has no shape; asking each whether it is one would take longer
            return None
        batch = Batch(hidden_states, attention_mask, cu_seqlens)
        try:
            validate.token_types(attention_mask, cu_seqlens)
            validate.tokens(batch)
            validate.token_values(batch)
        except (ValueError, TypeError):
            return None
        return batch

    def _how(self, hidden_states: Sequence[Tensor], pooling: str | None) -> How | None:
        """How such a call is computed; None where plain PyTorch computes it, or where it is wrong."""
        first = hidden_states[0]
        variable = os.environ.get(BACKEND_VARIABLE) if self.backend == "auto" else None
        key = (pooling, first.dtype, first.device, variable)
        if key not in self._hows:
            self._hows[key] = self._find_how(hidden_states, pooling)
        return self._hows[key]

    def _find_how(self, hidden_states: Sequence[Tensor], pooling: str | None) -> How | None:
        reading, first = self._readings.get(pooling), hidden_states[0]
        if (
            reading is None
            or first.is_nested
            or first.dtype not in KERNEL_DTYPES
            or first.shape[-1:] != (self.hidden_size,)
        ):
            return None
        batch = Batch(hidden_states)
        try:
            validate.words(reading)
            validate.components(self.num_blocks, self.hidden_size, reading.frequencies, reading.profile)
            validate.gate(self.parameters, self.gating, self.num_blocks, first)
            chosen = choose(self.backend, Call.of(batch))
        except (ValueError, TypeError):
            return None
        if chosen == "reference":
            return None
        engine = engine_of(chosen)
        prepared = engine.prepare(self.parameters, self.num_blocks, reading, self.gating)
        return How(reading, self.gating, chosen, engine, prepared)


# ---------------------------------------------------------------- the selector that a plan is for


_KINDS: tuple[tuple[str, type[nn.Module]], ...] = (("down", nn.Linear), ("up", nn.Linear), ("norm", nn.BatchNorm1d))
_NUM_IN_PARTS = (
    8  # of GateParameters: weight and bias of each part, running mean and variance. The rest the selector owns.
)
_OWN = GateParameters._fields[_NUM_IN_PARTS:]


def plain_tensors(selector: Planned) -> GateParameters | None:
    """The gate's tensors, or None where its parts are not those that S2SentSelector makes (replaced, hooked, parametrised,
    wrapped) or hold tensors that only their own operators understand (quantised, sharded)."""
    modules = selector._modules
    is_ordinary = _is_ordinary_while_traced if torch.compiler.is_compiling() else _is_ordinary
    tensors: list[Tensor | None] = []
    for name, kind in _KINDS:
        part = modules.get(name)
        if part is None and name == "norm":
            tensors += [None, None, None, None]
            continue
        # Parametrising a module changes its class. Some wrappers patch a forward onto the instance.
        if part is None or type(part) is not kind or "forward" in part.__dict__:
            return None
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return None
        for tensor in (part._parameters.get("weight"), part._parameters.get("bias")):
            if not is_ordinary(tensor):
                return None
            tensors.append(tensor)
        if name == "norm":
            statistics = part._buffers.get("running_mean"), part._buffers.get("running_var")
            if statistics[0] is None or statistics[1] is None:
                return None
            tensors += statistics
    for name in _OWN:
        own = selector._parameters.get(name)
        if own is not None and not is_ordinary(own):
            return None
        tensors.append(own)
    return GateParameters._make(tensors)


def count_batch(norm: nn.BatchNorm1d) -> float:
    """As nn.BatchNorm1d before it normalises in training: count the batch, and return its weight. A recomputed forward has
    counted already."""
    if norm.momentum is not None:
        validate.share("momentum", norm.momentum)
    if in_backward():
        return 0.0
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        warnings.warn(
            "a selector in training mode ran without gradients: its gate normalises by the statistics of this batch, and counts "
            "them. Call eval() for embeddings",
            stacklevel=1,  # one place, so that it is said once
        )
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # cumulative average
            return 1.0 / norm.num_batches_tracked.item()
    return 0.0 if norm.momentum is None else norm.momentum


def _is_ordinary(tensor: object) -> bool:
    return type(tensor) in (nn.Parameter, Tensor)


def _is_ordinary_while_traced(tensor: object) -> bool:
    """Every tensor may then be represented by a subclass; those to avoid are wrappers that trace. The class is asked: an instance
    that torch.compile traces denies having the methods by which torch knows a wrapper."""
    return isinstance(tensor, Tensor) and not hasattr(type(tensor), "__tensor_flatten__")


def plan_of(selector: Planned) -> Plan | None:
    """The plan for ``selector`` as it is now, kept on it. None where there can be none: something traces or transforms the
    call, the gate's parts are not plain, or its profile is "official"."""
    if not dispatcher_is_idle() or selector.profile != "paper":
        return None
    parameters = plain_tensors(selector)
    if parameters is None:
        return None
    norm = selector._modules.get("norm")
    how_normed = None if norm is None else (id(norm), norm.eps, norm.training)
    identity = (*map(id, parameters), selector.frequencies, selector.activation, selector.backend, how_normed)
    plan = selector.__dict__.get("_plan")
    if plan is None or plan.identity != identity:
        plan = Plan(selector, parameters, identity)
        selector.__dict__["_plan"] = plan
    return plan
