"""``device=`` and ``dtype=`` of S2SentSelector, and the meta device: made without memory, moved, then started anew."""

import copy
import inspect
import io

import pytest
import torch
from builders import make_batch, pack
from small import B, D, H, L, M, N, trained
from torch import nn
from torch._subclasses import FakeTensorMode

from s2sent_kernels import S2SentSelector

OPTIONS = {"block_prior": True, "gate_scale": 4.0}


def equal_states(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------- the constructor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype(dtype):
    selector = S2SentSelector(D, N, H, M, **OPTIONS, dtype=dtype)
    assert {t.dtype for t in selector.parameters()} == {dtype}
    assert {t.dtype for name, t in selector.named_buffers() if "running" in name} == {dtype}
    assert selector.norm.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_device(device):
    selector = S2SentSelector(D, N, H, M, **OPTIONS, device=device)
    assert all(t.is_meta for t in selector.state_dict().values())


def test_as_torch_names_them():
    """torch.nn.utils.skip_init looks for the argument by its name."""
    ours, theirs = (inspect.signature(module).parameters for module in (S2SentSelector, nn.Linear))
    for name in ("device", "dtype"):
        assert ours[name].default is theirs[name].default is None


def test_the_draw_is_that_of_its_parts():
    """Seeds give what they gave before there were the arguments."""
    torch.manual_seed(0)
    selector = S2SentSelector(D, N, H, M, **OPTIONS)
    torch.manual_seed(0)
    down, up = nn.Linear(D, H), nn.Linear(H, N * D)
    assert torch.equal(selector.down.weight, down.weight) and torch.equal(selector.up.bias, up.bias)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"device": "nowhere"}, ValueError, "device: expected a torch.device, its name or None, got 'nowhere'"),
        ({"device": 1.5}, TypeError, "device: expected a torch.device, its name or None, got float"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected a floating dtype or None, got torch.int64"),
        ({"dtype": torch.complex64}, TypeError, "dtype: expected a floating dtype or None, got torch.complex64"),
        ({"dtype": "float32"}, TypeError, "dtype: expected a floating dtype or None, got str"),
    ],
)
def test_wrong_ones_are_named(options, kind, message):
    with pytest.raises(kind) as error:
        S2SentSelector(D, N, H, M, **options)
    assert str(error.value) == message


# ---------------------------------------------------------------- made without memory, then started


def test_skip_init():
    selector = nn.utils.skip_init(S2SentSelector, D, N, H, M, **OPTIONS, dtype=torch.float64)
    assert all(not t.is_meta for t in selector.state_dict().values())
    selector.load_state_dict(trained(**OPTIONS).state_dict())
    assert equal_states(selector, trained(**OPTIONS))


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("options", [{}, OPTIONS, {"profile": "official"}])
def test_to_empty_and_reset(norm, options):
    torch.manual_seed(0)
    expected = S2SentSelector(D, N, H, M, gate_norm=norm, **options)
    with torch.device("meta"):
        selector = S2SentSelector(D, N, H, M, gate_norm=norm, **options)
    selector.to_empty(device="cpu")
    for tensor in selector.state_dict().values():
        tensor.fill_(7)
    torch.manual_seed(0)
    selector.reset_parameters()
    assert equal_states(selector, expected)


def test_reset_module_by_module():
    """As FSDP starts what was deferred: each module with tensors of its own, parents first."""
    with torch.device("meta"):
        selector = S2SentSelector(D, N, H, M, **OPTIONS)
    for module in selector.modules():
        module.to_empty(device="cpu", recurse=False)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.detach().fill_(torch.nan if tensor.is_floating_point() else 7)
        module.reset_parameters()
    assert all(torch.isfinite(t).all() for t in selector.state_dict().values())
    assert selector.block_prior.tolist() == [0.0, 0.0, 3.0] and selector.gate_scale.item() == 4.0
    assert selector.norm.num_batches_tracked.item() == 0


