"""Commands that are killed at their file operations, and given again. Those of `s2sent encode` and of the trainers are in
tests/tools."""

import shutil

import killing
import pytest
import torch
from builders import pairs, save_encoder, sentences, write_examples

from s2sent_kernels.cli import main

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
if torch.cuda.is_available():
    pytest.skip("autograd has threads for GPUs, with which a process cannot be forked", allow_module_level=True)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


@pytest.fixture(params=["contrastive", "classification"])
def train(request, tmp_path, encoder):
    """The command of a frozen training, into ``place``."""
    path = tmp_path / "data.tsv"
    if request.param == "classification":
        path.write_text(
            "\n".join(["label\ttext", *(f"{int('moon' in text)}\t{text}" for text in sentences(24))]) + "\n"
        )
    else:
        write_examples(path, pairs(16))
    place = tmp_path / "place"
    arguments = ["train", "--freeze-encoder", "--task", request.param, "--data", path, "--model", encoder]
    arguments += ["--output", place / "out", "--cache", place / "cache", "--device", "cpu", "--epochs", 1]
    arguments += ["--learning-rate", "1e-3"] + (["--dropout", "0"] if request.param == "classification" else [])

    def run(*options):
        return main([*map(str, arguments), *options])

    run.place = place
    return run


def test_a_frozen_training_killed_at_file_operations(train):
    place = train.place
    place.mkdir()
    count = killing.operations(place, train)
    want = killing.contents(place)
    assert count > 15
    for step in killing.points(count):
        shutil.rmtree(place)
        place.mkdir()
        assert killing.killed_at(step, place, train)
        if not (place / "out").exists():
            assert train() == 0
        got = killing.contents(place)
        assert got.keys() == want.keys(), step
        # The cache's about.json and the selector's config.json have no times in them.
        assert got == want, step


def test_a_damaged_cache_is_one_line(train, capsys):
    assert train() == 0
    (cache,) = (path for path in (train.place / "cache").iterdir() if path.is_dir())
    path = cache / "frequencies.npy"
    content = path.read_bytes()

    def refused(*options):
        shutil.rmtree(train.place / "out", ignore_errors=True)
        capsys.readouterr()
        assert train(*options) == 2
        error = capsys.readouterr().err
        assert f"{path}: " in error and error.endswith(f": remove {cache}, and the cache is made again\n")
        assert not (train.place / "out").exists()

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("--verify-cache")
    path.write_bytes(content[:-1])
    refused()
    path.unlink()
    path.mkdir()
    refused()
    path.rmdir()
    path.write_bytes(content)
    assert train("--verify-cache") == 0


def test_verifying_needs_a_cache(tmp_path, capsys):
    assert main(["train", "--data", "x.tsv", "--output", str(tmp_path / "out"), "--verify-cache"]) == 2
    assert "--verify-cache: only with --freeze-encoder" in capsys.readouterr().err
