"""Folders of whole models with a file that is cut, changed, of another kind or absurd: one error in one line that names the
file, no code run, no memory spent."""

import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import killing
import pytest
from builders import save_encoder

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")

import torch

from s2sent_kernels import loading, parts, sources

DATA = Path(__file__).parents[1] / "data"
REMEDY = ": save or download the model again"


def load_encoder(folder):
    return parts.load_model(folder, torch.device("cpu"))


LOADS = {
    "sentence_transformer": loading.load_whole,
    "model": loading.load_saved,
    "classifier": loading.load_classifier,
    "encoder": load_encoder,
}
FILES = [
    ("sentence_transformer", "modules.json"),
    ("sentence_transformer", "config.json"),
    ("sentence_transformer", "model.safetensors"),
    ("sentence_transformer", "tokenizer.json"),
    ("sentence_transformer", "1_S2SentPooling/config.json"),
    ("sentence_transformer", "1_S2SentPooling/model.safetensors"),
    ("model", "config.json"),
    ("model", "model.safetensors"),
    ("classifier", "config.json"),
    ("classifier", "model.safetensors"),
    ("encoder", "config.json"),
    ("encoder", "model.safetensors"),
]


@pytest.fixture
def copied(tmp_path):
    def copy(name):
        if name == "encoder":
            save_encoder(tmp_path / name)
        else:
            shutil.copytree(DATA / name, tmp_path / name)
        if name == "classifier":  # its data has no tokenizer
            save_encoder(tmp_path / "other")
            for path in (tmp_path / "other").glob("*token*"):
                shutil.copy(path, tmp_path / name)
        return tmp_path / name

    return copy


def refused(name, folder, file):
    with pytest.raises(sources.LoadError) as caught:
        LOADS[name](str(folder))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"model {folder} cannot be loaded: {folder / file}: "), message
    assert message.endswith(REMEDY)
    return message


@pytest.mark.parametrize("name, file", FILES)
def test_cut_at_some_bytes(copied, name, file):
    folder = copied(name)
    path = folder / file
    content = path.read_bytes()
    for length in (0, 1, 9, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:length])
        refused(name, folder, file)


@pytest.mark.parametrize("name, file", FILES)
def test_other_content(tmp_path, copied, name, file):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = copied(name)
    path = folder / file
    for content in (b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, pickle.dumps(Trap()), b"\0" * 4096):
        path.write_bytes(content)
        refused(name, folder, file)
    torch.save({"weight": Trap()}, path)
    refused(name, folder, file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, file", [pair for pair in FILES if pair[1].endswith("model.safetensors")])
def test_bits_of_a_header(copied, name, file):
    """An error of one line, or a model: a key's bit makes another key, which the check of the names reports."""
    folder = copied(name)
    path = folder / file
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for place in [0, 1, 5, 7, 8, *range(9, length, length // 12)]:
        data = bytearray(content)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        try:
            LOADS[name](str(folder))
        except sources.LoadError as error:
            assert "\n" not in str(error)


SIZES = [
    ("sentence_transformer", "1_S2SentPooling/config.json", ("selector_arguments", "bottleneck")),
    ("sentence_transformer", "1_S2SentPooling/config.json", ("selector_arguments", "num_blocks")),
    ("model", "config.json", ("selector", "bottleneck")),
    ("model", "config.json", ("encoder_config", "vocab_size")),
    ("classifier", "config.json", ("selector", "bottleneck")),
    ("encoder", "config.json", ("vocab_size",)),
    ("encoder", "config.json", ("intermediate_size",)),
]


@pytest.mark.parametrize("name, file, keys", SIZES)
def test_absurd_sizes_cost_no_memory(copied, name, file, keys):
    folder = copied(name)
    LOADS[name](str(folder))  # imports cost some, too
    config = json.loads((folder / file).read_text())
    place = config
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = 50_000_000
    (folder / file).write_text(json.dumps(config))

    def measured():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        message = refused(name, folder, Path(file).with_name("model.safetensors"))
        assert "as the configuration says, got [" in message
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB

    killing.finished(measured)


# Without these files the folder would be taken for one of another kind.
KINDS = [("sentence_transformer", "modules.json"), ("classifier", "config.json")]


@pytest.mark.parametrize("name, file", [pair for pair in FILES if pair not in KINDS])
def test_a_directory_in_place_of_a_file(copied, name, file):
    folder = copied(name)
    (folder / file).unlink()
    (folder / file).mkdir()
    assert "Is a directory" in refused(name, folder, file)