def test_reset_after_training():
    selector = trained(**OPTIONS)
    selector.norm.num_batches_tracked.add_(3)
    selector.reset_parameters()
    assert selector.block_prior.tolist() == [0.0, 0.0, 3.0] and selector.gate_scale.item() == 4.0
    assert selector.norm.num_batches_tracked.item() == 0 and not selector.norm.running_mean.any()
    assert all(parameter.requires_grad for parameter in selector.parameters())


def test_reset_of_replaced_parts():
    """Those without ``reset_parameters`` keep what they have."""
    selector = trained()
    selector.up = nn.Sequential(selector.up, nn.Dropout(0.5))
    before = selector.up[0].weight.clone()
    selector.reset_parameters()
    assert not torch.equal(selector.up[0].weight, before)


def test_copies_remember_where_the_scale_starts():
    selector = trained(**OPTIONS)
    file = io.BytesIO()
    torch.save(selector, file)
    file.seek(0)
    for other in (copy.deepcopy(selector), torch.load(file, weights_only=False)):
        other.reset_parameters()
        assert other.gate_scale.item() == 4.0


# ---------------------------------------------------------------- calls on the meta device


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("profile", ["paper", "official"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["mask", "none", "packed"])
def test_shapes_on_meta(backend, profile, training, form):
    if form == "packed" and profile == "official":
        pytest.skip("profile 'official' has no packed form")
    options = OPTIONS if profile == "paper" else {}
    selector = S2SentSelector(D, N, H, M, profile=profile, **options, backend=backend).train(training)
    hidden_states, mask = make_batch(N, B, L, D, torch.float32, "none" if form == "none" else "right")
    where = {"attention_mask": mask} if form == "mask" else {}
    if form == "packed":
        hidden_states, where["cu_seqlens"] = pack(hidden_states, mask)
    on_meta = copy.deepcopy(selector).to("meta")
    inputs = [u.to("meta").requires_grad_() for u in hidden_states]
    where_on_meta = {name: value.to("meta") for name, value in where.items()}
    for name in ("forward", "pool", "gates"):
        expected, out = getattr(selector, name)(hidden_states, **where), getattr(on_meta, name)(inputs, **where_on_meta)
        assert out.is_meta and out.shape == expected.shape and out.dtype == expected.dtype
        out.sum().backward()
        assert all(u.grad.is_meta and u.grad.shape == u.shape for u in inputs)


def all_calls(selector, hidden_states, mask):
    stream = selector.blockwise(mask)
    for block, u in enumerate(hidden_states):
        stream.add(block, u)
    return [stream.result(), selector.pool(hidden_states, mask), selector(hidden_states, mask)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_without_numbers(backend, dtype):
    """A mask's values are judged where they can be read, and these have a shape alone."""
    shapes = [(B, D), (B, D), (B, L, D)]

    def called(device):
        selector = S2SentSelector(D, N, H, M, backend=backend, device=device).eval()
        blocks = [torch.ones(B, L, D, device=device) for _ in range(N)]
        return all_calls(selector, blocks, torch.ones(B, L, dtype=dtype, device=device))

    with torch.no_grad():
        assert [out.shape for out in called("meta")] == shapes
        with FakeTensorMode():
            assert [out.shape for out in called("cpu")] == shapes


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_inside_vmap(dtype):
    selector = S2SentSelector(D, N, H, M, backend="reference").eval()
    (one, mask), (two, other) = (make_batch(N, B, L, D, torch.float32, kind) for kind in ("right", "holes"))
    both = tuple(torch.stack(pair) for pair in zip(one, two, strict=True))
    masks = torch.stack([mask, other]).to(dtype)
    found = torch.func.vmap(lambda u, m: selector.pool(list(u), m))(both, masks)
    wanted = torch.stack([selector.pool(one, mask), selector.pool(two, other)])
    torch.testing.assert_close(found, wanted)


def test_blockwise_on_meta():
    selector = S2SentSelector(D, N, H, M, device="meta").eval()
    stream = selector.blockwise()
    for block in range(N):
        stream.add(block, torch.empty(B, L, D, device="meta"))
    out = stream.result()
    assert out.is_meta and out.shape == (B, D)
