"""Bad batches: the exception's type, and a message that names the argument, what was expected and what was passed."""

import pytest
import torch
from builders import make_batch, make_parameters, pack
from refusals import B, D, H, L, N, each_raises, everything, raises, without

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector

# ---------------------------------------------------------------- hidden states


def test_good_input_passes(backend, batch):
    for call in everything(*batch, backend=backend).values():
        call()


@pytest.mark.parametrize("value", [torch.zeros(3, B, L, D), None, 3, "abc", iter([])])
def test_hidden_states_is_no_sequence(backend, value):
    if isinstance(value, str):
        return each_raises_type(value, "hidden_states", backend)
    parameters = make_parameters(N, D, H, torch.float32)
    for call in (
        lambda: s2.squeeze(value, backend=backend),
        lambda: s2.fuse(value, torch.rand(B, N, D), backend=backend),
        lambda: s2.select(value, parameters, backend=backend),
        lambda: s2.select_pool(value, parameters, backend=backend),
        lambda: S2SentSelector(D, N)(value),
        lambda: S2SentSelector(D, N).pool(value),
        lambda: S2SentSelector(D, N).gates(value),
    ):
        with raises(TypeError, "hidden_states", "sequence", type(value).__name__):
            call()


def test_a_stacked_tensor_is_told_how_to_be_a_sequence(batch):
    hidden_states, mask = batch
    with raises(TypeError, "hidden_states", "got a Tensor", "pass hidden_states.unbind()"):
        S2SentSelector(D, N).pool(torch.stack(hidden_states), mask)


def test_the_embeddings_among_hidden_states(batch):
    hidden_states, mask = batch
    with raises(ValueError, f"expected {N} tensors, one for each block, got {N + 1}", "pass hidden_states[1:]"):
        S2SentSelector(D, N).pool([hidden_states[0], *hidden_states], mask)
    with raises(ValueError, f"expected {N} tensors, one for each block, got {N - 1}") as caught:
        S2SentSelector(D, N).pool(hidden_states[1:], mask)
    assert "embeddings" not in str(caught.value)


ADDED = torch.zeros(B, L).masked_fill(torch.arange(L) > 2, -1e4)  # as attention adds it to its scores


def test_a_mask_that_attention_adds(backend, batch):
    hidden_states, _ = batch
    expected = ("attention_mask", "nonzero at real tokens", "negative numbers", "pass (attention_mask == 0)")
    floats = (ADDED, torch.where(ADDED < 0, torch.finfo(torch.float32).min, 0.0), ADDED.bfloat16())
    integers = (ADDED.long(), ADDED.int().clamp(min=-1), ADDED.clamp(min=-100).to(torch.int8))
    for mask in floats + integers:
        each_raises(everything(hidden_states, mask, backend=backend), ValueError, *expected)
        selector = S2SentSelector(D, N, backend=backend if backend == "reference" else "auto")
        each_raises(calls_of(selector.eval(), hidden_states, mask), ValueError, *expected)
        each_raises(calls_of(selector.train(), hidden_states, mask), ValueError, *expected)
    wanted = S2SentSelector(D, N).eval()
    by_bool, by_float = (calls_of(wanted, hidden_states, mask) for mask in (ADDED == 0, (ADDED == 0).float()))
    for name in by_bool:
        assert torch.equal(by_bool[name](), by_float[name]())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_values_are_judged_while_a_call_is_traced(backend, batch):
    """A trace keeps no check of plain PyTorch's: what is wrong is said when it is made."""
    hidden_states, _ = batch
    selector = S2SentSelector(D, N, backend=backend).eval().requires_grad_(False)

    def traced(u, **where):
        return torch.jit.trace(lambda *given: selector.pool(given, **where), tuple(u), check_trace=False)

    for mask in (ADDED, ADDED.long()):
        with raises(ValueError, "attention_mask", "negative numbers"):
            traced(hidden_states, attention_mask=mask)
    packed = [u.reshape(B * L, D) for u in hidden_states]
    with raises(ValueError, "cu_seqlens", f"expected to end at T = {B * L}, got {B * L + 1}"):
        traced(packed, cu_seqlens=torch.tensor([0, L, B * L + 1], dtype=torch.int32))


