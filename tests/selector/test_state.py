"""S2SentSelector as a module: its state, copies and conversions."""

import copy
import io
import pickle

import pytest
import torch
from builders import assert_close
from small import Adapter, D, H, M, N, equal, outputs, trained
from torch import nn

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector

GATE = ["down.weight", "down.bias", "up.weight", "up.bias"]
NORM = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
SHAPES = {
    "down.weight": [H, D],
    "down.bias": [H],
    "up.weight": [N * D, H],
    "up.bias": [N * D],
    "norm.weight": [N * D],
    "norm.bias": [N * D],
    "norm.running_mean": [N * D],
    "norm.running_var": [N * D],
    "norm.num_batches_tracked": [],
    "block_prior": [N],
    "gate_scale": [],
}


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("prior, scale", [(False, None), (True, None), (True, 4.0), (False, -1)])
def test_state_dict(norm, prior, scale):
    selector = S2SentSelector(D, N, H, M, gate_norm=norm, block_prior=prior, gate_scale=scale)
    own = [*(["block_prior"] if prior else []), *(["gate_scale"] if scale else [])]
    expected = {*GATE, *(NORM if norm else []), *own}
    state = selector.state_dict()
    assert set(state) == expected
    assert {name: list(value.shape) for name, value in state.items()} == {name: SHAPES[name] for name in expected}
    trainable = {name for name, _ in selector.named_parameters()}
    assert trainable == {name for name in expected if "running" not in name and "tracked" not in name}
    assert (selector.block_prior is None) == (not prior) and (selector.gate_scale is None) == (scale is None)
    assert scale is None or selector.gate_scale.item() == scale


def test_parts_are_ordinary():
    selector = S2SentSelector(D, N, H, M)
    assert type(selector.down) is nn.Linear and type(selector.up) is nn.Linear and type(selector.norm) is nn.BatchNorm1d
    assert (selector.norm.eps, selector.norm.momentum) == (1e-6, 0.1)
    assert S2SentSelector(D, N, H, M, gate_norm=None).norm is None


def test_the_published_defaults():
    selector = S2SentSelector(768, 3)
    assert (selector.bottleneck, selector.frequencies, selector.profile, selector.backend) == (64, 4, "paper", "auto")
    assert (selector.gate_norm, selector.activation) == ("batch", "tanh")
    assert selector.block_prior is None and selector.gate_scale is None


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


def test_a_scale_of_one_is_the_papers_formula(batch):
    plain, scaled = trained(), trained(gate_scale=4.0)
    assert scaled.gate_scale.item() != 1 and not equal(outputs(plain, batch), outputs(scaled, batch))
    scaled.load_state_dict({**plain.state_dict(), "gate_scale": torch.ones(())})
    for a, b in zip(outputs(plain, batch), outputs(scaled, batch), strict=True):
        assert_close(a, b, 1e-14)


def test_a_state_without_the_scale_names_what_is_missing():
    plain, scaled = S2SentSelector(D, N, H, M), S2SentSelector(D, N, H, M, gate_scale=4.0)
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_scale"):
        scaled.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate_scale"):
        plain.load_state_dict(scaled.state_dict())


def test_a_selector_pickled_before_there_was_a_scale(batch):
    selector = trained(block_prior=True)
    expected = outputs(selector, batch)
    state = selector.__getstate__()
    state["_parameters"] = {name: p for name, p in state["_parameters"].items() if name != "gate_scale"}
    old = S2SentSelector.__new__(S2SentSelector)
    old.__setstate__(state)
    assert old.gate_scale is None and equal(outputs(old, batch), expected)


@pytest.mark.parametrize("scale", [None, 2.5, -3.0])
def test_a_folder_round_trip(scale, tmp_path, batch):
    selector = trained(block_prior=True, gate_scale=scale)
    selector.save_pretrained(tmp_path)
    other = S2SentSelector.from_pretrained(tmp_path)
    assert repr(other) == repr(selector) and equal(outputs(selector, batch), outputs(other, batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_folder_in_few_bits_is_opened_in_float32(dtype, tmp_path):
    selector = trained(block_prior=True, gate_scale=3.0).to(dtype)
    selector.save_pretrained(tmp_path)
    other = S2SentSelector.from_pretrained(tmp_path)
    assert other.down.weight.dtype == (dtype if dtype == torch.float64 else torch.float32)
    for name, tensor in selector.state_dict().items():
        assert torch.equal(tensor.to(other.state_dict()[name].dtype), other.state_dict()[name]), name


def test_state_dict_round_trip(batch):
    options = {"block_prior": True, "gate_scale": 4.0}
    selector, other = trained(**options), S2SentSelector(D, N, H, M, **options).double().eval()
    assert not equal(outputs(selector, batch), outputs(other, batch))
    assert not any(other.load_state_dict(selector.state_dict()))
    assert equal(outputs(selector, batch), outputs(other, batch))


def test_the_output_follows_from_the_functions(batch):
    """The module is the functions with its tensors."""
    selector = trained(block_prior=True, gate_scale=4.0, activation="relu")
    f, p = s2.squeeze(*batch, frequencies=M, pooling="mean")
    n = selector.norm
    tensors = (selector.down.weight, selector.down.bias, selector.up.weight, selector.up.bias)
    norm = (n.weight, n.bias, n.running_mean, n.running_var)
    parameters = s2.GateParameters(*tensors, *norm, selector.block_prior, selector.gate_scale)
    g = s2.gate(f, parameters, num_blocks=N, activation="relu")
    assert_close(selector.gates(*batch), g, 1e-14)
    assert_close(selector(*batch), s2.fuse(batch.hidden_states, g, batch.attention_mask), 1e-14)
    assert_close(selector.pool(*batch), (g * p).sum(1), 1e-14)


# ---------------------------------------------------------------- copies and conversions


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("training", [False, True])
def test_copies(how, training, batch):
    selector = trained(block_prior=True, gate_scale=4.0, activation="relu", backend="reference").train(training)

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
    """Whatever the parameters' dtype, the gate is computed in float32."""
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
    text = repr(S2SentSelector(D, N, H, M, block_prior=True, gate_scale=2.0, activation="relu"))
    for part in (
        "gate_scale=True",
        f"hidden_size={D}",
        f"num_blocks={N}",
        f"frequencies={M}",
        "relu",
        "paper",
        "down",
        "up",
        "norm",
    ):
        assert part in text


def test_inference_mode(batch):
    selector = trained()
    expected = outputs(selector, batch)
    with torch.inference_mode():
        assert equal(outputs(selector, batch), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["forward", "pool", "gates"])
@pytest.mark.parametrize("bad", [{"attention_mask": [[1] * 4] * 3}, {"cu_seqlens": "a"}, {"hidden_states": "ab"}])
def test_bad_types_are_named_in_every_mode(training, method, bad):
    selector = S2SentSelector(8, 2, 4, 2).train(training)
    arguments = {"hidden_states": [torch.randn(3, 4, 8) for _ in range(2)]} | bad
    with pytest.raises(TypeError, match=next(iter(bad))):
        getattr(selector, method)(**arguments)
