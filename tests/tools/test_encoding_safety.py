"""What `s2sent encode` does not trust: folders of other programs, names of parts, links, files that end too early, and being
killed itself."""

import io
import json
import os
import shutil

import fake_encoders
import killing
import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")

from pyarrow import parquet  # noqa: E402

from s2sent_kernels.batches import TextError  # noqa: E402
from s2sent_kernels.tools import encoding  # noqa: E402
from s2sent_kernels.tools.encoding import Columns, Options, Request, Shard, finish, plan, run  # noqa: E402
from s2sent_kernels.tools.encoding.sources import expand  # noqa: E402

ALONE = encoding.in_this_process(fake_encoders.lengths("cpu"))
FORCE = Options(force=True, say=lambda _: None)


def counting(done):
    """An engine, and the numbers of its parts."""

    def engine(job, todo, progress):
        for result in ALONE(job, todo, progress):
            done.append(result.part.number)
            yield result

    return engine


# ---------------------------------------------------------------- folders of others


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "name", ["part-0.parquet", "part-000000.parquet", "manifest.json", "failed.jsonl", "whole.parquet", "_plan.json"]
)
def test_files_of_other_programs_are_not_touched(tmp_path, made, name, force):
    folder = tmp_path / "theirs"
    folder.mkdir()
    parquet.write_table(pa.table({"x": [1]}), folder / name)
    before = killing.contents(folder)
    with pytest.raises(ValueError, match=rf"it is there already and not empty, and {name} in it is no part|is broken"):
        encoding.encode_folder(made, ALONE, folder, Options(force=force))
    locks = [".lock", ".lock-plan"] if name == "_plan.json" else []  # only a lock allows to read what may be a plan
    assert killing.contents(folder) == before | dict.fromkeys(locks, b"")


def test_parts_without_their_plan_are_replaced_by_force_alone(tmp_path, made):
    """A folder of a --force that was killed. If one part is of another program, all may be."""
    folder = tmp_path / "out"
    encoding.encode_folder(made, ALONE, folder)
    (folder / "_plan.json").unlink()
    before = killing.contents(folder)
    with pytest.raises(ValueError, match=r"holds parts without _plan.json: another folder, or --force"):
        encoding.encode_folder(made, ALONE, folder)
    assert killing.contents(folder).keys() - {".lock", ".lock-plan"} == before.keys()
    parquet.write_table(pa.table({"x": [1]}), folder / "part-0.parquet")
    with pytest.raises(ValueError, match="it is there already and not empty"):
        encoding.encode_folder(made, ALONE, folder, FORCE)
    (folder / "part-0.parquet").unlink()
    assert encoding.encode_folder(made, ALONE, folder, FORCE) == 10


def test_force_removes_what_is_named_as_we_name_it(tmp_path, made):
    folder = tmp_path / "out"
    encoding.encode_folder(made, ALONE, folder)
    others = ["part-0.parquet", "part-0000001.parquet", "failed-twice.jsonl", ".lock-of-mine", "notes.txt"]
    for name in others:
        (folder / name).write_text("mine")
    encoding.encode_folder(made._replace(part_rows=5), ALONE, folder, FORCE)
    assert all((folder / name).read_text() == "mine" for name in others)
    assert len(list(folder.glob("part-??????.parquet"))) == 2


# ---------------------------------------------------------------- parts


