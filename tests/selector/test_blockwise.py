"""S2SentSelector.blockwise: one hidden state at a time."""

import pytest
import torch
from builders import assert_close, make_batch, pack
from small import Adapter, B, D, L, N, trained

from s2sent_kernels import S2SentSelector
from s2sent_kernels.formula.call import POOLINGS

# ---------------------------------------------------------------- blockwise


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("form", ["none", "mixed", "packed"])
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("profile", ["paper", "official"])
def test_blockwise_is_pool(pooling, form, changed, profile):
    if form == "packed" and profile == "official":
        selector = trained(profile=profile)
        packed, cu_seqlens = pack(*make_batch(N, B, L, D))
        with pytest.raises(ValueError, match="cu_seqlens"):
            selector.blockwise(cu_seqlens=cu_seqlens, pooling=pooling).add(0, packed[0])
        return
    selector = trained(profile=profile, block_prior=profile == "paper", gate_scale=3.0 if profile == "paper" else None)
    if changed:
        selector.up = Adapter(selector.up)
    hidden_states, mask = make_batch(N, B, L, D, mask="none" if form == "none" else "mixed")
    where = {"attention_mask": mask}
    if form == "packed":
        hidden_states, cu_seqlens = pack(hidden_states, mask)
        where = {"cu_seqlens": cu_seqlens}
    expected = selector.pool(hidden_states, **where, pooling=pooling)
    stream = selector.blockwise(**where, pooling=pooling)
    for block, hidden_state in enumerate(hidden_states):
        stream.add(block, hidden_state)
    assert_close(stream.result(), expected.detach(), 1e-13)


def test_blockwise_keeps_no_hidden_state():
    import weakref

    selector = trained()
    stream = selector.blockwise()
    hidden_state = torch.randn(B, L, D, dtype=torch.float64)
    reference = weakref.ref(hidden_state)
    stream.add(0, hidden_state)
    del hidden_state
    assert reference() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockwise_dtypes(dtype):
    selector = trained(torch.float32)
    hidden_states, mask = make_batch(N, B, L, D, dtype)
    stream = selector.blockwise(mask)
    with torch.no_grad():
        for block, hidden_state in enumerate(hidden_states):
            stream.add(block, hidden_state)
        assert_close(stream.result(), selector.pool(hidden_states, mask), 1e-6 if dtype == torch.float32 else 1e-2)


def test_blockwise_errors(batch):
    selector = trained()
    u = batch.hidden_states
    stream = selector.blockwise(batch.attention_mask)
    with pytest.raises(RuntimeError, match=r"3.*0"):
        stream.result()
    with pytest.raises(ValueError, match=r"block: expected 0.*got 1"):
        stream.add(1, u[1])
    stream.add(0, u[0])
    with pytest.raises(ValueError, match=r"block: expected 1.*got 0"):
        stream.add(0, u[0])
    with pytest.raises(ValueError, match="hidden_state"):
        stream.add(1, u[1][:, :-1])
    with pytest.raises(ValueError, match="hidden_state"):
        stream.add(1, u[1].float())
    with pytest.raises(RuntimeError, match="gradient"):
        stream.add(1, u[1].clone().requires_grad_())
    stream.add(1, u[1])
    stream.add(2, u[2])
    with pytest.raises(ValueError, match="block"):
        stream.add(3, u[2])
    assert_close(stream.result(), selector.pool(*batch).detach(), 1e-13)  # the failed calls changed nothing


def test_blockwise_validates_the_first_block(batch):
    selector = trained()
    with pytest.raises(ValueError, match="attention_mask"):
        selector.blockwise(batch.attention_mask[:, :-1]).add(0, batch.hidden_states[0])
    with pytest.raises(ValueError, match=f"{D}"):
        selector.blockwise(batch.attention_mask).add(0, batch.hidden_states[0][..., :-4])
    with pytest.raises(TypeError, match="hidden_state"):
        selector.blockwise(batch.attention_mask).add(0, [1.0])
    with pytest.raises(ValueError, match="both"):
        selector.blockwise(batch.attention_mask, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)).add(
            0, batch.hidden_states[0]
        )


@pytest.mark.parametrize("changed", [False, True])
def test_blockwise_result_needs_no_gradient(batch, changed):
    """Not even where parameters require a gradient."""
    selector = trained()
    if changed:
        selector.up = Adapter(selector.up)
    stream = selector.blockwise(batch.attention_mask)
    for block, hidden_state in enumerate(batch.hidden_states):
        stream.add(block, hidden_state)
    assert not stream.result().requires_grad


def test_blockwise_refuses_a_gate_that_does_not_fit():
    selector = S2SentSelector(8, 2, 4, 2).eval()
    selector.down = torch.nn.Linear(8, 5)
    with pytest.raises(ValueError, match="up_weight: expected shape"):
        selector.blockwise().add(0, torch.randn(3, 4, 8))


def test_blockwise_refuses_another_device():
    stream = S2SentSelector(8, 2, 4, 2).eval().blockwise()
    stream.add(0, torch.randn(3, 4, 8))
    with pytest.raises(ValueError, match=r"hidden_state: expected .* on cpu as block 0, got .* on meta"):
        stream.add(1, torch.randn(3, 4, 8, device="meta"))


def test_blockwise_checks_what_the_op_checks():
    """At the first block, also where ``add`` calls the engine directly."""
    selector = trained().float().eval()
    hidden_states, _ = make_batch(N, B, L, D, torch.float32, "none")
    selector.frequencies = D + 1
    with pytest.raises(ValueError, match="frequencies"):
        selector.blockwise().add(0, hidden_states[0])
    selector.frequencies = "4"
    with pytest.raises(TypeError, match="frequencies: expected an integer, got str"):
        selector.blockwise()
