"""Parts of the selector that are replaced, hooked, parametrised or wrapped."""

import pytest
import torch
from builders import assert_close, make_batch, make_gradient, through_ops
from small import Adapter, B, D, H, L, N, equal, outputs, trained
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from s2sent_kernels import S2SentSelector, functional

# ---------------------------------------------------------------- parts replaced, hooked, parametrised, wrapped


class Spy:
    """Counts calls of the functions that would compute a fused gate."""

    def __init__(self, monkeypatch):
        self.calls = 0
        for name in ("gate_squeezed", "select_fused", "select_pool_fused"):
            function = getattr(functional, name)

            def counted(*args, function=function, **options):
                self.calls += 1
                return function(*args, **options)

            monkeypatch.setattr(functional, name, counted)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


class Same(nn.Module):
    """A parametrisation that changes nothing."""

    def forward(self, x):
        return x.clone()


class Wrapped(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


class Subclass(nn.Linear):
    pass


def subclassed(part):
    other = Subclass(part.in_features, part.out_features, dtype=part.weight.dtype)
    other.load_state_dict(part.state_dict())
    return other


def patch_forward(selector):
    selector.up.forward = selector.up.forward  # as accelerate and others do


CHANGES = {
    "nothing": lambda s: None,
    "wrapped down": lambda s: setattr(s, "down", Wrapped(s.down)),
    "wrapped up": lambda s: setattr(s, "up", Wrapped(s.up)),
    "wrapped norm": lambda s: setattr(s, "norm", Wrapped(s.norm)),
    "sequential": lambda s: setattr(s, "down", nn.Sequential(s.down)),
    "subclass": lambda s: setattr(s, "down", subclassed(s.down)),
    "adapter": lambda s: setattr(s, "up", Adapter(s.up)),
    "forward hook": lambda s: s.down.register_forward_hook(lambda module, args, out: None),
    "forward pre-hook": lambda s: s.norm.register_forward_pre_hook(lambda module, args: None),
    "backward hook": lambda s: s.up.register_full_backward_hook(lambda module, gin, gout: None),
    "backward pre-hook": lambda s: s.up.register_full_backward_pre_hook(lambda module, gout: None),
    "parametrised": lambda s: parametrize.register_parametrization(s.down, "weight", Same()),
    "weight norm": lambda s: parametrizations.weight_norm(s.up),
    "patched forward": patch_forward,
    "synchronised norm": lambda s: nn.SyncBatchNorm.convert_sync_batchnorm(s),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("profile", ["paper", "official"])
def test_changed_parts_compute_the_same(change, profile, batch, spy):
    selector = trained(profile=profile)
    expected = outputs(selector, batch)
    CHANGES[change](selector)
    spy.calls = 0
    actual = outputs(selector, batch)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)
    assert (spy.calls == 0) == (change != "nothing")


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "synchronised norm"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_changed_parts_have_the_same_gradients(change, training, pooling, monkeypatch):
    def gradients(selector):
        hidden_states, mask = make_batch(N, B, L, D, requires_grad=True)
        out = selector(hidden_states, mask) if pooling is None else selector.pool(hidden_states, mask)
        out.backward(make_gradient(out))
        return [out.detach(), *(u.grad for u in hidden_states)], dict(selector.named_buffers())

    expected, buffers = gradients(trained().train(training))
    selector = trained()
    CHANGES[change](selector)
    selector.backend = through_ops(monkeypatch)
    actual, after = gradients(selector.train(training))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)
    for a, e in zip(after.values(), buffers.values(), strict=True):
        assert_close(a, e, 1e-12)


def test_prior_and_scale_stand_beside_changed_parts(batch):
    selector = trained(block_prior=True, gate_scale=4.0)
    expected = outputs(selector, batch)
    selector.up = Adapter(selector.up)
    for a, e in zip(outputs(selector, batch), expected, strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("path", ["forward", "pool", "gates"])
@pytest.mark.parametrize("part", ["down", "up", "norm"])
def test_hooks_are_called(path, part, batch):
    selector = trained()
    called = []
    module = getattr(selector, part)
    before = module.register_forward_pre_hook(lambda module, args: called.append(args[0].shape))
    after = module.register_forward_hook(lambda module, args, out: called.append(out.shape))
    getattr(selector, path)(*batch)
    width = {"down": (D, H), "up": (H, N * D), "norm": (N * D, N * D)}[part]
    assert called == [(B, width[0]), (B, width[1])]
    before.remove()
    after.remove()
    getattr(selector, path)(*batch)
    assert len(called) == 2


def test_a_hook_that_changes_something_does(batch):
    selector = trained()
    expected = selector.pool(*batch)
    hook = selector.up.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    changed = selector.pool(*batch)
    assert not torch.allclose(changed, expected)
    hook.remove()
    assert torch.equal(selector.pool(*batch), expected)


def test_backward_hooks_are_called(batch):
    selector = trained()
    called = []
    selector.up.register_full_backward_hook(lambda module, gin, gout: called.append(gout[0].shape))
    selector.pool(*batch).sum().backward()
    assert called == [(B, N * D)]


def test_an_adapter_trains(batch):
    selector = trained().requires_grad_(False)
    selector.up = Adapter(selector.up)
    selector.pool(*batch).sum().backward()
    assert selector.up.b.weight.grad.any()
    assert selector.up.base_layer.weight.grad is None


@pytest.mark.parametrize("path", ["forward", "pool", "gates"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dynamic_quantisation(path, batch):
    selector = trained(torch.float32)
    hidden_states = [u.float() for u in batch.hidden_states]
    expected = getattr(selector, path)(hidden_states, batch.attention_mask)
    quantised = torch.ao.quantization.quantize_dynamic(selector, {nn.Linear})
    assert type(quantised.down) is not nn.Linear
    actual = getattr(quantised, path)(hidden_states, batch.attention_mask)
    assert actual.dtype == expected.dtype
    error = (actual - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.1


def test_linears_without_a_bias(batch):
    """A replaced part may have no bias."""
    selector = trained()
    bias = selector.down.bias.detach().clone()
    with torch.no_grad():
        selector.down.bias.zero_()
    expected = outputs(selector, batch)
    with torch.no_grad():
        selector.down.bias.copy_(bias)
    assert not equal(outputs(selector, batch), expected)
    narrow = nn.Linear(D, H, bias=False).double()
    narrow.weight = selector.down.weight
    selector.down = narrow
    for a, e in zip(outputs(selector, batch), expected, strict=True):
        assert_close(a, e, 1e-12)


def test_sync_batch_norm(batch):
    selector = nn.SyncBatchNorm.convert_sync_batchnorm(trained())
    assert type(selector.norm) is nn.SyncBatchNorm
    assert equal([selector.pool(*batch)], [selector.pool(*batch)])
    assert_close(selector.pool(*batch), trained().pool(*batch), 1e-12)


def test_data_parallel_is_refused():
    """torch.nn.DataParallel replicates every module of a model so, where there are several GPUs."""
    selector = S2SentSelector(8, 2, bottleneck=4, frequencies=2)
    with pytest.raises(RuntimeError, match=r"torch.nn.DataParallel does not support S2SentSelector.*torchrun"):
        selector._replicate_for_data_parallel()
