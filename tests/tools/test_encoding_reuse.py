"""Parts that outlive a change of the inputs, rows that are skipped, and what is looked at before the work."""

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
from s2sent_kernels.tools.encoding import Columns, Options, Request, Shard, finish, plan, reuse, stock  # noqa: E402
from s2sent_kernels.tools.encoding.reading import Reader  # noqa: E402
from s2sent_kernels.tools.encoding.sources import source  # noqa: E402

ALONE = encoding.in_this_process(fake_encoders.lengths("cpu"))
TEXTS = ["x" * (i % 7) for i in range(18)]
KINDS = {"in.jsonl": "id", "in.parquet": "id", "in.txt": None}


def write(path, texts):
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": f"n{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    else:
        parquet.write_table(pa.table({"id": [f"n{i}" for i in range(len(texts))], "text": texts}), path)
    return path


def request(path, rows=4, **more):
    return Request([str(path)], Columns("text", KINDS[path.name]), part_rows=rows, **more)


def recording():
    """An engine, and the parts that it is given."""
    given = []

    def engine(job, todo, progress):
        given.extend(part.number for part in todo)
        yield from ALONE(job, todo, progress)

    return engine, given


def stopped(job, todo, progress):
    for result in ALONE(job, todo, progress):
        yield result
        if result.part.number == 2:
            raise KeyboardInterrupt


def quiet(**more):
    return Options(say=lambda _: None, **more)


WAYS = {"out": encoding.encode_folder, "a.parquet": encoding.encode_file, "a.npy": encoding.encode_file}


def result(place):
    return killing.contents(place) if place.is_dir() else place.read_bytes()


# ---------------------------------------------------------------- inputs that have changed


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["repaired", "longer", "touched"])
def test_a_run_goes_on_from_what_is_unchanged(tmp_path, name, kind, change):
    """After an interruption behind part 2, row 6, which is in part 1, is repaired; or rows follow; or the time alone differs. The
    bytes are those of a run from the beginning."""
    texts, encode = list(TEXTS), WAYS[name]
    path = write(tmp_path / kind, texts)
    with pytest.raises(KeyboardInterrupt):
        encode(request(path), stopped, tmp_path / name, quiet())
    if change == "repaired":
        texts[6] = "repaired"
    elif change == "longer":
        texts += ["y", "yy"]
    write(path, texts)
    os.utime(path, ns=(1, 1))
    said, (engine, given) = [], recording()
    encode(request(path), engine, tmp_path / name, Options(say=said.append))
    assert given == ([1, 3, 4] if change == "repaired" else [3, 4])
    assert f"{2 if change == 'repaired' else 3} of 3 parts have the texts that they had and stay" in said[0]
    (tmp_path / "fresh").mkdir()
    encode(request(path), ALONE, tmp_path / "fresh" / name, quiet())
    assert result(tmp_path / name) == result(tmp_path / "fresh" / name)


def test_a_finished_folder_takes_more_rows(tmp_path):
    """Also where the last part was not full."""
    path = write(tmp_path / "in.jsonl", TEXTS)
    encoding.encode_folder(request(path), ALONE, tmp_path / "out", quiet())
    write(path, [*TEXTS, "y", "yy", "yyy"])
    engine, given = recording()
    assert encoding.encode_folder(request(path), engine, tmp_path / "out", quiet()) == 21 and given == [4, 5]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rows"] == 21


def test_nothing_is_lost_unless_it_is_forced(tmp_path):
    """Where no part would stay, and where rows that are encoded are no more among the inputs."""
    path = write(tmp_path / "in.jsonl", TEXTS)
    encoding.encode_folder(request(path), ALONE, tmp_path / "out", quiet())
    before = killing.contents(tmp_path / "out")
    for texts, why in (
        ([f"{text}!" for text in TEXTS], "none with the texts"),
        (TEXTS[:10], "2 of rows that are no more"),
    ):
        write(path, texts)
        with pytest.raises(ValueError, match=rf"is finished already, with other inputs, 5 parts, {why}.*--force"):
            encoding.encode_folder(request(path), ALONE, tmp_path / "out", quiet())
        found = killing.contents(tmp_path / "out")
        assert {file: content for file, content in found.items() if not file.startswith(".lock")} == before
    assert encoding.encode_folder(request(path), ALONE, tmp_path / "out", quiet(force=True)) == 10