def calls_of(selector, hidden_states, mask):
    def blockwise():
        stream = selector.blockwise(mask)
        for block, u in enumerate(hidden_states):
            stream.add(block, u.detach())
        return stream.result()

    calls = {
        "forward": lambda: selector(hidden_states, mask),
        "pool": lambda: selector.pool(hidden_states, mask),
        "gates": lambda: selector.gates(hidden_states, mask),
        "gates_and_pooled": lambda: selector.gates_and_pooled(hidden_states, mask)[0],
    }
    return calls if selector.training else calls | {"blockwise": blockwise}


def each_raises_type(value, name, backend):
    with raises(TypeError, name, "tensor", type(value).__name__):
        s2.squeeze(value, backend=backend)


def test_a_hidden_state_is_no_tensor(backend, batch):
    hidden_states, mask = batch
    bad = [hidden_states[0], [1.0], hidden_states[2]]
    each_raises(everything(bad, mask, backend=backend), TypeError, "hidden_states[1]", "tensor", "list")


def test_no_hidden_states(backend):
    each_raises(everything([], backend=backend), ValueError, "hidden_states", "at least one", "none")


def test_tuples_are_sequences(backend, batch):
    hidden_states, mask = batch
    f, _ = s2.squeeze(tuple(hidden_states), mask, backend=backend)
    assert torch.equal(f, s2.squeeze(hidden_states, mask, backend=backend)[0])


@pytest.mark.parametrize(
    "other, expected, came",
    [
        (torch.zeros(B, L + 1, D), f"[{B}, {L}, {D}]", f"[{B}, {L + 1}, {D}]"),
        (torch.zeros(B, L, D, dtype=torch.float16), "torch.float32", "torch.float16"),
        (torch.zeros(B, L, D, device="meta"), "cpu", "meta"),
        (torch.zeros(B, D), f"[{B}, {L}, {D}]", f"[{B}, {D}]"),
    ],
)
def test_hidden_states_disagree(backend, batch, other, expected, came):
    bad = [batch.hidden_states[0], batch.hidden_states[1], other]
    each_raises(everything(bad, backend=backend), ValueError, "hidden_states[2]", expected, came)


@pytest.mark.parametrize("shape", [(B, L, D, 1), (D,), ()])
def test_hidden_states_of_the_wrong_rank(backend, shape):
    bad = [torch.zeros(shape)] * N
    each_raises(everything(bad, backend=backend), ValueError, "hidden_states[0]", "[B, L, D]", str(list(shape)))


def test_packed_hidden_states_without_cu_seqlens(backend):
    each_raises(
        everything([torch.zeros(7, D)] * N, backend=backend), ValueError, "hidden_states[0]", "cu_seqlens", f"[7, {D}]"
    )


def test_padded_hidden_states_with_cu_seqlens(backend, batch):
    calls = everything(batch.hidden_states, backend=backend, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))
    each_raises(calls, ValueError, "hidden_states[0]", "[T, D]", f"[{B}, {L}, {D}]")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_hidden_states_that_are_not_floating(backend, dtype):
    bad = [torch.zeros(B, L, D, dtype=dtype)] * N
    each_raises(everything(bad, backend=backend), TypeError, "hidden_states[0]", "floating", str(dtype))


def test_no_features(backend):
    bad = [torch.zeros(B, L, 0)] * N
    each_raises(everything(bad, frequencies=1, backend=backend), ValueError, "hidden", "positive", "0")


# ---------------------------------------------------------------- frequencies


def test_hidden_size_not_divisible(backend, batch):
    calls = without(everything(*batch, frequencies=5, backend=backend), "fuse")
    each_raises(calls, ValueError, "frequencies", "divisible", "12", "5")
    with raises(ValueError, "frequencies", "divisible", "12", "5"):
        S2SentSelector(12, N, frequencies=5)


