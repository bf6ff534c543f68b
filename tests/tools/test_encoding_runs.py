"""Runs of `s2sent encode` with an encoder that is no model: parts, resumption, shards, failures, processes, what the outputs
hold. What a folder promises: nothing lost, nothing twice, nothing half-written."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_encoders
import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")

from pyarrow import parquet  # noqa: E402

from s2sent_kernels import waiting  # noqa: E402
from s2sent_kernels.tools import encoding  # noqa: E402
from s2sent_kernels.tools import progress as progress_module  # noqa: E402
from s2sent_kernels.tools.encoding import Columns, Options, Request, Shard, finish, join, parts, plan, run  # noqa: E402

ALONE = encoding.in_this_process(fake_encoders.lengths("cpu"))


def write(folder, texts, name="in.parquet"):
    """Texts and ids n0, n1, ...; one file."""
    table = pa.table({"id": [f"n{i}" for i in range(len(texts))], "text": texts})
    parquet.write_table(table, folder / name, row_group_size=7)
    return str(folder / name)


def request(path, **options):
    return Request([path], **{"columns": Columns("text", "id"), "part_rows": 4, **options})


@pytest.fixture
def texts():
    return ["x" * (i % 5) for i in range(18)]


@pytest.fixture
def path(tmp_path, texts):
    return write(tmp_path, texts)


def stopping(after):
    """An engine that is interrupted after so many parts, and the numbers of the parts that it did."""
    done = []

    def engine(job, todo, progress):
        for result in ALONE(job, todo, progress):
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(result.part.number)
            yield result

    return engine, done


def check(folder, texts):
    """The folder is whole: every text once, in order."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == len(texts) and not list(folder.glob(".*"))
    table = pa.concat_tables(parquet.read_table(folder / part["file"]) for part in manifest["parts"])
    assert table["id"].to_pylist() == [f"n{i}" for i in range(len(texts))]
    assert table["embedding"].to_pylist() == [[len(text), 1] for text in texts]
    assert len(list(folder.glob("part-*"))) == len(manifest["parts"])


# ---------------------------------------------------------------- a file


def test_parquet_and_npy(tmp_path, path, texts):
    assert encoding.encode_file(request(path, keep_text=True), ALONE, tmp_path / "a.parquet") == 18
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table["id"].to_pylist() == [f"n{i}" for i in range(18)] and table["text"].to_pylist() == texts
    assert table["embedding"].to_pylist() == [[len(text), 1] for text in texts]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 2)
    assert encoding.encode_file(request(path), ALONE, tmp_path / "a.npy") == 18
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), fake_encoders.lengths("cpu").encode(texts))
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "a.parquet", "in.parquet"]


def test_no_more_than_three_slices_are_held(tmp_path, monkeypatch):
    """Of a text file of one part: one read, one encoded, one written."""
    (tmp_path / "a.txt").write_text("x\n" * 100)
    monkeypatch.setattr(parts, "SLICE", 8)
    alive, most = 0, 0

    class Counting(fake_encoders.Lengths):
        def encode(self, texts):
            nonlocal alive, most
            assert len(texts) <= 8
            alive += 1
            most = max(most, alive)
            return super().encode(texts)

    write_table = parquet.ParquetWriter.write_table

    def written(self, table, *rest):
        nonlocal alive
        time.sleep(0.01)  # slower than the encoder
        write_table(self, table, *rest)
        alive -= 1

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", written)
    made = Request([str(tmp_path / "a.txt")], part_rows=100)
    engine = encoding.in_this_process(Counting())
    assert encoding.encode_folder(made, engine, tmp_path / "out") == 100 and most <= 3
    assert parquet.read_table(tmp_path / "out" / "part-000000.parquet")["id"].to_pylist() == list(range(100))


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_an_interrupted_run_goes_on(tmp_path, path, suffix):
    output, said = tmp_path / f"a{suffix}", []
    engine, done = stopping(2)
    with pytest.raises(KeyboardInterrupt):
        encoding.encode_file(request(path), engine, output)
    assert not output.exists()
    engine, rest = stopping(9)
    encoding.encode_file(request(path), engine, output, Options(say=said.append))
    # The third part was written when the interruption came.
    assert (done, rest) == ([0, 1], [3, 4]) and said[0] == f"{output}: going on after 12 of 18 texts"
    encoding.encode_file(request(path), ALONE, tmp_path / f"b{suffix}")
    assert output.read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("change", [{"settings": "other"}, {"part_rows": 5}, {"keep_text": True}, "input"])