def test_ids_that_have_moved_are_other_rows(tmp_path):
    """Without a column of ids a row's id is its number over all inputs."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "in.txt", TEXTS[:8])
    both = Request([str(tmp_path / name / "in.txt") for name in "ab"], part_rows=4)
    encoding.encode_folder(both, ALONE, tmp_path / "out", quiet())
    write(tmp_path / "a" / "in.txt", TEXTS[:9])
    engine, given = recording()
    encoding.encode_folder(both, engine, tmp_path / "out", quiet())
    assert given == [2, 3, 4]
    table = pa.concat_tables(parquet.read_table(path) for path in sorted((tmp_path / "out").glob("part-*")))
    assert table["id"].to_pylist() == list(range(17))


def test_a_checksum_of_rows_does_not_depend_on_how_they_are_read(tmp_path):
    found = set()
    for kind in ("in.jsonl", "in.parquet"):
        path = write(tmp_path / kind, TEXTS)
        survey = plan.format_of(source(str(path)), Columns("text", "id")).survey(99)
        for most in (1, 5, 99):
            total = reuse.RowSum(0)
            for rows in Reader(Columns("text", "id")).rows(source(str(path)), survey.marks[0], 18, most):
                total.add(rows)
            found.add(total.hexdigest())
    assert len(found) == 1


def test_where_a_text_ends_is_in_the_checksum():
    from s2sent_kernels.tools.encoding.reading import Rows

    def of(texts, ids=None, first=0):
        total = reuse.RowSum(first)
        total.add(Rows(texts, ids, list(range(len(texts))), []))
        return total.hexdigest()

    sums = [of(["ab", "c"]), of(["a", "bc"]), of(["abc", ""]), of(["ab", None, "c"]), of(["ab", "", "c"])]
    sums += [of(["ab", "c"], first=1), of(["ab", "c"], [["1", "2"]]), of(["ab", "c"], [[1, 2]])]
    assert len(set(sums)) == len(sums)
    assert of(["ab", "c"], [["1"], ["2"]]) == of(["ab", "c"], [pa.array(["1", "2"])], first=7)


@pytest.mark.parametrize("name", ["out", "a.parquet"])
def test_killed_while_it_takes_up_changed_inputs(tmp_path, name):
    """At each file operation. The next run gives the bytes of one that nobody disturbed, and encodes no unchanged part again."""
    encode, parts = WAYS[name], "out" if name == "out" else ".a.parquet.parts"
    path = write(tmp_path / "in.jsonl", TEXTS)
    start, place = tmp_path / "start", tmp_path / "place"
    start.mkdir()
    with pytest.raises(KeyboardInterrupt):
        encode(request(path), stopped, start / name, quiet())
    texts = [*TEXTS]
    texts[6] = "repaired"
    write(path, texts)
    (tmp_path / "fresh").mkdir()
    encode(request(path), ALONE, tmp_path / "fresh" / name, quiet())

    def fresh():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)

    fresh()
    count = killing.operations(place, lambda: encode(request(path), ALONE, place / name, quiet()))
    for step in killing.points(count):
        fresh()
        assert killing.killed_at(step, place, lambda: encode(request(path), ALONE, place / name, quiet()))
        there = set(os.listdir(place / parts)) if (place / parts).exists() else set()
        engine, given = recording()
        encode(request(path), engine, place / name, quiet(force=(place / name).is_file()))
        assert result(place / name) == result(tmp_path / "fresh" / name), step
        assert not {0, 2} & {number for number in given if f"part-{number:06d}.parquet" in there}, step


def test_a_shard_that_still_runs_keeps_its_plan(tmp_path):
    path = write(tmp_path / "in.jsonl", TEXTS)

    def rival(job, todo, progress):
        write(path, [*TEXTS, "y"])
        with pytest.raises(ValueError, match="another process is writing there"):
            encoding.encode_folder(request(path), ALONE, tmp_path / "out", quiet(shard=Shard(1, 2)))
        write(path, TEXTS)
        os.utime(path, ns=(time, time))
        yield from ALONE(job, todo, progress)

    time = path.stat().st_mtime_ns
    encoding.encode_folder(request(path), rival, tmp_path / "out", quiet(shard=Shard(0, 2)))
    encoding.encode_folder(request(path), ALONE, tmp_path / "out", quiet(shard=Shard(1, 2)))
    assert finish(tmp_path / "out") == 18


@pytest.mark.parametrize("harm", ["bytes", "recipe", "number"])
def test_a_part_that_cannot_be_believed_is_not_kept(tmp_path, harm):
    path = write(tmp_path / "in.jsonl", TEXTS)
    encoding.encode_folder(request(path), ALONE, tmp_path / "out", quiet())
    first, second = (tmp_path / "out" / f"part-00000{number}.parquet" for number in (0, 1))
    if harm == "bytes":
        content = bytearray(first.read_bytes())
        content[len(content) // 3] ^= 1
        first.write_bytes(content)
    elif harm == "number":
        shutil.copy(second, first)
    else:
        encoding.encode_folder(request(path, settings="other"), ALONE, tmp_path / "other", quiet())
        shutil.copy(tmp_path / "other" / first.name, first)
    write(path, [*TEXTS, "y"])
    engine, given = recording()
    encoding.encode_folder(request(path), engine, tmp_path / "out", quiet())
    assert given == [0, 4]


# ---------------------------------------------------------------- rows that cannot be encoded


class Picky(fake_encoders.Lengths):
    """Refuses texts with an exclamation mark, by their number in the call."""

    def encode(self, texts):
        for number, text in enumerate(texts):
            if "!" in text:
                raise TextError(number, f"texts: no exclamations, got text {number}")
        return super().encode(texts)


@pytest.mark.parametrize("name", WAYS)
def test_rows_are_skipped(tmp_path, name):
    """A null, a line that is not JSON, a text that the encoder refuses: NaN in their places, and a line about each."""
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"id": f"n{i}", "text": text}) for i, text in enumerate(TEXTS)]
    lines[3], lines[6], lines[7] = '{"id": "n3", "text": null}', "{", '{"id": "n7", "text": "a!"}'
    lines[12:16] = [json.dumps({"id": f"n{i}", "text": "!"}) for i in range(12, 16)]  # all of a part
    path.write_text("\n".join(lines))
    said, encode, made = [], WAYS[name], request(path, keep_text=name != "a.npy")
    engine = encoding.in_this_process(Picky())
    with pytest.raises(ValueError):
        encode(made, engine, tmp_path / name, quiet())
    assert encode(made, engine, tmp_path / name, Options(say=said.append, skip=True)) == 18
    place = tmp_path / "out" / "failed.jsonl" if name == "out" else tmp_path / f"{name}.failed.jsonl"
    assert said[-1] == f"7 of 18 texts could not be encoded, and their embeddings are NaN: see {place}"
    notes = [json.loads(line) for line in place.read_text().splitlines()]
    assert [note["row"] for note in notes] == [4, 7, 8, 13, 14, 15, 16]
    assert notes[0]["error"] == f"{path}: line 4: text: expected a text, got null"
    assert notes[2] == {
        "part": 1,
        "file": str(path),
        "row": 8,
        "error": f"{path}: line 8: texts: no exclamations, got a text",
    }
    if name == "a.npy":
        values = np.load(tmp_path / name)
    else:
        files = sorted((tmp_path / "out").glob("part-*")) if name == "out" else [tmp_path / name]
        table = pa.concat_tables(parquet.read_table(file) for file in files)
        ids = [f"n{i}" for i in range(18)]
        assert table["id"].to_pylist() == [*ids[:6], None, *ids[7:]]  # of a broken line nothing is known
        assert table["text"].to_pylist()[2:5] == [TEXTS[2], None, TEXTS[4]]
        values = np.array(table["embedding"].to_pylist())
    bad = [3, 6, 7, 12, 13, 14, 15]
    assert np.isnan(values[bad]).all()
    good = [i for i in range(18) if i not in bad]
    np.testing.assert_array_equal(values[good], [[len(TEXTS[i]), 1] for i in good])
    if name == "out":
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"] == 7
        assert encode(made, engine, tmp_path / name, Options(say=said.append, skip=True)) == 18  # nothing to do
        assert len(place.read_text().splitlines()) == 7
        with pytest.raises(encoding.Failed, match="3 of 5 parts could not be encoded"):  # they are tried again
            encode(made, engine, tmp_path / name, quiet())


def test_what_was_skipped_and_is_repaired_is_encoded(tmp_path):
    path = write(tmp_path / "in.parquet", [*TEXTS[:5], None, *TEXTS[6:]])
    encoding.encode_folder(request(path), ALONE, tmp_path / "out", quiet(skip=True))
    write(path, TEXTS)
    engine, given = recording()
    encoding.encode_folder(request(path), engine, tmp_path / "out", quiet())
    assert given == [1] and not (tmp_path / "out" / "failed.jsonl").exists()


def test_embeddings_beyond_their_dtype_are_skipped(tmp_path):
    class Large(fake_encoders.Lengths):
        def encode(self, texts):
            return super().encode(texts) * np.float32(20000)

    path = write(tmp_path / "in.txt", ["x", "x" * 9, "xx"])
    made = request(path, dtype="float16")
    encoding.encode_file(made, encoding.in_this_process(Large()), tmp_path / "a.npy", quiet(skip=True))
    assert np.isnan(np.load(tmp_path / "a.npy")).all(axis=1).tolist() == [False, True, False]
    assert "beyond float16" in (tmp_path / "a.npy.failed.jsonl").read_text()
    write(path, ["x", "xx"])
    encoding.encode_file(made, encoding.in_this_process(Large()), tmp_path / "a.npy", quiet(skip=True))
    assert not (tmp_path / "a.npy.failed.jsonl").exists()


# ---------------------------------------------------------------- before the work


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_looked_at_before_anything_is_encoded(tmp_path, kind):
    path = write(tmp_path / kind, TEXTS)
    if kind == "in.txt":
        path.write_bytes(path.read_bytes() + b"\xff\n")
    else:
        write(path, [*TEXTS, None])
    engine, given = recording()
    with pytest.raises(ValueError, match=r"(row|line) 19"):
        encoding.encode_file(request(path), engine, tmp_path / "a.npy", quiet())
    assert not given and os.listdir(tmp_path) == [kind]


def test_the_footer_of_a_large_file_is_looked_at(tmp_path, monkeypatch):
    path = write(tmp_path / "in.parquet", TEXTS)
    monkeypatch.setattr(plan, "CHEAP", 0)
    encoding.encode_file(request(path), ALONE, tmp_path / "a.npy", quiet())
    table = pa.table({"id": [str(i) for i in range(9)], "text": [*TEXTS[:7], None, "x"]})
    parquet.write_table(table, path, row_group_size=3)
    engine, given = recording()
    with pytest.raises(ValueError, match=r"in.parquet: row 8: text: expected a text, got null"):
        encoding.encode_file(request(path), engine, tmp_path / "b.npy", quiet())
    assert not given


def test_parts_tell_their_recipe_and_rows(tmp_path):
    encoding.encode_folder(request(write(tmp_path / "in.txt", TEXTS)), ALONE, tmp_path / "out", quiet())
    known = parquet.read_metadata(tmp_path / "out" / "part-000001.parquet").metadata
    assert known[stock.RECIPE].decode() == plan.load(tmp_path / "out").recipe and len(known[stock.ROWS]) == 64
