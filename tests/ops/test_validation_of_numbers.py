"""Bad numbers, flags and tensors without strides: one exception in one wording, whoever is called and on every backend; and a
right value of each."""

import pytest
import torch
from builders import make_batch, make_parameters
from refusals import B, D, H, L, N, each_raises, everything, raises, without

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector

BACKENDS = [name for name, status in s2.backends().items() if status.usable and name != "triton"]
NAN, INF = float("nan"), float("inf")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def gated(batch, backend, **options):
    """The functions that have a gate."""
    calls = without(everything(*batch, backend=backend, **options), "fuse", "squeeze")
    parameters = make_parameters(N, D, H, torch.float32)
    calls["gate"] = lambda: s2.gate(torch.rand(B, D), parameters, num_blocks=N, backend=backend, **options)
    return calls


@every_backend
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "bad", "kind", "words"),
    [
        *[("eps", bad, TypeError, "number") for bad in ("1e-6", None, 1j, True, [1.0])],
        *[("eps", bad, ValueError, "number") for bad in (NAN, INF, -1e-6)],
        *[("momentum", bad, TypeError, "number") for bad in ("0.1", None, True)],
        *[("momentum", bad, ValueError, "from 0 to 1") for bad in (NAN, -0.1, 1.5, INF)],
    ],
)
def test_numbers_of_the_norm(batch, backend, training, name, bad, kind, words):
    each_raises(gated(batch, backend, training=training, **{name: bad}), kind, name, words)
    if name == "eps" and training:
        each_raises(gated(batch, backend, training=True, eps=0), ValueError, "eps", "positive number", "0")
    least = (
        1e-300 if name == "eps" else 0
    )  # the least that every release of torch takes, too; an integer where one is right
    for call in gated(batch, backend, training=training, **{name: least}).values():
        assert call().isfinite().all()


@every_backend
@pytest.mark.parametrize("bad", ["no", None, 1, 0, torch.tensor(True)])
def test_training_is_true_or_false(batch, backend, bad):
    each_raises(gated(batch, backend, training=bad), TypeError, "training", "True or False", type(bad).__name__)


@every_backend
@pytest.mark.parametrize(("name", "bad"), [("eps", -1.0), ("eps", NAN), ("momentum", 2.0), ("momentum", -1.0)])
def test_numbers_of_a_modules_norm(batch, backend, name, bad):
    selector = S2SentSelector(D, N, H, backend=backend)
    selector.pool(*batch)
    counted, mean = selector.norm.num_batches_tracked.clone(), selector.norm.running_mean.clone()
    setattr(selector.norm, name, bad)
    for call in (selector.pool, selector.forward, selector.gates):
        with raises(ValueError, name, "expected", str(bad)):
            call(*batch)
    assert torch.equal(selector.norm.running_mean, mean)
    if name == "momentum":
        assert torch.equal(selector.norm.num_batches_tracked, counted)  # refused before it is counted
        selector.norm.momentum = None  # a cumulative average
        assert selector.pool(*batch).isfinite().all()


@pytest.mark.parametrize("bad", ["no", "", 1, 0, None, 2.0])
def test_the_block_prior_is_on_or_off(bad):
    with raises(TypeError, "block_prior", "True or False", type(bad).__name__):
        S2SentSelector(D, N, H, block_prior=bad)
    assert S2SentSelector(D, N, H, block_prior=True).block_prior is not None


@every_backend
@pytest.mark.parametrize("bad", [2**63, 2**64])
def test_integers_that_no_operator_takes(batch, backend, bad):
    calls = without(everything(*batch, frequencies=bad, backend=backend), "fuse")
    each_raises(calls, ValueError, "frequencies", "64 bits")
    with raises(ValueError, "gate_scale", "float"):
        S2SentSelector(D, N, H, gate_scale=2**1024)
    each_raises(gated(batch, backend, eps=2**1024), ValueError, "eps", "float")
    each_raises(gated(batch, backend, momentum=2**1024, training=True), ValueError, "momentum", "float")