def test_another_run_starts_anew_by_force_alone(tmp_path, path, texts, change):
    with pytest.raises(KeyboardInterrupt):
        encoding.encode_file(request(path), stopping(1)[0], tmp_path / "a.parquet")
    if change == "input":
        write(tmp_path, texts[::-1])
    said, (engine, done) = [], stopping(9)
    other = request(path, **({} if change == "input" else change))
    before = {
        name: (tmp_path / ".a.parquet.parts" / name).read_bytes() for name in os.listdir(tmp_path / ".a.parquet.parts")
    }
    with pytest.raises(ValueError, match=r"a.parquet: the work of another run is kept \(.*--force throws it away"):
        encoding.encode_file(other, engine, tmp_path / "a.parquet", Options(say=said.append))
    assert before == {name: (tmp_path / ".a.parquet.parts" / name).read_bytes() for name in before} and not done
    encoding.encode_file(other, engine, tmp_path / "a.parquet", Options(say=said.append, force=True))
    assert done == [*range(len(done))] and (change == "input" or "thrown away" in said[0])


def test_one_process_an_output(tmp_path, path):
    def rival(job, todo, progress):
        with pytest.raises(ValueError, match=r"/a\.npy: another process is writing there"):
            encoding.encode_file(request(path), ALONE, tmp_path / "a.npy")
        yield from ALONE(job, todo, progress)

    assert encoding.encode_file(request(path), rival, tmp_path / "a.npy") == 18
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "in.parquet"]


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_a_run_that_ended_while_it_wrote_the_whole(tmp_path, path, monkeypatch, suffix):
    output = tmp_path / f"a{suffix}"

    def end(a, b):
        raise OSError(28, "No space left on device")

    replace = os.replace
    monkeypatch.setattr(run.os, "replace", lambda a, b: (end if b == output else replace)(a, b))
    with pytest.raises(OSError, match="No space left"):
        encoding.encode_file(request(path), ALONE, output)
    assert not output.exists() and (tmp_path / f".a{suffix}.parts" / f"whole{suffix}").exists()
    monkeypatch.undo()
    assert encoding.encode_file(request(path), stopping(0)[0], output, Options(say=lambda _: None)) == 18
    encoding.encode_file(request(path), ALONE, tmp_path / f"b{suffix}")
    assert output.read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("write_out", [encoding.encode_file, encoding.encode_folder])
def test_nothing_is_left_of_a_run_that_could_not_begin(tmp_path, path, monkeypatch, write_out):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plan, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        write_out(request(path), ALONE, tmp_path / "new" / "folder" / "a.npy")
    assert os.listdir(tmp_path) == ["in.parquet"]


# ---------------------------------------------------------------- a folder


def test_a_folder_goes_on_and_refuses_another_plan(tmp_path, path, texts):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encoding.encode_folder(request(path), stopping(2)[0], folder)
    assert not (folder / "manifest.json").exists()
    (folder / ".part-000004.parquet.0123").write_text("half")  # of a worker that was killed
    before = {name: (folder / name).stat().st_mtime_ns for name in os.listdir(folder) if name.startswith("part")}
    for change, why in (({"part_rows": 5}, "part-rows 4, not 5"), ({"settings": {"a": 1}}, "settings")):
        with pytest.raises(ValueError, match=f"the work of another run is kept .*{why}"):
            encoding.encode_folder(request(path, **change), ALONE, folder)
    said, (engine, done) = [], stopping(9)
    assert encoding.encode_folder(request(path), engine, folder, Options(say=said.append)) == 18
    assert done == [3, 4] and said == [f"{folder}: going on after 12 of 18 texts"]
    assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())
    check(folder, texts)
    engine, done = stopping(9)
    assert encoding.encode_folder(request(path), engine, folder) == 18 and not done  # again: nothing to do
    assert encoding.encode_folder(request(path), engine, folder, Options(force=True)) == 18 and len(done) == 5
    assert encoding.encode_folder(request(path, part_rows=9), engine, folder, Options(force=True)) == 18
    check(folder, texts)


