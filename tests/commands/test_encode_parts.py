"""`s2sent encode` into folders of parts: shards, `--finish`, several devices, Ray, links, models around their output, and what is
refused."""

import json
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from builders import save_model, sentences

pa = pytest.importorskip("pyarrow")
pytest.importorskip("sentence_transformers")

from pyarrow import parquet  # noqa: E402

from s2sent_kernels import files  # noqa: E402
from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.sentence_transformers import load  # noqa: E402
from s2sent_kernels.tools import encoding  # noqa: E402
from s2sent_kernels.tools.encoding import parts  # noqa: E402

TEXTS = sentences(10)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An encoder of 2 blocks and 16 features with a selector, as one SentenceTransformer."""
    root = tmp_path_factory.mktemp("encode")
    save_model(root)
    return root / "whole"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS))


def run(model, *arguments, device=("--device", "cpu")):
    return main(["encode", *map(str, arguments), "--model", str(model), *device])


def embeddings(folder):
    files = [part["file"] for part in json.loads((folder / "manifest.json").read_text())["parts"]]
    column = parquet.read_table([folder / file for file in files])["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def expected(model, rows):
    """What the model gives for parts of so many rows."""
    whole = load(model, device="cpu")
    return np.concatenate([whole.encode(TEXTS[i : i + rows]) for i in range(0, len(TEXTS), rows)])


def test_a_folder_by_shards(tmp_path, model, capsys):
    for number in ("1/2", "0/2"):
        assert run(model, "a.txt", "--output", "out/", "--part-rows", 4, "--shard", number) == 0
    assert capsys.readouterr().out == "wrote out/: shard 1 of 2, 4 texts\nwrote out/: shard 0 of 2, 6 texts\n"
    assert main(["encode", "--finish", "out/"]) == 0
    assert capsys.readouterr().out == "wrote out/manifest.json: 10 texts\n"
    np.testing.assert_array_equal(embeddings(tmp_path / "out"), expected(model, 4))
    capsys.readouterr()  # what loading the expected model said
    command = ["a.txt", "--output", "out/", "--part-rows", 4]
    assert run(model, *command) == 0 and main(["encode", "--finish", "out/"]) == 0
    assert capsys.readouterr().out == "out/: is finished already: 10 texts\n" * 2
    assert run(model, *command, "--shard", "1/2") == 0
    assert capsys.readouterr().out == "out/: is finished already: shard 1 of 2, 4 texts\n"
    damaged = sorted((tmp_path / "out").glob("part-*"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert run(model, *command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "wrote out/: 10 texts"


def test_a_finished_folder_is_not_replaced_unasked(tmp_path, model, capsys):
    assert run(model, "a.txt", "--output", "out/", "--part-rows", 4) == 0
    capsys.readouterr()
    assert run(model, "a.txt", "--output", "out/", "--part-rows", 5, "--normalize") == 2
    error = capsys.readouterr().err
    assert "out: is finished already, with other options (normalize false, not true, part-rows 4, not 5)" in error
    assert error.endswith(": name another --output, or --force throws it away\n") and error.count("\n") == 1
    (tmp_path / "a.txt").write_text("another\n")
    assert run(model, "a.txt", "--output", "out/", "--part-rows", 4) == 2
    error = capsys.readouterr().err
    assert "out: is finished already, with other inputs, 3 parts" in error and "name another --output" in error


def test_bad_rows_exit_2_without_a_manifest(tmp_path, model, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a cat"}\n{"text": 7}\n{"text": "a dog"}\n')
    assert run(model, "a.jsonl", "--output", "out/", "--part-rows", 1) == 2
    error = capsys.readouterr().err
    assert "1 of 3 parts could not be encoded: see " in error and error.count("\n") == 1
    assert json.loads((tmp_path / "out" / "failed.jsonl").read_text())["row"] == 2
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main(["encode", "--finish", "out"]) == 2
    assert "1 of 3 parts are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, options",
    [("one_process_a_device", ["--device", "cpu", "cpu"]), ("Cluster", ["--engine", "ray", "--workers", "3"])],
)
def test_other_engines_get_an_encoder_that_can_be_sent(tmp_path, model, monkeypatch, name, options):
    """The engines themselves are tested with encoders that load in no time; here none starts a process."""
    if name == "Cluster":
        pytest.importorskip("ray")
    seen = []

    def engine(make, *rest):
        seen.extend(rest)
        alone = encoding.in_this_process(pickle.loads(pickle.dumps(make))("cpu"))
        return types.SimpleNamespace(engine=alone) if name == "Cluster" else alone

    monkeypatch.setattr(encoding, name, engine)
    assert run(model, "a.txt", "--output", "out/", "--part-rows", 4, device=options) == 0
    np.testing.assert_array_equal(embeddings(tmp_path / "out"), expected(model, 4))
    assert seen == ([["cpu", "cpu"]] if name == "one_process_a_device" else [None, 3, None])


def test_ray_may_be_missing(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(model, "a.txt", "--output", "out/", device=["--engine", "ray"]) == 2
    assert files.installs("ray") in capsys.readouterr().err and os.listdir(tmp_path) == ["a.txt"]


def test_an_output_within_the_model_goes_on(tmp_path, model, capsys, monkeypatch):
    """What the command writes there is no part of the model."""
    folder = tmp_path / "model"
    load(model).save(str(folder))
    (folder / "LICENSE").symlink_to("nowhere")  # nor is this
    part = parts.Worker.part
    for output in ("model/out/", "model/a.parquet"):
        with monkeypatch.context() as patch:
            patch.setattr(parts.Worker, "part", lambda self, one: part(self, one) if one.number < 2 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(folder, "a.txt", "--output", output, "--part-rows", 4)
        assert run(folder, "a.txt", "--output", output, "--part-rows", 4) == 0
        assert "going on after 8 of 10 texts" in capsys.readouterr().out
    assert run(folder, "a.txt", "--output", "model/out/", "--part-rows", 4) == 0
    (folder / "config.json").touch()  # the model itself counts
    assert run(folder, "a.txt", "--output", "model/out/", "--part-rows", 4) == 2


def test_leftovers_of_a_killed_run_are_removed(tmp_path, model, capsys, monkeypatch):
    """It was killed when the output was there, and its parts still were."""
    with monkeypatch.context() as patch:
        patch.setattr("s2sent_kernels.tools.encoding.run._remove", lambda _: None)
        assert run(model, "a.txt", "--output", "a.npy") == 0
    assert (tmp_path / ".a.npy.parts").exists()
    assert run(model, "a.txt", "--output", "a.npy") == 2
    assert "it is there already" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "a.npy.json", "a.txt"]


def test_links_are_followed(tmp_path, model):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "0123").write_bytes((tmp_path / "a.txt").read_bytes())
    (tmp_path / "link.txt").symlink_to("store/0123")  # as in the cache of a hub: the link has the suffix
    (tmp_path / "store" / "real.npy").write_bytes(b"old")
    (tmp_path / "out.npy").symlink_to("store/real.npy")
    (tmp_path / "out").symlink_to("store/parts")
    (tmp_path / "store" / "parts").mkdir()
    assert run(model, "link.txt", "--output", "out.npy", "--force") == 0
    assert (tmp_path / "out.npy").is_symlink() and np.load(tmp_path / "store" / "real.npy").shape == (10, 16)
    assert run(model, "link.txt", "--output", "out/") == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "store" / "parts" / "manifest.json").exists()


def test_a_folder_of_inputs_and_float16(tmp_path, model):
    (tmp_path / "in").mkdir()
    parquet.write_table(pa.table({"text": TEXTS[:4]}), tmp_path / "in" / "b.parquet")
    (tmp_path / "in" / "c.csv").write_text("".join(f"{text}\n" for text in ["text", *TEXTS[4:]]))
    assert run(model, "in", "--output", "in/out/", "--output-dtype", "float16") == 0
    found = embeddings(tmp_path / "in" / "out")
    assert found.dtype == np.float16 and found.shape == (10, 16)
    assert run(model, "in", "--output", "in/out/", "--output-dtype", "float16") == 0  # the output is no input


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "expected files of texts and --output, or --finish FOLDER/ alone, got no files"),
        (["a.txt"], "--finish FOLDER/ alone, got no --output"),
        (["a.txt", "--finish", "out/"], "--finish: expected nothing beside the folder, got a.txt"),
        (["--finish", "out/", "--normalize"], "--finish: expected nothing beside the folder, got --normalize"),
        (
            ["--finish", "out/"],
            "--finish out/: expected the folder that shards were written into, there is no such folder",
        ),
        (["--finish", "a.txt"], "--finish a.txt: expected the folder that shards were written into, got a file"),
        (["--finish", "."], "expected a folder of parts, which shards were written into, got one without _plan.json"),
        (["a.txt", "--output", "out/", "--shard", "2/2"], "--shard: expected I/N with I from 0 to N - 1, got '2/2'"),
        (["a.txt", "--output", "out/", "--shard", "-1/2"], "--shard: expected one argument"),
        (["a.txt", "--output", "out/", "--shard", "one"], "--shard: expected I/N"),
        (["a.txt", "--output", "o.npy", "--shard", "0/2"], "--shard: expected a folder as --output"),
        (["a.txt", "--output", "out/", "--shard", "0/2", "--force"], "--shard: expected without --force"),
        (["-", "--output", "out/", "--shard", "0/2"], "--shard: expected files, which every shard can read"),
        (["-", "-", "--output", "out/"], "-: expected once"),
        (["a.txt", "--output", "out/", "--workers", "2"], "--workers: expected with --engine ray"),
        (["a.txt", "--output", "out/", "--address", "auto"], "--address: expected with --engine ray"),
        (["a.txt", "--output", "out/", "--gpus-per-worker", "0"], "--gpus-per-worker: expected with --engine ray"),
        (["a.txt", "--output", "out/", "--engine", "ray", "--device", "cpu"], "--device: expected with --engine local"),
        (
            ["a.txt", "--output", "out/", "--engine", "ray", "--gpus-per-worker", "1.5"],
            "--gpus-per-worker: expected a whole number of GPUs, or a part of one, got",
        ),
        (
            ["a.txt", "--output", "out/", "--engine", "ray", "--gpus-per-worker", "-1"],
            "--gpus-per-worker: expected a whole number of GPUs, or a part of one, got",
        ),
        (
            ["a.txt", "--output", "out/", "--engine", "ray", "--gpus-per-worker", "nan"],
            "--gpus-per-worker: expected a whole number of GPUs, or a part of one, got",
        ),
        (
            ["a.txt", "--output", "out/", "--output-dtype", "float16", "--precision", "binary"],
            "--output-dtype: expected",
        ),
        (["a.txt", "--output", "a.txt/"], "is not a directory that can be written to"),
        (["a.txt", "--output", "./"], "expected another folder than that of a.txt"),
    ],
)
def test_what_is_refused(tmp_path, capsys, options, message):
    assert main(["encode", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["a.txt"]


# ---------------------------------------------------------------- the encoder's dtype


def test_the_dtype_is_settled_before_a_run_and_in_its_key(tmp_path, model, monkeypatch, capsys):
    """Otherwise a run begun on one kind of device could go on in another dtype on another kind."""
    from s2sent_kernels import embedder

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    arguments = ["encode", "a.txt", "--model", str(model), "--output", "out/", "--part-rows", "4", "--device", "cpu"]
    assert main([*arguments, "--shard", "0/2"]) == 0
    monkeypatch.setattr(embedder, "usual_dtype", lambda device: torch.bfloat16)
    assert main([*arguments, "--shard", "1/2"]) == 2
    assert "the work of another run is kept" in capsys.readouterr().err
    assert main([*arguments, "--shard", "1/2", "--dtype", "float32"]) == 0
    kinds = iter((torch.bfloat16, torch.float32))
    monkeypatch.setattr(embedder, "usual_dtype", lambda device: next(kinds))
    assert main([*arguments[:-2], "--force", "--device", "cpu", "cpu"]) == 2
    assert (
        "--dtype: expected one for all of cpu, cpu, which are good at bfloat16 and float32" in capsys.readouterr().err
    )