def test_more_components_than_blocks_have(backend):
    hidden_states, _ = make_batch(2, B, L, 15, torch.float32, "none")
    each_raises(
        without(everything(hidden_states, frequencies=15, backend=backend), "fuse"),
        ValueError,
        "frequencies",
        "N = 2",
        "14",
        "M = 15",
    )
    with raises(ValueError, "frequencies", "N = 2", "14", "M = 15"):
        S2SentSelector(15, 2, frequencies=15)
    with raises(ValueError, "frequencies", "32", "M = 33"):
        S2SentSelector(33, 12, frequencies=33)


@pytest.mark.parametrize("frequencies", [3, 5, 6, 12, 32])
def test_official_components(backend, frequencies):
    hidden_states, _ = make_batch(N, B, L, 480, torch.float32, "none")
    calls = everything(hidden_states, frequencies=frequencies, profile="official", backend=backend)
    words = ("frequencies", "official", "(1, 2, 4, 8, 16)", str(frequencies))
    each_raises(without(calls, "fuse"), ValueError, *words)
    with raises(ValueError, "frequencies", "official", "(1, 2, 4, 8, 16)", str(frequencies)):
        S2SentSelector(480, N, frequencies=frequencies, profile="official")


@pytest.mark.parametrize("frequencies", [0, -1])
def test_frequencies_that_are_not_positive(backend, batch, frequencies):
    each_raises(
        without(everything(*batch, frequencies=frequencies, backend=backend), "fuse"),
        ValueError,
        "frequencies",
        str(frequencies),
    )


@pytest.mark.parametrize("frequencies", [1.0, "4", None, True])
def test_frequencies_of_the_wrong_type(batch, frequencies):
    each_raises(
        without(everything(*batch, frequencies=frequencies, backend="reference"), "fuse"),
        TypeError,
        "frequencies",
        "integer",
        type(frequencies).__name__,
    )
    with raises(TypeError, "frequencies", "integer", type(frequencies).__name__):
        S2SentSelector(D, N, frequencies=frequencies)


# ---------------------------------------------------------------- mask


@pytest.mark.parametrize("shape", [(B, L + 1), (B, L, 1), (B + 1, L), (L,), (B, 1)])
def test_mask_of_the_wrong_shape(backend, batch, shape):
    calls = everything(batch.hidden_states, torch.ones(shape), backend=backend)
    each_raises(calls, ValueError, "attention_mask", f"[{B}, {L}]", str(list(shape)))


def test_mask_of_the_wrong_type(backend, batch):
    calls = everything(batch.hidden_states, [[1] * L] * B, backend=backend)
    each_raises(calls, TypeError, "attention_mask", "tensor", "list")
    calls = everything(batch.hidden_states, torch.ones(B, L, dtype=torch.complex64), backend=backend)
    each_raises(calls, TypeError, "attention_mask", "bool", "complex64")


def test_mask_on_another_device(backend, batch):
    calls = everything(batch.hidden_states, torch.ones(B, L, device="meta"), backend=backend)
    each_raises(calls, ValueError, "attention_mask", "cpu", "meta")


def test_mask_and_cu_seqlens(backend, batch):
    packed, cu_seqlens = pack(*batch)
    calls = everything(packed, batch.attention_mask, cu_seqlens=cu_seqlens, backend=backend)
    each_raises(calls, ValueError, "attention_mask", "cu_seqlens", "both")


# ---------------------------------------------------------------- cu_seqlens