def test_a_folder_with_other_files_is_left_alone(tmp_path, path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"it is there already and not empty, and mine.txt in it is no part"):
        encoding.encode_folder(request(path), ALONE, tmp_path / "out", Options(force=True))


def test_shards_and_their_finish(tmp_path, path, texts):
    folder = tmp_path / "out"
    engine, done = stopping(9)
    assert encoding.encode_folder(request(path), engine, folder, Options(Shard(1, 3))) == 6 and done == [1, 4]
    with pytest.raises(ValueError, match=r"3 of 5 parts are missing, the first part-000000.parquet, rows 1 to 4 of "):
        finish(folder)
    for number in (0, 2):
        encoding.encode_folder(request(path), ALONE, folder, Options(Shard(number, 3)))
    assert finish(folder) == 18
    check(folder, texts)
    parquet.write_table(parquet.read_table(folder / "part-000001.parquet").slice(1), folder / "part-000001.parquet")
    with pytest.raises(ValueError, match=r"part-000001.parquet: is damaged"):
        finish(folder)
    encoding.encode_folder(request(path, settings="other"), ALONE, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "part-000001.parquet", folder)
    with pytest.raises(ValueError, match=r"part-000001.parquet: is of another plan"):
        finish(folder)
    with pytest.raises(ValueError, match="expected a folder of parts"):
        finish(tmp_path)