def damage(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another plan":
        parquet.write_table(parquet.read_table(path).replace_schema_metadata({b"s2sent_plan": b"x"}), path)
    else:
        table = parquet.read_table(path)
        parquet.write_table(table.slice(1), path)


@pytest.mark.parametrize("how", ["cut", "empty", "another plan", "fewer rows"])
def test_a_damaged_part_is_encoded_again(tmp_path, made, how):
    """And while it is, no manifest says that the folder is complete."""
    folder, said, done = tmp_path / "out", [], []
    encoding.encode_folder(made, ALONE, folder)
    before = killing.contents(folder)
    damage(folder / "part-000001.parquet", how)

    def engine(job, todo, progress):
        assert not (folder / "manifest.json").exists()
        yield from counting(done)(job, todo, progress)

    assert encoding.encode_folder(made, engine, folder, Options(say=said.append)) == 10
    assert done == [1] and killing.contents(folder) == before
    assert said[1] == f"{folder}: 1 parts are damaged, as part-000001.parquet, and are encoded again"
    damage(folder / "part-000001.parquet", how)
    with pytest.raises(ValueError, match=r"part-000001.parquet: .*: run the command again"):
        finish(folder)


@pytest.mark.parametrize("how", ["cut", "another plan", "fewer rows"])
def test_a_damaged_part_on_the_way_to_a_file(tmp_path, made, how):
    output, done = tmp_path / "a.npy", []

    def stopped(job, todo, progress):
        for result in ALONE(job, todo, progress):
            yield result
            if result.part.number == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoding.encode_file(made, stopped, output)
    damage(tmp_path / ".a.npy.parts" / "part-000001.parquet", how)
    assert encoding.encode_file(made, counting(done), output, FORCE) == 10
    assert done == [1, 3, 4] and np.load(output)[:, 0].tolist() == list(range(10))


def test_parts_are_checked_before_they_are_joined(tmp_path, made):
    def careless(job, todo, progress):
        yield from ALONE(job, todo, progress)
        damage(tmp_path / ".a.npy.parts" / "part-000001.parquet", "fewer rows")

    with pytest.raises(ValueError, match=r"part-000001.parquet: is damaged"):
        encoding.encode_file(made, careless, tmp_path / "a.npy")
    assert not (tmp_path / "a.npy").exists()
    assert encoding.encode_file(made, ALONE, tmp_path / "a.npy", FORCE) == 10


def test_a_shard_with_parts_to_do_removes_the_manifest(tmp_path, made):
    encoding.encode_folder(made, ALONE, tmp_path / "out")
    (tmp_path / "out" / "part-000003.parquet").unlink()
    encoding.encode_folder(made, ALONE, tmp_path / "out", Options(Shard(0, 2)))  # has all of its parts
    assert (tmp_path / "out" / "manifest.json").exists()
    encoding.encode_folder(made, ALONE, tmp_path / "out", Options(Shard(1, 2), say=lambda _: None))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_folder_of_standard_input_is_repaired(tmp_path, monkeypatch):
    """Also after it was moved. The copy, which a finished folder has not, is needed once more."""

    def encode(name):
        monkeypatch.setattr("sys.stdin", io.StringIO("a\nbb\nccc\n"))
        made = Request(["-"], part_rows=1)
        assert encoding.encode_folder(made, ALONE, tmp_path / name, Options(say=lambda _: None)) == 3
        assert not list((tmp_path / name).glob(".*"))

    encode("one")
    before = killing.contents(tmp_path / "one")
    for name in ("one", "two"):
        os.replace(tmp_path / "one", tmp_path / name)
        (tmp_path / name / "part-000001.parquet").unlink()
        encode(name)
        assert killing.contents(tmp_path / name) == before


# ---------------------------------------------------------------- the last two steps of a file


@pytest.mark.parametrize("step", [0, 3, 6, 7])
def test_parts_of_a_whole_that_is_there_are_removed(tmp_path, made, monkeypatch, step):
    """The run was killed when it had removed so many of its files."""
    output, folder = tmp_path / "a.npy", tmp_path / ".a.npy.parts"
    removed = []

    def remove(place):
        copy = tmp_path / "copy"
        shutil.copytree(place, copy)
        monkeypatch.undo()
        unlink = type(place).unlink
        monkeypatch.setattr(type(place), "unlink", lambda self, **_: (removed.append(self.name), unlink(self)))
        run.clear(place, locks=True)
        monkeypatch.undo()
        assert len(removed) == 8 and removed[-2:] == ["_plan.json", ".joined.json"]
        for name in removed[:step]:
            (copy / name).unlink()
        place.rmdir()
        os.replace(copy, place)

    monkeypatch.setattr(run, "_remove", remove)
    encoding.encode_file(made, ALONE, output)
    before = output.read_bytes()
    assert folder.exists()
    encoding.remove_leftovers(output)
    assert not folder.exists() and output.read_bytes() == before


def test_parts_of_another_whole_are_kept(tmp_path, made, monkeypatch):
    output, folder = tmp_path / "a.npy", tmp_path / ".a.npy.parts"
    encoding.remove_leftovers(output)
    monkeypatch.setattr(run, "_remove", lambda _: None)
    encoding.encode_file(made, ALONE, output)
    monkeypatch.undo()
    np.save(output, np.zeros(3))
    encoding.remove_leftovers(output)
    assert len(list(folder.glob("part-*"))) == 5
    done = []
    assert encoding.encode_file(made, counting(done), output, FORCE) == 10 and not done
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "in.txt"]


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("links", [1, 3])
def test_a_glob_with_circles_of_links_finds_each_file_once(tmp_path, monkeypatch, links):
    (tmp_path / "in" / "sub" / "deep").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/deep/.hidden.txt"):
        (tmp_path / "in" / name).write_text("x\n")
    for number in range(links):
        (tmp_path / "in" / "sub" / f"circle{number}").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "sub" / "z.txt").symlink_to(tmp_path / "in" / "a.txt")  # a link to a file is a file
    wanted = ["in/a.txt", "in/sub/b.txt", "in/sub/deep/c.txt", "in/sub/z.txt"]
    monkeypatch.chdir(tmp_path)
    for pattern in ("in/**/*.txt", "in/**", "**/*.txt", "./**/*.txt", "**", "in/**/**/*.txt", "i*/**", "in/**/*"):
        assert sorted(map(os.path.normpath, expand([pattern]))) == wanted, pattern
    assert expand([f"{tmp_path}/**/deep/**/*.txt"]) == [f"{tmp_path}/in/sub/deep/c.txt"]
    assert expand(["in/*/*/*.txt"]) == ["in/sub/circle0/a.txt", "in/sub/deep/c.txt"]


