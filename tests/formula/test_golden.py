"""Every golden file in both directions: what the published module and the paper's formula gave in float64."""

from pathlib import Path

import pytest
import torch
from builders import through_ops
from safetensors import safe_open

from s2sent_kernels import S2SentSelector

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
RELATIVE = 1e-10  # of the tensor's largest magnitude
ABSOLUTE = 1e-14  # for gradients that are zero up to rounding


def load(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def assert_golden(name, actual, expected):
    assert actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype, name
    if expected.numel() == 0:
        return
    error = (actual - expected).abs().max().item()
    bound = max(RELATIVE * expected.abs().max().item(), ABSOLUTE)
    assert error <= bound, f"{name}: error {error:.3g} over {bound:.3g}"


def numbered(tensors, prefix):
    count = sum(key.startswith(prefix) for key in tensors)
    return [tensors[f"{prefix}{index}"] for index in range(count)]


def selector_of(tensors, meta):
    state = {key[len("state.") :]: value for key, value in tensors.items() if key.startswith("state.")}
    if meta["profile"] == "official":
        return S2SentSelector.from_published(state)
    selector = S2SentSelector(
        int(meta["hidden_size"]),
        int(meta["num_blocks"]),
        int(meta["bottleneck"]),
        int(meta["frequencies"]),
        gate_norm="batch" if meta["gate_norm"] == "batch" else None,
        block_prior=meta["block_prior"] == "True",
        activation=meta["activation"],
    ).double()
    selector.load_state_dict(state, strict=False)
    missing = selector.state_dict().keys() - state.keys()
    assert missing <= {"norm.num_batches_tracked"}
    return selector


def published_name(name, num_blocks):
    """This project's tensor under which published keys, with the slice of it that each holds."""
    part, kind = name.split(".")
    if part == "down":
        return [(f"dense_z.0.{kind}", None)]
    place = "0" if part == "up" else "1"
    return [(f"dense_select_weights.{n}.{place}.{kind}", n) for n in range(num_blocks)]


def check_parameters(prefix, actual, tensors, meta):
    """``actual`` maps this project's names to tensors; the golden file holds them under its own names."""
    num_blocks = int(meta["num_blocks"])
    seen = set()
    for name, value in actual.items():
        keys = [(name, None)] if meta["profile"] == "paper" else published_name(name, num_blocks)
        for key, block in keys:
            full = f"{prefix}.{key}"
            if full not in tensors:
                continue
            part = value if block is None or value.dim() == 0 else value.chunk(num_blocks)[block]
            assert_golden(full, part, tensors[full])
            seen.add(full)
    expected = {key for key in tensors if key.startswith(prefix + ".") and not key.startswith("grad.hidden_states")}
    assert seen == expected


@pytest.mark.parametrize("backend", ["reference", "op"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, backend, monkeypatch):
    tensors, meta = load(path)
    selector = selector_of(tensors, meta).train(meta["mode"] == "train")
    selector.backend = "reference"
    if backend == "op":  # the same through torch.ops.s2sent, whose backward is written out instead of recorded
        selector.backend = through_ops(monkeypatch)
    hidden_states = [u.requires_grad_() for u in numbered(tensors, "hidden_states.")]
    num_blocks = int(meta["num_blocks"])
    blocks = range(num_blocks)
    if meta["profile"] == "official":
        blocks = S2SentSelector.published_blocks(len(hidden_states), num_blocks)
    chosen = [hidden_states[block] for block in blocks]
    mask = tensors.get("attention_mask")
    pooling = meta.get("pooling", "none")

    if meta["mode"] == "eval":
        with torch.no_grad():
            squeezed = squeeze_of(selector, chosen, mask, pooling, tensors)
            assert_golden("squeezed", squeezed, tensors["squeezed"])
            if "gates" in tensors:
                assert_golden("gates", selector.gates(chosen, mask), tensors["gates"])

    if pooling == "none":
        output = selector(chosen, mask)
    else:
        output = selector.pool(chosen, mask, pooling=pooling)
    assert_golden("output", output, tensors["output"])

    output.backward(tensors["grad_output"])
    for index, (u, expected) in enumerate(zip(hidden_states, numbered(tensors, "grad.hidden_states."), strict=True)):
        if index in blocks:
            assert_golden(f"grad.hidden_states.{index}", u.grad, expected)
        else:
            assert u.grad is None and not expected.any()
    grads = {name: parameter.grad for name, parameter in selector.named_parameters()}
    check_parameters("grad", grads, tensors, meta)
    if meta["mode"] == "train":
        check_parameters("state_after", dict(selector.named_buffers()), tensors, meta)


def squeeze_of(selector, hidden_states, mask, pooling, tensors):
    from s2sent_kernels import squeeze

    squeezed, pooled = squeeze(
        hidden_states,
        mask,
        frequencies=selector.frequencies,
        profile=selector.profile,
        pooling=None if pooling == "none" else pooling,
        backend="reference",
    )
    if "pooled_blocks" in tensors:
        assert_golden("pooled_blocks", pooled, tensors["pooled_blocks"])
    return squeezed


def test_the_golden_files_are_there():
    assert len(GOLDEN) == 13
