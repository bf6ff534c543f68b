"""Checkpoints of the authors' code."""

import pytest
import torch
from builders import table
from small import D, H, M, N, equal, outputs, trained

from s2sent_kernels import S2SentSelector

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


def test_a_path_is_no_state():
    with pytest.raises(TypeError, match=r"state_dict: expected a mapping from names to tensors, .* got str"):
        S2SentSelector.from_published("pytorch_model.bin")


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


@pytest.mark.parametrize(
    "key",
    [
        "dense_z.0.weight",
        "dense_z.0.bias",
        "dense_select_weights.0.0.weight",
        "dense_select_weights.2.0.bias",
        "dense_select_weights.1.0.weight",
        "dense_select_weights.1.1.weight",
        "dense_select_weights.2.0.weight",
        "dense_select_weights.2.1.running_var",
    ],
)
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


@pytest.mark.parametrize(
    "key, value",
    [
        ("dense_z.0.weight", torch.zeros(H)),
        ("dense_z.0.bias", torch.zeros(H + 1)),
        ("dense_select_weights.1.0.weight", torch.zeros(D, H + 1)),
        ("dense_select_weights.0.1.bias", torch.zeros(D - 1)),
    ],
)
def test_a_key_of_the_wrong_shape_is_named(key, value):
    state = published(trained(profile="official"))
    state[key] = value
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        S2SentSelector.from_published(state)


@table(
    "states, blocks, expected",
    [
        (13, 3, [9, 10, 11]),
        (13, 12, list(range(12))),
        (7, 6, list(range(6))),
        (2, 1, [0]),
        (25, 4, [20, 21, 22, 23]),
    ],
)
def test_published_blocks(states, blocks, expected):
    assert S2SentSelector.published_blocks(states, blocks) == expected
    assert S2SentSelector.published_blocks(states, blocks) == list(range(states))[-(blocks + 1) : -1]


def test_published_blocks_of_too_few():
    with pytest.raises(ValueError, match=r"num_hidden_states.*13.*12"):
        S2SentSelector.published_blocks(12, 12)
    with pytest.raises(ValueError, match="num_blocks"):
        S2SentSelector.published_blocks(12, 0)
