"""What a file of embeddings says of its origin: where it stands, that it is the same in every part, and in every run."""

import json
import shutil

import fake_encoders
import killing
import numpy as np
import pytest

pytest.importorskip("pyarrow")

from pyarrow import parquet

from s2sent_kernels.tools import encoding
from s2sent_kernels.tools.encoding import Options, Request, sidecar

ALONE = encoding.in_this_process(fake_encoders.lengths("cpu"))
QUIET = Options(say=lambda _: None)
ABOUT = {"version": "1", "model": "m", "options": {"normalize": True}}


@pytest.fixture
def made(tmp_path):
    (tmp_path / "in.txt").write_text("".join(f"{'x' * i}\n" for i in range(1, 11)))
    return Request([str(tmp_path / "in.txt")], part_rows=4, about=lambda: ABOUT)


def of_parquet(path):
    return json.loads(parquet.read_schema(path).metadata[b"s2sent"])


def test_where_it_stands(tmp_path, made):
    encoding.encode_file(made, ALONE, tmp_path / "a.parquet", QUIET)
    encoding.encode_file(made, ALONE, tmp_path / "a.npy", QUIET)
    encoding.encode_folder(made, ALONE, tmp_path / "out", QUIET)
    assert of_parquet(tmp_path / "a.parquet") == ABOUT
    shape = list(np.load(tmp_path / "a.npy").shape)
    beside = json.loads((tmp_path / "a.npy.json").read_text())
    assert beside == {**ABOUT, "shape": shape, "type": "float32"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["provenance"] == ABOUT
    assert [of_parquet(path) for path in (tmp_path / "out").glob("part-*")] == [ABOUT] * 3


def test_a_run_that_goes_on_says_what_the_first_one_said(tmp_path, made):
    """Another name of the same model is no other run, and all parts say the same."""

    def stopped(job, todo, progress):
        yield next(iter(ALONE(job, todo, progress)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoding.encode_folder(made, stopped, tmp_path / "out", QUIET)
    later = made._replace(about=lambda: {**ABOUT, "model": "./m"})
    encoding.encode_folder(later, ALONE, tmp_path / "out", QUIET)
    assert [of_parquet(path) for path in (tmp_path / "out").glob("part-*")] == [ABOUT] * 3
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["provenance"] == ABOUT


@pytest.mark.parametrize("what", ["begun", "forced"])
def test_an_array_killed_at_each_file_operation(tmp_path, made, what):
    """The file beside an array never tells of another array, and is there once the command has ended, or begins again."""
    place, old = tmp_path / "place", made._replace(about=lambda: {**ABOUT, "model": "old"})
    start = tmp_path / "start"
    start.mkdir()
    if what == "forced":
        (tmp_path / "less.txt").write_text("a\n")
        encoding.encode_file(old._replace(inputs=[str(tmp_path / "less.txt")]), ALONE, start / "a.npy", QUIET)
    options = QUIET._replace(force=what == "forced")

    def write():
        encoding.encode_file(made, ALONE, place / "a.npy", options)

    def fresh():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)

    fresh()
    count = killing.operations(place, write)
    want = killing.contents(place)
    assert sorted(want) == ["a.npy", "a.npy.json"]
    for step in range(1, count + 1):
        fresh()
        assert killing.killed_at(step, place, write)
        beside, array = sidecar(place / "a.npy"), place / "a.npy"
        if beside.exists():
            assert json.loads(beside.read_text())["shape"] == list(np.load(array).shape), step
        encoding.remove_leftovers(array)  # as the command does where the output is there
        if not (array.exists() and array.read_bytes() == want["a.npy"] and beside.exists()):
            write()
        assert killing.contents(place) == want, step
