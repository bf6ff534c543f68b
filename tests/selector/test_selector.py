"""S2SentSelector as a module: its state, published checkpoints, replaced parts, batch statistics, copies, blockwise."""

import copy
import io
import pickle

import pytest
import torch
from builders import assert_close, make_batch, make_gradient, pack, through_ops
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector, functional

N, B, L, D, H, M = 3, 6, 5, 16, 5, 4
GATE = ["down.weight", "down.bias", "up.weight", "up.bias"]
NORM = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
SHAPES = {
    "down.weight": [H, D], "down.bias": [H], "up.weight": [N * D, H], "up.bias": [N * D], "norm.weight": [N * D],
    "norm.bias": [N * D], "norm.running_mean": [N * D], "norm.running_var": [N * D], "norm.num_batches_tracked": [],
    "block_prior": [N],
}  # fmt: skip


def trained(dtype=torch.float64, **options):
    """A selector none of whose tensors is at its initial value, in eval mode."""
    torch.manual_seed(0)
    selector = S2SentSelector(D, N, H, M, **options)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.normal_()
        if selector.norm is not None:
            selector.norm.running_mean.normal_()
            selector.norm.running_var.uniform_(0.5, 2)
    return selector.to(dtype).eval()


@pytest.fixture
def batch():
    return make_batch(N, B, L, D)


def outputs(selector, batch):
    return [
        selector(*batch),
        selector.gates(*batch),
        *(selector.pool(*batch, pooling=p) for p in ("mean", "cls", "last")),
    ]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("prior", [False, True])
def test_state_dict(norm, prior):
    selector = S2SentSelector(D, N, H, M, gate_norm=norm, block_prior=prior)
    expected = {*GATE, *(NORM if norm else []), *(["block_prior"] if prior else [])}
    state = selector.state_dict()
    assert set(state) == expected
    assert {name: list(value.shape) for name, value in state.items()} == {name: SHAPES[name] for name in expected}
    trainable = {name for name, _ in selector.named_parameters()}
    assert trainable == {name for name in expected if "running" not in name and "tracked" not in name}
    assert (selector.block_prior is None) == (not prior)


def test_parts_are_ordinary():
    selector = S2SentSelector(D, N, H, M)
    assert type(selector.down) is nn.Linear and type(selector.up) is nn.Linear and type(selector.norm) is nn.BatchNorm1d
    assert (selector.norm.eps, selector.norm.momentum) == (1e-6, 0.1)
    assert S2SentSelector(D, N, H, M, gate_norm=None).norm is None


def test_the_published_defaults():
    selector = S2SentSelector(768, 3)
    assert (selector.bottleneck, selector.frequencies, selector.profile, selector.backend) == (64, 4, "paper", "auto")
    assert (selector.gate_norm, selector.activation, selector.block_prior) == ("batch", "tanh", None)


@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_where_the_block_prior_starts(blocks):
    selector = S2SentSelector(D, blocks, H, M, block_prior=True)
    assert selector.block_prior.tolist() == [0.0] * (blocks - 1) + [3.0]
    assert selector.block_prior.requires_grad


def test_a_prior_of_zeros_is_the_papers_formula(batch):
    plain, prior = trained(), trained(block_prior=True)
    prior.load_state_dict({**plain.state_dict(), "block_prior": torch.zeros(N)})
    for a, b in zip(outputs(plain, batch), outputs(prior, batch), strict=True):
        assert_close(a, b, 1e-14)


def test_state_dict_round_trip(batch):
    selector, other = trained(block_prior=True), S2SentSelector(D, N, H, M, block_prior=True).double().eval()
    assert not equal(outputs(selector, batch), outputs(other, batch))
    assert not any(other.load_state_dict(selector.state_dict()))
    assert equal(outputs(selector, batch), outputs(other, batch))


def test_the_output_follows_from_the_functions(batch):
    """The module is the functions with its tensors."""
    selector = trained(block_prior=True, activation="relu")
    f, p = s2.squeeze(*batch, frequencies=M, pooling="mean")
    n = selector.norm
    tensors = (selector.down.weight, selector.down.bias, selector.up.weight, selector.up.bias)
    parameters = s2.GateParameters(*tensors, n.weight, n.bias, n.running_mean, n.running_var, selector.block_prior)
    g = s2.gate(f, parameters, num_blocks=N, activation="relu")
    assert_close(selector.gates(*batch), g, 1e-14)
    assert_close(selector(*batch), s2.fuse(batch.hidden_states, g, batch.attention_mask), 1e-14)
    assert_close(selector.pool(*batch), (g * p).sum(1), 1e-14)


# ---------------------------------------------------------------- published checkpoints

X = [0, 0, 1, 1, 0, 2, 2, 1, 2, 0, 3, 4, 0, 1, 3, 0]
Y = [0, 1, 0, 1, 2, 0, 1, 2, 2, 3, 0, 0, 4, 3, 1, 5]


