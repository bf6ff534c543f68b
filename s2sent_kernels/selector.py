"""S2SentSelector: the selector as an nn.Module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, offloaded, validate
from .blockwise import BlockwisePool
from .checkpoints import pretrained, published
from .engines.choice import BACKENDS
from .files import first_line
from .formula import reference
from .formula.call import ACTIVATIONS, POOLINGS, PROFILES, Activation, Batch, GateParameters, Gating, Profile, Reading
from .plan import Plan, count_batch, plain_tensors, plan_of
from .recomputed import in_backward, uncounted
from .synchronised import Joinable, Processes, batch_norm, gathers, refuse_shard

PRIOR_OF_LAST_BLOCK = 3.0  # where a learned block prior starts: encoders are trained to output their last block


class S2SentSelector(Joinable):
    """Fuses the hidden states of N Transformer blocks by frequency and spatial selection (arXiv 2508.18164).

    Args:
        hidden_size: D, features of a hidden state.
        num_blocks: N, blocks to fuse.
        bottleneck: H, width of the gate's bottleneck.
        frequencies: M, DCT components; divides D, and N blocks must have as many.
        profile: "paper", or "official" for the published code's arithmetic and checkpoints.
        gate_norm: "batch" (batch norm of every (n, d), eps 1e-6, momentum 0.1) or None. With "batch" a training step needs two
            sentences or more, as in nn.BatchNorm1d: drop a last batch of one.
        block_prior: learn one number per block that is added to the gate's logits (profile "paper"), started at 3 for the
            last block and 0 elsewhere. Off, the formula is exactly the paper's.
        gate_scale: learn one number that multiplies what the gate saw in its logits (profile "paper"), started here; 4 is a
            good start. None is the paper's formula, in which a gate favours a block by a factor of e at most.
        activation: of the bottleneck, as in ``functional.gate``.
        backend: "auto", or a name that ``backends()`` lists.
        device, dtype: of the parameters and buffers, as in torch's own modules; by default torch's.

    State: ``down`` nn.Linear(D, H), ``up`` nn.Linear(H, N * D) (n major), ``norm`` nn.BatchNorm1d(N * D) or None,
    ``block_prior`` [N] or None, ``gate_scale`` a scalar or None. Where one of the three modules is replaced, hooked,
    parametrised or wrapped, the gate calls them as modules instead of a fused kernel.

    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was expected and what was passed.
    """

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int,
        bottleneck: int = 64,
        frequencies: int = 4,
        *,
        profile: str = "paper",
        gate_norm: str | None = "batch",
        block_prior: bool = False,
        gate_scale: float | None = None,
        activation: str = "tanh",
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_blocks", num_blocks), ("bottleneck", bottleneck)):
            validate.positive_int(name, value)
        validate.components(num_blocks, hidden_size, frequencies, profile)
        validate.option("gate_norm", gate_norm, ("batch", None))
        validate.option("backend", backend, ("auto", *BACKENDS))
        validate.flag("block_prior", block_prior)
        if block_prior and profile == "official":
            raise ValueError("block_prior: profile 'official' has none, expected False, got True")
        if gate_scale is not None:
            validate.finite_number("gate_scale", gate_scale)
            if profile == "official":
                raise ValueError(f"gate_scale: profile 'official' has none, expected None, got {gate_scale}")
        self.hidden_size, self.num_blocks, self.bottleneck = hidden_size, num_blocks, bottleneck
        self.frequencies, self.gate_norm, self.backend = frequencies, gate_norm, backend
        self.profile: Profile = validate.option("profile", profile, PROFILES)
        self.activation: Activation = validate.option("activation", activation, ACTIVATIONS)
        where: dict[str, Any] = {"device": validate.device("device", device), "dtype": validate.dtype("dtype", dtype)}
        both = num_blocks * hidden_size
        self.down = nn.Linear(hidden_size, bottleneck, **where)
        self.up = nn.Linear(bottleneck, both, **where)
        self.norm = nn.BatchNorm1d(both, eps=1e-6, momentum=0.1, **where) if gate_norm == "batch" else None
        self.block_prior: nn.Parameter | None
        prior = nn.Parameter(torch.empty(num_blocks, **where)) if block_prior else None
        self.register_parameter("block_prior", prior)
        self.gate_scale: nn.Parameter | None
        scale = None if gate_scale is None else nn.Parameter(torch.empty((), **where))
        self.register_parameter("gate_scale", scale)
        self._first_gate_scale = 1.0 if gate_scale is None else float(gate_scale)
        self._reset_own()

    def reset_parameters(self) -> None:
        """Start anew: draw the gate's weights, and set all else to where it starts. What was made on the meta device needs it
        after ``to_empty``."""
        for part in self.children():
            for module in part.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        self._reset_own()

    @torch.no_grad()
    def _reset_own(self) -> None:
        """The parameters that no part holds."""
        if self.block_prior is not None:
            self.block_prior.zero_()
            self.block_prior[-1] = PRIOR_OF_LAST_BLOCK
        if self.gate_scale is not None:
            self.gate_scale.fill_(self._first_gate_scale)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files leave out the plan, which belongs to this selector's tensors, and the processes, whose group cannot
        be copied."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_plan", "processes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Selectors that were pickled before there was a gate scale have none; later ones did not note where theirs started."""
        super().__setstate__(state)
        self._parameters.setdefault("gate_scale", None)
        self.__dict__.setdefault("_first_gate_scale", 1.0)

    def _replicate_for_data_parallel(self) -> Any:
        """torch.nn.DataParallel calls this of every module that it copies to another GPU.

        Raises:
            RuntimeError: always. The copies would be without the hooks of an encoder's capture, and each would use the batch
                statistics of its share alone.
        """
        raise RuntimeError(
            "torch.nn.DataParallel does not support S2SentSelector: start one process for each GPU (torchrun, "
            "DistributedDataParallel), or let one GPU be visible (CUDA_VISIBLE_DEVICES=0)"
        )

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_blocks={self.num_blocks}, bottleneck={self.bottleneck}, "
            f"frequencies={self.frequencies}, profile={self.profile!r}, gate_norm={self.gate_norm!r}, "
            f"block_prior={self.block_prior is not None}, gate_scale={self.gate_scale is not None}, "
            f"activation={self.activation!r}, backend={self.backend!r}"
        )

    # ------------------------------------------------------------ what people call

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Fused tokens v [B, L, D] (packed [T, D]) from N hidden states [B, L, D], lowest block first; 0 at padding."""
        plan = self._find_plan()
        fused = None if plan is None else plan.fuse(hidden_states, attention_mask, cu_seqlens)
        if fused is not None:
            return fused
        batch, reading = self._batch(hidden_states, attention_mask, cu_seqlens), self.reading(None)
        parameters = self.gate_parameters()
        if parameters is None:
            return functional.select_with(self.gate, batch, reading, self.backend)
        return functional.select_fused(batch, reading, parameters, self.gating(), self.backend)

    def pool(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        pooling: str = "mean",
    ) -> Tensor:
        """Sentence embeddings o [B, D]: the fused tokens pooled as in ``functional.squeeze``, without forming them."""
        plan = self._find_plan()
        output = None if plan is None else plan.pool(hidden_states, attention_mask, cu_seqlens, pooling)
        if output is not None:
            return output
        batch, reading = self._batch(hidden_states, attention_mask, cu_seqlens), self.reading(pooling)
        validate.word("pooling", pooling, POOLINGS)  # None is for squeeze alone
        parameters = self.gate_parameters()
        if parameters is None:
            return functional.select_pool_with(self.gate, batch, reading, self.backend)
        return functional.select_pool_fused(batch, reading, parameters, self.gating(), self.backend)

    def gates(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The gates g [B, N, D], float32 (float64 for float64 inputs)."""
        batch = self._batch(hidden_states, attention_mask, cu_seqlens)
        squeezed, _ = functional.squeeze_batch(batch, self.reading(None), self.backend)
        return self.gate(squeezed)

    def gates_and_pooled(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        pooling: str = "mean",
    ) -> tuple[Tensor, Tensor]:
        """g and p, both [B, N, D] and of the gates' dtype, in one read: o is the sum of their product over n."""
        batch = self._batch(hidden_states, attention_mask, cu_seqlens)
        validate.word("pooling", pooling, POOLINGS)  # None is for squeeze alone
        squeezed, pooled = functional.squeeze_batch(batch, self.reading(pooling), self.backend)
        assert pooled is not None  # with a pooling
        return self.gate(squeezed), pooled

    def blockwise(
        self,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        pooling: str = "mean",
    ) -> BlockwisePool:
        """``pool`` fed one block at a time, for inference: see ``BlockwisePool``."""
        return BlockwisePool(self, attention_mask, cu_seqlens, pooling)

    # ------------------------------------------------------------ a call, and the gate

    def _find_plan(self) -> Plan | None:
        # The gate of a subclass, or one set on this instance, is called as it is.
        own = type(self).gate is S2SentSelector.gate and "gate" not in self.__dict__
        return plan_of(self) if own and self._joined() is None else None

    def _batch(self, hidden_states: Sequence[Tensor], mask: Tensor | None, cu_seqlens: Tensor | None) -> Batch:
        batch = validate.types(hidden_states, mask, cu_seqlens, expected_blocks=self.num_blocks)
        if batch.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"hidden_states[0]: expected D = {self.hidden_size} features in the last dimension, "
                f"got shape {list(batch.shape)}"
            )
        return batch

    def reading(self, pooling: str | None) -> Reading:
        """How this selector reads a batch."""
        validate.positive_int("frequencies", self.frequencies)
        word = None if pooling is None else validate.word("pooling", pooling, POOLINGS)
        return Reading(self.frequencies, self.profile, word)

    def gating(self) -> Gating:
        """How this selector's gate is computed with running statistics."""
        eps = 1e-6 if self.norm is None else self.norm.eps
        validate.number("eps", eps)
        return Gating(self.activation, eps, self.profile)

    def gate_parameters(self) -> GateParameters | None:
        """The gate's tensors where they alone define it and a fused kernel can compute it. None for batch statistics, profile
        "official", and parts that are replaced, hooked, parametrised or wrapped."""
        if self.profile != "paper" or self._uses_batch_statistics():
            return None
        return plain_tensors(self)

    def gate(self, squeezed: Tensor) -> Tensor:
        """The gates g [B, N, D] from f [B, D] (float32, or float64 for float64 inputs). In training it uses the statistics of
        the batch and updates the running ones, unless a forward is recomputed within a backward pass.

        Raises:
            ValueError: it would use the batch's statistics, and the batch is one sentence; or its parameters are sharded and not
                gathered.
        """
        if gathers(self, "gate"):
            return self.gate(squeezed)
        norm = self._modules.get("norm")
        if self._joined() is not None:
            return self._gate_through_parts(squeezed)
        if isinstance(norm, nn.BatchNorm1d) and (norm.training or norm.running_mean is None):
            validate.batch_statistics(squeezed.shape[0])  # before the batch is counted
        parameters = plain_tensors(self)
        if parameters is None:
            return self._gate_through_parts(squeezed)
        training, momentum = self._uses_batch_statistics(), 0.1
        if training and self.norm is not None and squeezed.shape[0]:
            momentum = count_batch(self.norm)
        gating = self.gating()._replace(training=training, momentum=momentum)
        return functional.gate_squeezed(squeezed, parameters, self.num_blocks, gating, self.backend)

    def _uses_batch_statistics(self) -> bool:
        norm = self._modules.get("norm")  # a module's own attribute lookup takes longer than the rest
        return norm is not None and norm.training

    def _joined(self) -> Processes | None:
        """The processes that share their batch statistics in a call now."""
        processes = self.__dict__.get("processes")
        if processes is None or not self._uses_batch_statistics() or type(self.norm) is not nn.BatchNorm1d:
            return None
        return processes if processes.are_several else None

    def _gate_through_parts(self, squeezed: Tensor) -> Tensor:
        refuse_shard("down", self.down)
        with reference.autocast_off(squeezed.device):
            down = _call(self.down, squeezed)
            excited = _call(self.up, reference.activate(down, self.activation))
            processes = self._joined()
            if processes is not None and self.norm is not None:
                excited = batch_norm(self.norm, excited, processes)
            elif self.norm is not None:
                with uncounted(self.norm) if in_backward() else contextlib.nullcontext():
                    excited = _call(self.norm, excited)
            excited = excited.to(squeezed.dtype).unflatten(1, (self.num_blocks, self.hidden_size))
            with offloaded.own_parameters(self):
                return reference.s_norm(excited, self.block_prior, self.gate_scale, self.profile)

    # ------------------------------------------------------------ folders

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, but for the backend, of a selector that takes the state of this one."""
        found = {name: getattr(self, name) for name in pretrained.ARGUMENTS}
        found["block_prior"] = self.block_prior is not None
        found["gate_scale"] = None if self.gate_scale is None else self.gate_scale.item()
        return found

    def save_pretrained(self, folder: str | os.PathLike[str], *, about: Mapping[str, Any] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, which is created if missing. ``about`` adds entries to
        the configuration, as "blocks" and "pooling".

        Raises:
            ValueError: a tensor is quantised or sharded; names it.
        """
        pretrained.save(folder, self.arguments, self.state_dict(), about)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str], *, backend: str = "auto") -> S2SentSelector:
        """The selector of a folder that ``save_pretrained`` wrote, or one shipped with the package, as
        "all-MiniLM-L6-v2"; in eval mode, and in float32 where its file has fewer bits, which are a way to store it.

        Raises:
            ValueError: there is no such folder or name (lists the names), or it holds no selector.
        """
        folder = pretrained.find(name_or_folder)
        config = pretrained.read_config(folder)["selector"]
        arguments = {name: config[name] for name in pretrained.ARGUMENTS if name in config}
        try:
            # Without memory: a number in the file may be absurd.
            shapes = cls(**arguments, backend=backend, device="meta").state_dict()
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{folder / pretrained.CONFIG}: {first_line(error)}: {pretrained.REMEDY}") from error
        state = pretrained.read_weights(folder, shapes)
        selector = cls(**arguments, backend=backend)
        dtype = torch.promote_types(state["down.weight"].dtype, torch.float32)
        selector.to(dtype).load_state_dict(state)
        return selector.eval()

    # ------------------------------------------------------------ published checkpoints

    @staticmethod
    def published_blocks(num_hidden_states: int, num_blocks: int) -> list[int]:
        """The indices into an encoder's ``hidden_states`` (embeddings first) that the published code would fuse: the
        ``num_blocks`` before the last one."""
        validate.positive_int("num_blocks", num_blocks)
        validate.positive_int("num_hidden_states", num_hidden_states)
        if num_hidden_states < num_blocks + 1:
            raise ValueError(
                f"num_hidden_states: expected at least N + 1 = {num_blocks + 1}, since the last is left out, "
                f"got {num_hidden_states}"
            )
        return list(range(num_hidden_states - num_blocks - 1, num_hidden_states - 1))

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        prefix: str = "",
        *,
        frequencies: int | None = None,
        backend: str = "auto",
    ) -> S2SentSelector:
        """A selector with ``profile="official"`` from the published code's keys.

        Args:
            state_dict: may hold other tensors beside ``{prefix}dense_z.0.weight`` and its like.
            prefix: precedes the published names, usually ``"S2A."``.
            frequencies: M; by default read off the checkpoint's basis buffer, or 4 where it has none.

        Raises:
            ValueError: a key is missing or has an unexpected shape; names it.
            TypeError: ``state_dict`` is no mapping, as the path of a file.
        """
        arguments, state = published.convert(state_dict, prefix, frequencies)
        selector = cls(**arguments, backend=backend)
        selector.to(state["down.weight"].dtype).load_state_dict(state)
        return selector


def _call(part: nn.Module, values: Tensor) -> Tensor:
    """Run a part in its own parameters' dtype, which a linear layer requires, and convert the result back."""
    weight = getattr(part, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else values.dtype
    return part(values.to(dtype)).to(values.dtype)
