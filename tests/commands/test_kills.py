"""Commands that are killed at their file operations, and given again. Those of `s2sent encode` and of the trainers are in
tests/tools."""

import os
import re
import shutil

import killing
import pytest
import torch
from builders import pairs, save_encoder, sentences, write_examples

from s2sent_kernels import cache, files
from s2sent_kernels.cli import main
from s2sent_kernels.commands import train_task
from s2sent_kernels.tools import resuming

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
def train(request, tmp_path, encoder, monkeypatch):
    """The command of a frozen training, into ``place``."""
    if request.param == "classification":
        pytest.importorskip("datasets")
    monkeypatch.setattr(cache, "RECORD_SECONDS", 1e9)  # equal runs have equal file operations
    path = tmp_path / "data.tsv"
    texts = {*sentences(24)} if request.param == "classification" else {text for pair in pairs(16) for text in pair}
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

    run.place, run.batches, run.kind = place, -(-len(texts) // 4), request.param
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


def test_a_frozen_training_goes_on(train, capsys, monkeypatch):
    """With --resume or without: what was encoded is not encoded again, and a finished result is left alone."""
    monkeypatch.setattr(cache, "DEFAULT", cache.DEFAULT._replace(batch_size=4))
    monkeypatch.setattr(cache, "RECORD_EVERY", 1)
    plain, calls = cache._summaries, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(cache, "_summaries", interrupted)
    assert train("--resume") == 130
    made, size, kept, said, error = capsys.readouterr().err.splitlines()
    assert made == f"{train.place}: there is no such folder yet: it will be made"
    folder, total = train.place / "cache", int(re.match(r"cache: (\d+) texts x ", size)[1])
    assert kept == f"cache: 8 of {total} texts are encoded and kept in {folder}" and total > 8
    assert said == f"the same command goes on after what is encoded and kept in {folder}, with --resume or without"
    assert error == "s2sent: error: interrupted" and [path.name for path in train.place.iterdir()] == ["cache"]
    assert train("--resume") == 0
    assert len(calls) == train.batches + 1  # the third one ran again
    size, on = capsys.readouterr().err.splitlines()
    assert on == f"cache: going on after 8 of {total} texts"
    before = killing.contents(train.place)
    assert resuming.finished_frozen(train.place / "out")
    assert train("--resume") == 0
    assert capsys.readouterr().out == f"{train.place / 'out'}: the model is finished\n"
    assert train() == 2 and "it is there already and not empty" in capsys.readouterr().err
    if train.kind == "contrastive":  # it is no classifier because it is finished
        assert train("--resume", "--task", "classification") == 2
        said = "out: expected a classifier, encoder and selector included, got a selector: name another"
        assert said in capsys.readouterr().err
    assert killing.contents(train.place) == before
    shutil.rmtree(train.place / "out")
    monkeypatch.setattr(cache, "_summaries", plain)
    assert train() == 0 and killing.contents(train.place) == before


def test_a_frozen_training_that_is_interrupted_before_its_first_record(train, capsys, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_summaries", interrupted)
        assert train() == 130
    assert "cache: 0 of " in capsys.readouterr().err
    assert train() == 0
    assert "going on" not in capsys.readouterr().err


def test_epochs_behind_a_frozen_encoder_begin_again(train, capsys, monkeypatch):
    """They last seconds. What is kept is said."""

    def interrupted(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_task.Epochs, "__call__", interrupted)
        assert train() == 130
    said, error = capsys.readouterr().err.splitlines()[-2:]
    what = f"all texts are encoded and kept in {train.place / 'cache'}: the same command begins with the first epoch"
    assert said == f"{what}, with --resume or without" and error == "s2sent: error: interrupted"
    monkeypatch.setattr(cache, "_summaries", interrupted)
    assert train() == 0


def test_another_training_into_the_same_folder_is_refused(train, capsys, monkeypatch):
    plain, codes = cache.make, []

    def make(*given, **options):
        codes.append(len(codes) or train())
        return plain(*given, **options)

    monkeypatch.setattr(cache, "make", make)
    (train.place / "out").mkdir(parents=True)
    assert train() == 0
    assert codes[0] == 2
    error, size = capsys.readouterr().err.splitlines()
    assert f"{train.place / 'out'}: another process is writing there" in error and size.startswith("cache: ")
    assert sorted(path.name for path in train.place.iterdir()) == ["cache", "out"]


def test_a_killed_one_leaves_no_folder_that_is_not_empty(train, monkeypatch):
    """Also where the folder itself cannot be replaced, and its files are made in it."""
    place = train.place / "out"
    place.mkdir(parents=True)
    monkeypatch.setattr(files.os.path, "ismount", lambda path: str(path) == str(place.resolve()))

    def killed():
        monkeypatch.setattr(cache, "make", lambda *_, **__: os._exit(killing.KILLED))
        train()

    with pytest.raises(AssertionError):
        killing.finished(killed)
    assert [path.name[:5] for path in place.iterdir()] == [".out."]
    assert train() == 0 and resuming.finished_frozen(place)
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


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


def test_what_an_interrupted_full_training_keeps_is_said(tmp_path, monkeypatch, capsys):
    """And how to go on, once there is a checkpoint."""
    from s2sent_kernels.commands import train_pairs

    (tmp_path / "pairs.tsv").write_text("anchor\tpositive\na\tb\nc\td\n")

    def interrupt(task):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_pairs, "run", interrupt)
    arguments = ["train", "--data", str(tmp_path / "pairs.tsv"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    for begun, said in ((False, "nothing is kept"), (True, "the same command with --resume goes on")):
        monkeypatch.setattr(resuming, "begun", lambda output, begun=begun: begun)
        assert main(arguments) == 130
        lines = capsys.readouterr().err.splitlines()
        assert said in lines[0] and lines[1:] == ["s2sent: error: interrupted"]
    monkeypatch.setattr(resuming, "begun", lambda output: False)
    for options, said in (
        ([], "after 10 minutes, or at the end of an epoch"),
        (["--save-minutes", "2.5"], "after 2.5 minutes, or at the end of an epoch"),
        (["--save-minutes", "0"], "at the end of an epoch"),
    ):
        assert main([*arguments, *options]) == 130
        assert f"nothing is kept: the first checkpoint is written {said}\n" in capsys.readouterr().err