def test_what_fails_by_its_data_is_noted_and_the_run_goes_on(tmp_path, texts):
    folder = tmp_path / "out"
    path = write(tmp_path, [*texts[:6], None, *texts[7:]])
    other = tmp_path / "b.jsonl"
    other.write_text("\n".join(['{"text": "x", "id": "a"}', "{", '{"text": 7, "id": "b"}', '{"text": "x", "id": "c"}']))
    both = request(path)._replace(inputs=[path, str(other)], part_rows=2)
    with pytest.raises(encoding.Failed, match=rf"3 of 11 parts could not be encoded: see {folder}/failed.jsonl"):
        encoding.encode_folder(both, ALONE, folder)
    failed = [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]
    assert [(line["part"], line["file"], line["row"]) for line in failed] == [
        (3, path, 7),
        (9, str(other), 2),
        (10, str(other), 3),
    ]
    assert failed[0]["error"] == f"{path}: row 7: text: expected a text, got null"
    assert len(list(folder.glob("part-*"))) == 8 and not (folder / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"3 of 11 parts are missing.*failed.jsonl says which failed"):
        finish(folder)
    with pytest.raises(encoding.Failed):  # tried again, noted once
        encoding.encode_folder(both, ALONE, folder, Options(say=lambda _: None))
    assert len((folder / "failed.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="row 7: text: expected a text, got null"):
        encoding.encode_file(both, ALONE, tmp_path / "a.npy")


def test_what_the_encoder_refuses_fails_alone(tmp_path, path):
    class Picky(fake_encoders.Lengths):
        def encode(self, texts):
            if "xxxx" in texts[:1]:
                raise ValueError("too long")
            return super().encode(texts)

    with pytest.raises(encoding.Failed, match="1 of 5 parts"):
        encoding.encode_folder(request(path), encoding.in_this_process(Picky()), tmp_path / "out")
    assert "rows 5 to 8: too long" in (tmp_path / "out" / "failed.jsonl").read_text()


def test_standard_input_goes_on_if_it_is_the_same(tmp_path, monkeypatch):
    import io

    made = Request(["-"], part_rows=1)
    for texts, said_first in (
        ("a\nbb\nccc\n", None),
        ("a\nbb\nccc\n", "going on after 2 of 3 texts"),
        ("a\n", "another run"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(texts))
        said = []
        with pytest.raises((KeyboardInterrupt, ValueError)) as caught:
            encoding.encode_folder(
                made, stopping(1 if said_first is None else 0)[0], tmp_path / "o", Options(say=said.append)
            )
        assert said_first is None or said_first in " ".join([*said, str(caught.value)])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nbb\nccc\n"))
    assert encoding.encode_folder(made, ALONE, tmp_path / "o", Options(say=said.append)) == 3
    assert sorted(os.listdir(tmp_path / "o")) == [
        "_plan.json",
        "manifest.json",
        *(f"part-00000{i}.parquet" for i in range(3)),
    ]


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("device, taken", [("cuda:3", ["cuda:3"]), ("cuda", []), ("cpu", [2])])
def test_a_worker_takes_its_part_of_the_machine(monkeypatch, device, taken):
    import torch

    from s2sent_kernels.tools.encoding import local

    found = []
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    local._take(device, 2)
    assert found == taken


def test_two_processes_of_which_one_is_killed(tmp_path, texts):
    """The run ends, the next one goes on, and the bytes are those of one process."""
    texts = [*texts, f"DIE {tmp_path / 'died'}", *texts]
    made = request(write(tmp_path, texts))
    engine = encoding.one_process_a_device(fake_encoders.once, ["cpu", "cpu"])
    with pytest.raises(RuntimeError, match="a worker process ended, or"):
        encoding.encode_folder(made, engine, tmp_path / "two")
    encoding.encode_folder(made, engine, tmp_path / "two", Options(say=lambda _: None))
    check(tmp_path / "two", texts)
    encoding.encode_folder(made, ALONE, tmp_path / "one")
    for part in (tmp_path / "one").glob("part-*"):
        assert part.read_bytes() == (tmp_path / "two" / part.name).read_bytes()
    assert not multiprocessing.active_children()


def test_workers_end_with_a_killed_parent(tmp_path):
    """And what they left half-written is no part."""
    path = write(tmp_path, ["x"] * 2000)
    program = f"""if True:
        import fake_encoders, pathlib
        from s2sent_kernels.tools import encoding
        request = encoding.Request([{path!r}], encoding.Columns("text", "id"), part_rows=20)
        engine = encoding.one_process_a_device(fake_encoders.slow_lengths, ["cpu"])
        encoding.encode_folder(request, engine, pathlib.Path({str(tmp_path / "out")!r}))
    """
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    # In a session of its own, by which its processes are found.
    parent = subprocess.Popen(
        [sys.executable, "-c", program], start_new_session=True, env={**os.environ, "PYTHONPATH": paths}
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("part-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(parent.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers run on")
    made = Request([path], Columns("text", "id"), part_rows=20)
    assert 3 <= len(list((tmp_path / "out").glob("part-*"))) < 100
    assert encoding.encode_folder(made, ALONE, tmp_path / "out", Options(say=lambda _: None)) == 2000
    check(tmp_path / "out", ["x"] * 2000)


# ---------------------------------------------------------------- what is written


def test_parquet_for_embeddings(tmp_path, path):
    """No dictionary, bytes apart, zstd; as the umask says."""
    before = os.umask(0o027)
    try:
        encoding.encode_folder(request(path), ALONE, tmp_path / "out")
        encoding.encode_file(request(path), ALONE, tmp_path / "a.parquet")
    finally:
        os.umask(before)
    for file in (tmp_path / "out" / "part-000000.parquet", tmp_path / "a.parquet"):
        column = parquet.read_metadata(file).row_group(0).column(1)
        assert column.path_in_schema == parts.EMBEDDING and column.compression == "ZSTD"
        assert "BYTE_STREAM_SPLIT" in column.encodings and not column.has_dictionary_page
        assert file.stat().st_mode & 0o777 == 0o640
    for name in ("manifest.json", "_plan.json"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o640


def test_float16(tmp_path, path, texts):
    made = request(path, dtype="float16")
    for name in ("a.parquet", "a.npy"):
        encoding.encode_file(made, ALONE, tmp_path / name)
    column = parquet.read_table(tmp_path / "a.parquet")["embedding"].combine_chunks()
    assert column.type == pa.list_(pa.float16(), 2) and np.load(tmp_path / "a.npy").dtype == np.float16
    expected = fake_encoders.lengths("cpu").encode(texts)
    np.testing.assert_array_equal(column.flatten().to_numpy().reshape(-1, 2), expected)

    class Large(fake_encoders.Lengths):
        def encode(self, texts):
            return super().encode(texts) * [[1e6 if i % 4 else 1.0] for i in range(len(texts))]

    with pytest.raises(encoding.Failed, match=r"row 2: the embedding has values beyond float16: 1000000.0"):
        encoding.encode_file(made, encoding.in_this_process(Large()), tmp_path / "b.npy")


@pytest.fixture(params=["file", "folder"])
def written(request, tmp_path, path):
    """A file, or the files of a folder."""
    made = Request([path], Columns("text", "id"), part_rows=4)
    if request.param == "file":
        encoding.encode_file(made, ALONE, tmp_path / "a.parquet")
        return [str(tmp_path / "a.parquet")]
    encoding.encode_folder(made, ALONE, tmp_path / "out")
    return sorted(map(str, (tmp_path / "out").glob("part-*.parquet")))


def test_pandas_reads_it(written, texts):
    pandas = pytest.importorskip("pandas")
    frame = pandas.concat(map(pandas.read_parquet, written))
    np.testing.assert_array_equal(np.stack(frame["embedding"]), fake_encoders.lengths("cpu").encode(texts))


def test_polars_reads_it(written, texts):
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(written)
    assert frame.schema["embedding"] == polars.Array(polars.Float32, 2)
    np.testing.assert_array_equal(frame["embedding"].to_numpy(), fake_encoders.lengths("cpu").encode(texts))


def test_duckdb_reads_it(written, texts):
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(f"select id, embedding::float[2] from read_parquet({written}) order by len(id), id").fetchall()
    assert rows == [(f"n{i}", (len(text), 1.0)) for i, text in enumerate(texts)]


def test_lancedb_reads_it(tmp_path, written):
    lancedb = pytest.importorskip("lancedb")
    dataset = pytest.importorskip("pyarrow.dataset").dataset(written)
    table = lancedb.connect(str(tmp_path / "db")).create_table("t", dataset.to_table())
    assert table.count_rows() == 18
    nearest = table.search([4.0, 1.0], vector_column_name="embedding").limit(1).to_list()[0]
    assert nearest["id"] in {"n4", "n9", "n14"} and nearest["_distance"] == 0


def test_faiss_reads_it(written, texts):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(2)
    for file in written:  # part by part, without a copy
        column = parquet.read_table(file, columns=["embedding"])["embedding"].combine_chunks()
        index.add(column.flatten().to_numpy().reshape(len(column), -1))
    distances, nearest = index.search(np.array([[4.0, 1.0]], np.float32), 1)
    assert index.ntotal == 18 and distances[0, 0] == 0 and len(texts[nearest[0, 0]]) == 4


# ---------------------------------------------------------------- progress


def test_what_comes_before_the_first_text_is_said_above_the_bar(path, tmp_path, capsys):
    """Of a run that is taken up, too: its model is loaded although the plan is there."""
    with pytest.raises(KeyboardInterrupt):
        encoding.encode_folder(request(path), stopping(2)[0], tmp_path / "out")
    capsys.readouterr()
    options = Options(bar=True, say=lambda line: None, ready=lambda: print("loading ...", file=sys.stderr))
    encoding.encode_folder(request(path), ALONE, tmp_path / "out", options)
    said = capsys.readouterr().err
    assert said.startswith("loading ...\n") and "18 of 18 texts" in said
    encoding.encode_folder(request(path), ALONE, tmp_path / "out", options)
    assert capsys.readouterr().err == ""  # nothing is left to encode


def test_a_sample_is_of_the_whole_run(tmp_path):
    """Texts that are longer towards the end of the file."""
    path = write(tmp_path, ["x" * i for i in range(400)])
    made = plan.make(request(path, part_rows=40), {}, tmp_path)
    found = [len(text) for text in run.sample(parts.Job.of(made, tmp_path), made.parts)]
    assert len(found) < 400 and abs(sum(found) / len(found) - 199.5) < 60
    one = plan.make(request(path, part_rows=4096), {}, tmp_path)
    found = [len(text) for text in run.sample(parts.Job.of(one, tmp_path), one.parts)]
    assert 64 <= len(found) < 80 and abs(sum(found) / len(found) - 199.5) < 5


def test_a_bar_or_lines(monkeypatch, capsys):
    with progress_module.Progress(100, 40, bar=True) as bar:
        bar.advance(30, 900)
        bar.advance(30, 900)
    error = capsys.readouterr().err
    assert "100 of 100 texts" in error and "texts/s" in error and "tokens/s" in error and "left" in error
    now = [0.0]
    monkeypatch.setattr(waiting, "clock", lambda: now[0])
    monkeypatch.setattr(waiting, "LOOK", 1e6)  # no thread says a line between these
    with progress_module.Progress(1000, 400) as lines:
        for now[0] in (5.0, 8.0, 20.0, 24.0, 70.0):
            lines.advance(100, 500)
    assert capsys.readouterr().err.splitlines() == [
        "500 of 1,000 texts, 20 texts/s, 100 tokens/s, 00:25 left",  # the first of them soon
        "700 of 1,000 texts, 15 texts/s, 75 tokens/s, 00:20 left",
        "900 of 1,000 texts, 7 texts/s, 36 tokens/s, 00:14 left",
    ]


class Told:
    """In the place of a Progress: what it is told."""

    def __init__(self, then=lambda: None):
        self.rows, self.tokens, self.steps, self.then = 0, 0, [], then

    def begin(self):
        pass

    def advance(self, rows, tokens):
        self.rows, self.tokens = self.rows + rows, self.tokens + (tokens or 0)
        if rows:
            self.steps.append(rows)
            self.then()


def test_progress_is_told_of_every_batch(tmp_path, monkeypatch):
    """Of an encoder that tells of its batches; what is in none, as a text without tokens, counts at the end of the slice."""
    monkeypatch.setattr(parts, "SLICE", 7)
    path = write(tmp_path, ["a b"] * 18)
    todo = plan.make(request(path, part_rows=9), {}, tmp_path)
    told = Told()
    for _ in encoding.in_this_process(fake_encoders.batches("cpu"))(parts.Job.of(todo, tmp_path), todo.parts, told):
        pass
    assert told.steps == [2, 2, 2, 1, 2] * 2 and told.rows == 18 and told.tokens == 36


def test_progress_is_told_of_batches_in_other_processes(tmp_path):
    """Before the only part is done: the worker waits for a file that is made when its first batch was seen here."""
    mark = tmp_path / "seen"
    path = write(tmp_path, ["a", "b", str(mark), "c", "d"])
    todo = plan.make(request(path, part_rows=5), {}, tmp_path)
    told = Told(mark.touch)
    engine = encoding.one_process_a_device(fake_encoders.batches, ["cpu"])
    (done,) = engine(parts.Job.of(todo, tmp_path), todo.parts, told)
    assert done.rows == told.rows == 5 and told.tokens == done.tokens == 5 and told.steps[0] < 5


def test_an_array_holds_no_texts_and_outputs_have_suffixes(tmp_path, path):
    with pytest.raises(ValueError, match="an array holds no texts"):
        encoding.encode_file(request(path, keep_text=True), ALONE, tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"expected a file of .parquet, .npy, got suffix '.csv'"):
        encoding.encode_file(request(path), ALONE, tmp_path / "a.csv")
    assert join.OUTPUTS == (".parquet", ".npy")