def published_basis(frequencies, hidden_size):
    """[D, 6, 6]: the buffer that the published module fills."""

    def row(k):
        scale = (2 if k else 1) ** 0.5 / 6**0.5
        return torch.cos(torch.pi * k * (torch.arange(6, dtype=torch.float64) + 0.5) / 6) * scale

    planes = [row(X[m])[:, None] * row(Y[m])[None, :] for m in range(frequencies)]
    return torch.stack(planes).repeat_interleave(hidden_size // frequencies, dim=0)


def published(selector, prefix="", basis=None):
    """The published code's state_dict for this selector's tensors."""
    state = selector.state_dict()
    out = {f"{prefix}dense_z.0.weight": state["down.weight"], f"{prefix}dense_z.0.bias": state["down.bias"]}
    for n in range(selector.num_blocks):
        part = slice(n * selector.hidden_size, (n + 1) * selector.hidden_size)
        key = f"{prefix}dense_select_weights.{n}"
        out |= {f"{key}.0.weight": state["up.weight"][part], f"{key}.0.bias": state["up.bias"][part]}
        for name in ("weight", "bias", "running_mean", "running_var"):
            out[f"{key}.1.{name}"] = state[f"norm.{name}"][part]
        out[f"{key}.1.num_batches_tracked"] = torch.tensor(7)
    if basis is not None:
        out[f"{prefix}squeeze.weight"] = basis
    return out


@pytest.mark.parametrize("prefix", ["", "S2A."])
def test_from_published(prefix, batch):
    original = trained(profile="official")
    state = published(original, prefix, published_basis(M, D))
    if prefix:
        state |= {"bert.embeddings.weight": torch.zeros(3), "mlp.dense.weight": torch.zeros(2, 2)}
    loaded = S2SentSelector.from_published(state, prefix)
    assert loaded.profile == "official"
    assert (loaded.hidden_size, loaded.num_blocks, loaded.bottleneck, loaded.frequencies) == (D, N, H, M)
    assert loaded.norm.num_batches_tracked == 7
    loaded.eval()
    assert equal(outputs(loaded, batch), outputs(original, batch))


@pytest.mark.parametrize("frequencies", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [16, 768])
def test_the_number_of_components_is_read_off_the_buffer(frequencies, dtype, wide):
    selector = S2SentSelector(wide, 2, 3, frequencies, profile="official")
    state = published(selector, basis=published_basis(frequencies, wide).to(dtype))
    assert S2SentSelector.from_published(state).frequencies == frequencies


def test_without_the_buffer_there_are_four():
    selector = S2SentSelector(D, N, H, 2, profile="official")
    assert S2SentSelector.from_published(published(selector)).frequencies == 4
    assert S2SentSelector.from_published(published(selector), frequencies=2).frequencies == 2


def test_given_components_win():
    selector = S2SentSelector(D, N, H, 2, profile="official")
    assert (
        S2SentSelector.from_published(published(selector, basis=published_basis(2, D)), frequencies=8).frequencies == 8
    )


def test_a_checkpoint_keeps_its_dtype():
    selector = trained(torch.float16, profile="official")
    loaded = S2SentSelector.from_published(published(selector))
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}


@pytest.mark.parametrize("key", [
    "dense_z.0.weight", "dense_z.0.bias", "dense_select_weights.0.0.weight", "dense_select_weights.2.0.bias",
    "dense_select_weights.1.0.weight", "dense_select_weights.1.1.weight", "dense_select_weights.2.0.weight",
    "dense_select_weights.2.1.running_var",
])  # fmt: skip
def test_a_missing_key_is_named(key):
    state = published(trained(profile="official"), "S2A.")
    del state[f"S2A.{key}"]
    with pytest.raises(ValueError, match=f"S2A.{key}"):
        S2SentSelector.from_published(state, "S2A.")


def test_a_wrong_prefix_is_explained():
    state = published(trained(profile="official"), "S2A.")
    with pytest.raises(ValueError, match=r"dense_z.0.weight.*'S2A.'"):
        S2SentSelector.from_published(state)
    with pytest.raises(ValueError, match=r"dense_z.0.weight"):
        S2SentSelector.from_published({"bert.weight": torch.zeros(1)}, "S2A.")


@pytest.mark.parametrize("basis", [torch.zeros(D, 6, 6), torch.zeros(D, 7, 7), torch.randn(D, 6, 6), torch.zeros(3)])
def test_an_unknown_buffer_is_an_error(basis):
    with pytest.raises(ValueError, match=r"squeeze\.weight"):
        S2SentSelector.from_published(published(trained(profile="official"), basis=basis))