@pytest.mark.parametrize(
    "values, words",
    [
        ([1, 5, 20], ("start at 0", "1")),
        ([0, 12, 7, 20], ("not to decrease", "12 then 7")),
        ([0, 5, 19], ("end at T = 20", "19")),
        ([0, 5, 21], ("end at T = 20", "21")),
        ([0], ("end at T = 20", "0")),
        ([-1, 20], ("start at 0", "-1")),
    ],
)
def test_contents_of_cu_seqlens(backend, values, words):
    packed = [torch.randn(20, D) for _ in range(N)]
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    calls = everything(packed, cu_seqlens=cu_seqlens, backend=backend)
    if len(values) != B + 1:
        calls.pop("fuse")
    each_raises(calls, ValueError, "cu_seqlens", *words)
    gates = torch.rand(len(values) - 1, N, D)
    with raises(ValueError, "cu_seqlens", *words):
        s2.fuse(packed, gates, cu_seqlens=cu_seqlens, backend=backend)
    selector = S2SentSelector(D, N, H, backend=backend).eval()
    for call in (selector, selector.pool, selector.gates):
        with raises(ValueError, "cu_seqlens", *words):
            call(packed, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("values, words", [([1, 20], ("start at 0",)), ([0, 21], ("end at T = 20",))])
def test_contents_of_cu_seqlens_inside_the_ops(values, words):
    packed, ops = [torch.randn(20, D) for _ in range(N)], torch.ops.s2sent
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    parameters = make_parameters(N, D, H, torch.float32)
    for call in (
        lambda: ops.squeeze(packed, None, cu_seqlens, 4, "paper", None, "reference"),
        lambda: ops.fuse(packed, None, cu_seqlens, torch.rand(1, N, D), "reference"),
        lambda: ops.select(packed, None, cu_seqlens, *parameters, 4, "tanh", 1e-6, "reference"),
        lambda: ops.select_pool(packed, None, cu_seqlens, *parameters, 4, "mean", "tanh", 1e-6, "reference"),
    ):
        with raises(ValueError, "cu_seqlens", *words):
            call()


@pytest.mark.parametrize(
    "bad, kind, words",
    [
        ([0, 20], TypeError, ("tensor", "list")),
        (torch.tensor([0, 20]), TypeError, ("torch.int32", "torch.int64")),
        (torch.tensor([0.0, 20.0]), TypeError, ("torch.int32", "torch.float32")),
        (torch.tensor([[0, 20]], dtype=torch.int32), ValueError, ("[B + 1]", "[1, 2]")),
        (torch.tensor([], dtype=torch.int32), ValueError, ("[B + 1]", "[0]")),
        (torch.tensor([0, 20], dtype=torch.int32, device="meta"), ValueError, ("cpu", "meta")),
    ],
)
def test_cu_seqlens_of_the_wrong_kind(backend, bad, kind, words):
    packed = [torch.randn(20, D) for _ in range(N)]
    each_raises(everything(packed, cu_seqlens=bad, backend=backend), kind, "cu_seqlens", *words)


# ---------------------------------------------------------------- ops that are called directly


@pytest.mark.parametrize("name", ["select", "select_pool", "squeeze", "fuse"])
@pytest.mark.parametrize("backend", ["reference", "native", "triton", "auto"])
def test_ops_judge_tensors_before_they_choose_an_engine(name, backend):
    parameters = make_parameters(N, D, H, torch.float32)
    rest = {
        "select": (*parameters, 4, "tanh", 1e-6, backend),
        "select_pool": (*parameters, 4, "mean", "tanh", 1e-6, backend),
        "squeeze": (4, "paper", None, backend),
        "fuse": (torch.rand(B, N, D), backend),
    }[name]
    call = getattr(torch.ops.s2sent, name)
    with raises(TypeError, "hidden_states[0]", "floating", "torch.int32"):
        call([torch.zeros(B, L, D, dtype=torch.int32)] * N, None, None, *rest)
    with raises(ValueError, "hidden_states[0]", "[B, L, D]"):
        call([torch.zeros(B, D)] * N, None, None, *rest)


@pytest.mark.parametrize("name", ["select", "select_pool"])
def test_ops_without_hidden_states(name):
    """With no tensor in the list the gate's parameters find the op."""
    parameters = make_parameters(N, D, H, torch.float32)
    pooling = ("mean",) if name == "select_pool" else ()
    with raises(ValueError, "hidden_states", "at least one", "none"):
        getattr(torch.ops.s2sent, name)([], None, None, *parameters, 4, *pooling, "tanh", 1e-6, "reference")


@pytest.mark.parametrize("word", ["profile", "pooling"])
def test_backward_ops_judge_words(word):
    words = {"profile": "paper", "pooling": "mean"} | {word: "abacus"}
    pooled, device = torch.rand(B, 1, D), torch.device("cpu")
    arguments = (None, pooled, None, None, [B, L, D], torch.float32, device, [True], None, None, 4)
    with raises(ValueError, word, "abacus"):
        torch.ops.s2sent.squeeze_backward(*arguments, *words.values(), "reference")