def test_a_glob_leaves_out_the_output(tmp_path, made, monkeypatch):
    encoding.encode_folder(made, ALONE, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert expand(["*.txt"], str(tmp_path / "out")) == ["in.txt"]
    for pattern in ("*", "**", "**/*"):
        assert expand([pattern], str(tmp_path / "out")) == ["in.txt"], pattern
    with pytest.raises(ValueError, match="there is no such file"):
        expand(["**/*.parquet"], str(tmp_path / "out"))


class Picky(fake_encoders.Lengths):
    """As an Embedder refuses texts that are too long."""

    def encode(self, texts):
        for number, text in enumerate(texts):
            if len(text) > 8:
                raise TextError(number, f"texts: expected at most 8 tokens, got text {number}, which is longer\nx")
        return super().encode(texts)


def test_a_text_that_the_encoder_refuses_has_a_row(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": "x" * i}) for i in range(10)))
    parquet.write_table(pa.table({"text": ["x" * i for i in range(10)]}), tmp_path / "b.parquet")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet")]
    with pytest.raises(encoding.Failed):
        encoding.encode_folder(Request(paths, part_rows=4), encoding.in_this_process(Picky()), tmp_path / "out")
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert [(line["file"], line["row"]) for line in failed] == [(paths[0], 19), (paths[1], 10)]
    reason = "texts: expected at most 8 tokens, got a text, which is longer"
    assert [line["error"] for line in failed] == [f"{paths[0]}: line 19: {reason}", f"{paths[1]}: row 10: {reason}"]


def test_an_overflow_of_float16_has_a_row_and_the_run_goes_on(tmp_path, made):
    class Large(fake_encoders.Lengths):
        def encode(self, texts):
            return super().encode(texts) * [[1e6 if text == "xxxxx" else 1.0] for text in texts]

    with pytest.raises(encoding.Failed, match="1 of 5 parts"):
        encoding.encode_folder(made._replace(dtype="float16"), encoding.in_this_process(Large()), tmp_path / "out")
    failed = json.loads((tmp_path / "out" / "failed.jsonl").read_text())
    assert failed["row"] == 6 and "line 6: the embedding has values beyond float16: 5000000.0" in failed["error"]


def test_csv_ids_from_the_column_of_texts_are_texts(tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n\u00e9\n", encoding="utf-8")
    made = Request([str(tmp_path / "a.csv")], Columns("text", "text"))
    encoding.encode_file(made, ALONE, tmp_path / "a.parquet")
    assert parquet.read_table(tmp_path / "a.parquet")["id"].equals(pa.chunked_array([["x", "\u00e9"]]))
    assert list(encoding.read_texts([str(tmp_path / "a.csv")], id_column="text")) == [("x", "x"), ("\u00e9", "\u00e9")]


@pytest.mark.parametrize(
    "identity, message", [('"\\ud800"', "id: expected a text, got half"), ('["\\ud800"]', "ids: ")]
)
def test_half_a_character_as_an_id_has_a_line(tmp_path, identity, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "x", "id": {identity}}}\n')
    with pytest.raises(ValueError, match=rf"a.jsonl: line 1: {message}"):
        encoding.encode_file(Request([str(path)], Columns("text", "id")), ALONE, tmp_path / "a.npy")


@pytest.mark.parametrize(
    "content, rows",
    [
        ('text\na\n"b\nc\n', None),
        ('text\na\n"b', None),
        ('text\na\n"', None),
        ('id,text\n1,a\n2,"b\n3,c\n', None),
        ('text,id\na,1\nb,"2\nc,3\n', None),
        ('text\na\n5" wide', 2),
        ('text\na\n"b""\n"', 2),
        ('id,text\r\n1,"a"\r\n', 1),
        ("text\na\n\n", 1),
    ],
)
def test_a_quote_that_is_never_closed(tmp_path, content, rows):
    (tmp_path / "a.csv").write_text(content, newline="")
    read = encoding.read_texts([str(tmp_path / "a.csv")])
    if rows is None:
        with pytest.raises(ValueError, match=r"a.csv: row 2: a quote is opened and not closed before the file's end"):
            list(read)
    else:
        assert len(list(read)) == rows


def test_the_version_is_named_before_all_else():
    known = {"inputs": ["a"], "dtype": None, "settings": {"version": "1", "normalize": False}}
    other = {"inputs": ["b"], "dtype": "float16", "settings": {"version": "2", "normalize": True}}
    others = 'normalize false, not true, dtype null, not "float16", other inputs'
    assert plan.difference(known, other) == f'version "1", not "2", {others}'
    other["settings"]["version"] = "1"
    assert plan.difference(known, other) == others


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("content", ["", "{", "{}", "7", "[]", '{"_data_files": [3], "splits": []}', "[" * 100_000])
def test_a_dataset_whose_list_of_files_is_broken(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read, save the dataset again: ") as caught:
        expand([str(tmp_path)])
    assert "\n" not in str(caught.value)