@pytest.mark.parametrize("key, value", [
    ("dense_z.0.weight", torch.zeros(H)), ("dense_z.0.bias", torch.zeros(H + 1)),
    ("dense_select_weights.1.0.weight", torch.zeros(D, H + 1)), ("dense_select_weights.0.1.bias", torch.zeros(D - 1)),
])  # fmt: skip
def test_a_key_of_the_wrong_shape_is_named(key, value):
    state = published(trained(profile="official"))
    state[key] = value
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        S2SentSelector.from_published(state)


@pytest.mark.parametrize("states, blocks, expected", [
    (13, 3, [9, 10, 11]), (13, 12, list(range(12))), (7, 6, list(range(6))), (2, 1, [0]), (25, 4, [20, 21, 22, 23]),
])  # fmt: skip
def test_published_blocks(states, blocks, expected):
    assert S2SentSelector.published_blocks(states, blocks) == expected
    assert S2SentSelector.published_blocks(states, blocks) == list(range(states))[-(blocks + 1) : -1]


def test_published_blocks_of_too_few():
    with pytest.raises(ValueError, match=r"num_hidden_states.*13.*12"):
        S2SentSelector.published_blocks(12, 12)
    with pytest.raises(ValueError, match="num_blocks"):
        S2SentSelector.published_blocks(12, 0)


# ---------------------------------------------------------------- parts replaced, hooked, parametrised, wrapped


class Spy:
    """Counts calls of the functions that would compute a fused gate."""

    def __init__(self, monkeypatch):
        self.calls = 0
        for name in ("gate", "select", "select_pool"):
            function = getattr(functional, name)

            def counted(*args, function=function, **options):
                self.calls += 1
                return function(*args, **options)

            monkeypatch.setattr(functional, name, counted)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


class Adapter(nn.Module):
    """A LoRA-like wrapper: the layer it wraps plus a product of two narrow ones."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


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


def test_the_prior_stands_beside_changed_parts(batch):
    selector = trained(block_prior=True)
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
    """A replaced part may lack one."""
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


# ---------------------------------------------------------------- batch statistics


def norm_by_hand(selector, batch, steps=1):
    """The parts run one after another by torch itself."""
    f, _ = s2.squeeze(*batch, frequencies=M, profile=selector.profile)
    for _ in range(steps):
        selector.norm(selector.up(torch.tanh(selector.down(f))))


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
@pytest.mark.parametrize("path", ["forward", "pool", "gates"])
@pytest.mark.parametrize("profile", ["paper", "official"])
def test_running_statistics_are_torchs(momentum, path, profile, batch):
    selector, other = trained(profile=profile).train(), trained(profile=profile).train()
    selector.norm.momentum = other.norm.momentum = momentum
    for _ in range(3):
        getattr(selector, path)(*batch)
        norm_by_hand(other, batch)
    for name, value in selector.norm.named_buffers():
        assert_close(value, getattr(other.norm, name), 1e-12, name)
    assert selector.norm.num_batches_tracked == 3


def test_gates_in_training_are_of_the_batchs_statistics(batch):
    selector = trained().train()
    gates = selector.gates(*batch)
    f, _ = s2.squeeze(*batch, frequencies=M)
    z = selector.norm(selector.up(torch.tanh(selector.down(f))))
    expected = torch.softmax(torch.sigmoid(z).unflatten(1, (N, D)), dim=1)
    assert_close(gates, expected, 1e-12)


@pytest.mark.parametrize("path", ["forward", "pool", "gates"])
def test_a_frozen_norm_in_training(path, batch):
    """selector.train() with norm.eval(): the running statistics are used and stay."""
    selector = trained()
    expected = getattr(selector, path)(*batch)
    selector.train()
    selector.norm.eval()
    before = {name: value.clone() for name, value in selector.named_buffers()}
    assert torch.equal(getattr(selector, path)(*batch), expected)
    assert equal(before.values(), dict(selector.named_buffers()).values())


@pytest.mark.parametrize("path", ["forward", "pool"])
@pytest.mark.parametrize("training", [False, True])
def test_a_norm_without_running_statistics(path, training, batch):
    """track_running_stats=False: the batch's own in either mode, as in torch."""
    selector = trained().train(training)
    selector.norm = nn.BatchNorm1d(N * D, eps=1e-6, track_running_stats=False).double().train(training)
    f, p = s2.squeeze(*batch, frequencies=M, pooling="mean")
    z = selector.norm(selector.up(torch.tanh(selector.down(f))))
    g = torch.softmax(torch.sigmoid(z).unflatten(1, (N, D)), dim=1)
    expected = (g * p).sum(1) if path == "pool" else s2.fuse(batch.hidden_states, g, batch.attention_mask)
    assert_close(getattr(selector, path)(*batch), expected, 1e-12)