def without_strides(tensor):
    found = {
        "sparse_coo": tensor.to_sparse(),
        "nested": torch.nested.nested_tensor(list(tensor)),
        "quantised": torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    }
    return found if tensor.is_floating_point() else {name: found[name] for name in ("sparse_coo", "nested")}


@every_backend
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [False, True])
def test_tensors_without_strides(batch, backend, grad):
    parameters, gates = make_parameters(N, D, H, torch.float32), torch.rand(B, N, D)
    selector = S2SentSelector(D, N, H, backend=backend).eval()
    for _ in range(2):  # the second time the module knows such calls
        selector.pool(*batch)
    with torch.set_grad_enabled(grad):
        for kind, bad in without_strides(batch.hidden_states[1]).items():
            states = [batch.hidden_states[0], bad, batch.hidden_states[2]]
            each_raises(everything(states, batch.attention_mask, backend=backend), TypeError, "hidden_states[1]", kind)
            for call in (selector.pool, selector.forward, selector.gates):
                with raises(TypeError, "hidden_states[1]", "dense", kind):
                    call(states, batch.attention_mask)
        for kind, bad in without_strides(batch.attention_mask).items():
            each_raises(everything(batch.hidden_states, bad, backend=backend), TypeError, "attention_mask", kind)
            for call in (selector.pool, selector.forward, selector.gates):
                with raises(TypeError, "attention_mask", "dense", kind):
                    call(batch.hidden_states, bad)
            with raises(TypeError, "attention_mask", "dense", kind):
                selector.blockwise(bad)
        for kind, bad in without_strides(gates).items():
            with raises(TypeError, "gates", "dense", kind):
                s2.fuse(batch.hidden_states, bad, backend=backend)
        for kind, bad in without_strides(torch.rand(B, D)).items():
            with raises(TypeError, "squeezed", "dense", kind):
                s2.gate(bad, parameters, num_blocks=N, backend=backend)
        for kind, bad in without_strides(parameters.up_weight).items():
            with raises(TypeError, "up_weight", "dense", kind):
                s2.gate(torch.rand(B, D), parameters._replace(up_weight=bad), num_blocks=N, backend=backend)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_blocks_without_strides(batch):
    stream = S2SentSelector(D, N, H).eval().blockwise(batch.attention_mask)
    for kind, bad in without_strides(batch.hidden_states[0]).items():
        with raises(TypeError, "hidden_state", "dense", kind):
            stream.add(0, bad)
    with raises(TypeError, "attention_mask", "tensor or None", "str"):
        S2SentSelector(D, N, H).blockwise("mask")


@every_backend
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_ops_judge_what_they_receive(backend, device):
    """On "meta" one wrong tensor sends the whole call to the fake, which has to judge as the implementation does."""
    hidden_states = make_batch(N, B, L, D, torch.float32, "none").hidden_states
    parameters = make_parameters(N, D, H, torch.float32)
    squeezed, gates, eps = torch.rand(B, D), torch.rand(B, N, D), ("tanh", 1e-6, backend)
    space = torch.ops.s2sent

    def bad(tensor):
        return tensor.to("meta") if device == "meta" else tensor.long()

    calls = {
        "grad_fused": lambda new: space.fuse_backward(new(torch.rand(B, L, D)), hidden_states, None, None, backend),
        "grad_gates": lambda new: space.gate_backward.scaled(new(gates), squeezed, *parameters, *eps),
        "pooled": lambda new: space.gate_pool_backward.scaled(squeezed, squeezed, new(gates), *parameters, *eps),
        "grad_output": lambda new: space.gate_pool_backward.scaled(new(squeezed), squeezed, gates, *parameters, *eps),
        "grad_squeezed": lambda new: space.squeeze_backward(
            new(squeezed),
            None,
            None,
            None,
            [B, L, D],
            torch.float32,
            torch.device("cpu"),
            [True] * N,
            None,
            None,
            2,
            "paper",
            None,
            backend,
        ),
    }
    for name, call in calls.items():
        call(lambda tensor: tensor)
        with raises(*((ValueError, name, "cpu", "meta") if device == "meta" else (TypeError, name, "floating"))):
            call(bad)
