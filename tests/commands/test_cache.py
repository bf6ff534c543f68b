"""`s2sent cache`: what frozen training keeps, how large it will be and is, and how it is removed."""

import json
import re

import pytest
from builders import pairs, save_encoder, write_examples

pytest.importorskip("transformers")

from s2sent_kernels import cache, cache_files
from s2sent_kernels.cli import main
from s2sent_kernels.files import locked


def train(output):
    command = "train --freeze-encoder --data data.tsv --model encoder --device cpu --epochs 1 --batch-size 4 --output"
    assert main([*command.split(), output]) == 0


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """A folder with the cache of a training; and what the training said."""
    monkeypatch.chdir(tmp_path)
    save_encoder("encoder")
    write_examples(tmp_path / "data.tsv", pairs(8))
    train("out")
    return capsys.readouterr().err


def caches():
    return cache_files.kept(cache_files.Path("s2sent_cache"))


def test_the_size_is_said_before_the_cache_is_made(tmp_path, trained):
    """As the files have it, but for their headers."""
    (one,) = caches()
    arrays = json.loads((one.folder / "about.json").read_text())["arrays"]
    texts, blocks, frequencies, features = arrays["frequencies"]["shape"]
    said = re.search(r"cache: (\d+) texts x (\d+) blocks x (\d+) features, (.*), in s2sent_cache/(\w+)\n", trained)
    assert [int(said[i]) for i in (1, 2, 3)] == [texts, blocks, features] and said[5] == one.name
    size = cache_files.size_of(texts, blocks, features, frequencies, False)
    assert said[4] == cache_files.in_words(size)
    headers = 128 * len(arrays)
    assert size == sum(path.stat().st_size for path in one.folder.glob("*.npy")) - headers


def test_a_cache_that_is_there_is_told_instead(trained, capsys):
    train("again")
    (one,) = caches()
    there = f"cache: all {one.texts} texts are in {one.folder} already"
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("cache: ")] == [there]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sizes_of_both_kinds(tmp_path, pooling, capsys):
    from builders import make_encoder_and_tokenizer

    encoder, tokenizer = make_encoder_and_tokenizer()
    settings = cache.DEFAULT._replace(pooling=pooling)
    made = cache.make(encoder, tokenizer, ["a cat", "the dog"], tmp_path, settings, progress=True)
    size = cache_files.size_of(2, len(made.blocks), made.hidden_size, 2, pooling != "mean")
    files = list(made.folder.glob("*.npy"))
    assert size == sum(path.stat().st_size for path in files) - 128 * len(files)
    assert cache_files.in_words(size) in capsys.readouterr().err


def test_bytes_in_words():
    words = [cache_files.in_words(size) for size in (7, 1000, 15360, 311_000_000, 2_500_000_000)]
    assert words == ["7 bytes", "1.0 kB", "15.4 kB", "311 MB", "2.5 GB"]


def test_they_are_listed(trained, capsys):
    (one,) = caches()
    (one.folder.parent / f".{'0' * 20}.part").mkdir()
    (one.folder.parent / "mine").mkdir()
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("0" * 20) and "not complete" in lines[0]
    assert lines[1].startswith(one.name) and lines[1].endswith("16 texts, blocks 0, 1, mean, 256 tokens")
    assert lines[2].startswith("s2sent_cache: 2 caches, ")
    assert main(["cache", "list", "--cache", "nowhere"]) == 0
    assert capsys.readouterr().out == "no caches in nowhere\n"
    assert main(["cache", "clear", "--all", "--cache", "nowhere"]) == 0
    assert capsys.readouterr().out == "no caches in nowhere\n"


def test_they_are_removed_by_name_or_all(trained, tmp_path, capsys):
    (one,) = caches()
    part = one.folder.parent / f".{'0' * 20}.part"
    part.mkdir()
    (one.folder.parent / "mine.txt").write_text("mine")
    assert main(["cache", "clear", one.name[:6]]) == 0
    assert capsys.readouterr().out.startswith(f"removed s2sent_cache/{one.name}: ")
    assert not one.folder.exists() and part.exists()
    assert main(["cache", "clear", "--all"]) == 0
    assert [path.name for path in (tmp_path / "s2sent_cache").iterdir() if not path.name.endswith(".lock")] == [
        "mine.txt"
    ]


def test_one_that_is_being_filled_is_kept(trained, capsys):
    (one,) = caches()
    with locked(one.folder.parent / f".{one.name}.lock", wait=False):
        assert main(["cache", "clear", "--all"]) == 2
    assert "another process is writing there" in capsys.readouterr().err and one.folder.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["clear"], "clear: expected names, as `s2sent cache list` prints them, or --all"),
        (["clear", "abc", "--all"], "clear: expected names"),
        (["clear", "abc"], "s2sent_cache: expected the beginning of a cache's name, got 'abc'; there are: none"),
        ([], "expected list, which prints the caches, or clear, which removes some (see 's2sent cache --help')"),
        (["list", "--cache", "mine.txt"], "--cache mine.txt: expected a folder, got a file"),
        (["list", "--all"], "list: expected neither names nor --all, which clear takes, got --all"),
        (["show"], "invalid choice: 'show'"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["cache", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_beginning_of_no_or_several_names(tmp_path, capsys):
    for name in ("a1" + "0" * 18, "a2" + "0" * 18):
        (tmp_path / name).mkdir()
    folder = ["--cache", str(tmp_path)]
    assert main(["cache", "clear", "b", *folder]) == 2
    assert "expected the beginning of a cache's name, got 'b'; there are: a1000" in capsys.readouterr().err
    assert main(["cache", "clear", "a", *folder]) == 2
    assert f"expected the beginning of one name, got 'a' of a1{'0' * 18}, a2" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_is_no_cache(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ("0" * 20)).symlink_to(tmp_path / "elsewhere")
    assert cache_files.kept(tmp_path) == []