def test_a_norm_that_is_not_affine(batch):
    selector = trained()
    expected = trained()
    with torch.no_grad():
        expected.norm.weight.fill_(1)
        expected.norm.bias.zero_()
    plain = nn.BatchNorm1d(N * D, eps=1e-6, affine=False).double().eval()
    plain.running_mean.copy_(selector.norm.running_mean)
    plain.running_var.copy_(selector.norm.running_var)
    selector.norm = plain
    for a, e in zip(outputs(selector, batch), outputs(expected, batch), strict=True):
        assert_close(a, e, 1e-12)


def test_another_eps(batch):
    selector = trained()
    selector.norm.eps = 0.3
    f, _ = s2.squeeze(*batch, frequencies=M)
    z = selector.norm(selector.up(torch.tanh(selector.down(f))))
    assert_close(selector.gates(*batch), torch.softmax(torch.sigmoid(z).unflatten(1, (N, D)), dim=1), 1e-12)
    _, p = s2.squeeze(*batch, frequencies=M, pooling="mean")
    assert_close(selector.pool(*batch), (selector.gates(*batch) * p).sum(1), 1e-12)


def test_a_step_of_an_optimizer(batch):
    torch.manual_seed(0)
    selector = S2SentSelector(D, N, H, M, block_prior=True).double().train()
    optimizer = torch.optim.AdamW(selector.parameters(), lr=1e-2)
    target = torch.randn(B, D, dtype=torch.float64)
    losses = []
    for _ in range(20):
        loss = (selector.pool(*batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in selector.parameters())
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------- copies and conversions


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("training", [False, True])
def test_copies(how, training, batch):
    selector = trained(block_prior=True, activation="relu", backend="reference").train(training)

    def copied():
        if how == "deepcopy":
            return copy.deepcopy(selector)
        if how == "pickle":
            return pickle.loads(pickle.dumps(selector))
        file = io.BytesIO()
        torch.save(selector, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    other = copied()
    assert repr(other) == repr(selector)
    assert other.backend == "reference" and other.training == training
    assert equal(outputs(selector, batch), outputs(other, batch))
    assert equal(selector.state_dict().values(), other.state_dict().values())
    with torch.no_grad():
        other.down.weight.zero_()
    assert selector.down.weight.any()


def test_a_copy_after_a_call_and_with_a_hook(batch):
    selector = trained()
    selector.pool(*batch)
    selector.up = Adapter(selector.up)
    assert equal(outputs(copy.deepcopy(selector), batch), outputs(selector, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("replaced", [False, True])
def test_conversion(dtype, replaced, batch):
    """Whatever the parameters are held in, the gate is computed in float32 from them."""
    selector = trained(torch.float32).to(dtype)
    rounded = copy.deepcopy(selector).float()
    if replaced:
        selector.down.register_forward_hook(lambda *args: None)
    hidden_states = [u.to(dtype) for u in batch.hidden_states]
    gates = selector.gates(hidden_states, batch.attention_mask)
    assert gates.dtype == torch.float32
    if not replaced:
        assert_close(gates, rounded.gates(hidden_states, batch.attention_mask), 1e-6)
    for out in (selector(hidden_states, batch.attention_mask), selector.pool(hidden_states, batch.attention_mask)):
        assert out.dtype == dtype and out.isfinite().all()


def test_repr_tells_the_options():
    text = repr(S2SentSelector(D, N, H, M, block_prior=True, activation="relu"))
    for part in (f"hidden_size={D}", f"num_blocks={N}", f"frequencies={M}", "relu", "paper", "down", "up", "norm"):
        assert part in text


def test_inference_mode(batch):
    selector = trained()
    expected = outputs(selector, batch)
    with torch.inference_mode():
        assert equal(outputs(selector, batch), expected)


# ---------------------------------------------------------------- blockwise


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
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
    selector = trained(profile=profile, block_prior=profile == "paper")
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
    assert_close(stream.result(), selector.pool(*batch).detach(), 1e-13)  # what failed left nothing behind


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
    """Parameters that require a gradient do not make it something to differentiate."""
    selector = trained()
    if changed:
        selector.up = Adapter(selector.up)
    stream = selector.blockwise(batch.attention_mask)
    for block, hidden_state in enumerate(batch.hidden_states):
        stream.add(block, hidden_state)
    assert not stream.result().requires_grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["forward", "pool", "gates"])
@pytest.mark.parametrize("bad", [{"attention_mask": [[1] * 4] * 3}, {"cu_seqlens": "a"}, {"hidden_states": "ab"}])
def test_bad_types_are_named_in_every_mode(training, method, bad):
    selector = S2SentSelector(8, 2, 4, 2).train(training)
    arguments = {"hidden_states": [torch.randn(3, 4, 8) for _ in range(2)]} | bad
    with pytest.raises(TypeError, match=next(iter(bad))):
        getattr(selector, method)(**arguments)


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
