"""`s2sent encode` ended at each of its file operations, interrupted while it opens its parts, and given parts that are not what
their names say. Whatever happens, the same command gives the same bytes, or an error that names the part."""

import json
import os
import shutil

import fake_encoders
import killing
import pytest

pa = pytest.importorskip("pyarrow")

from pyarrow import parquet  # noqa: E402

from s2sent_kernels.tools import encoding  # noqa: E402
from s2sent_kernels.tools.encoding import Options, finish, plan, run, stock  # noqa: E402

ALONE = encoding.in_this_process(fake_encoders.lengths("cpu"))
QUIET = Options(say=lambda _: None)


def stopped(after):
    def engine(job, todo, progress):
        for result in ALONE(job, todo, progress):
            yield result
            if result.part.number == after:
                raise KeyboardInterrupt

    return engine


def begun(request, output, write):
    with pytest.raises(KeyboardInterrupt):
        write(request, stopped(2), output, QUIET)


WAYS = {
    "a.npy": (encoding.encode_file, ".a.npy.parts"),
    "a.parquet": (encoding.encode_file, ".a.parquet.parts"),
    "out": (encoding.encode_folder, "out"),
}


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("what", ["begun", "begun again", "forced", "other"])
def test_killed_at_each_file_operation(tmp_path, made, name, what):
    """A first run; one that goes on; one that replaces an output; one that replaces the parts of another run. After each, with
    --force and without, the bytes are those of a run that nobody disturbed."""
    write, parts = WAYS[name]
    write(made, ALONE, tmp_path / name, QUIET)
    want = killing.contents(tmp_path / name) if name == "out" else (tmp_path / name).read_bytes()
    start = tmp_path / "start"  # a folder with the state before the run that is killed
    start.mkdir()
    if what == "begun again":
        begun(made, start / name, write)
    elif what == "other":
        begun(made._replace(part_rows=3), start / name, write)
    elif what == "forced":
        write(made, ALONE, start / name, QUIET)
    options = QUIET._replace(force=what in ("forced", "other"))
    place = tmp_path / "place"

    def fresh():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)

    fresh()
    count = killing.operations(place, lambda: write(made, ALONE, place / name, options))
    assert count >= 15
    for step in killing.points(count):
        for force in (False, True):
            fresh()
            assert killing.killed_at(step, place, lambda: write(made, ALONE, place / name, options))
            if what == "other" and not force:
                continue  # refused while parts of the other run are there
            write(made, ALONE, place / name, QUIET._replace(force=force))
            got = killing.contents(place / name) if name == "out" else (place / name).read_bytes()
            assert got == want, (step, force)
            assert os.listdir(place) == [name], step
    shutil.rmtree(place)


def test_finish_killed_at_each_file_operation(tmp_path, made):
    shards = [encoding.Shard(number, 2) for number in (0, 1)]
    for shard in shards:
        encoding.encode_folder(made, ALONE, tmp_path / "start", Options(shard))
    place = tmp_path / "place"
    shutil.copytree(tmp_path / "start", place)
    count = killing.operations(place, lambda: finish(place))
    want = killing.contents(place)
    for step in range(1, count + 1):
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "start", place)
        assert killing.killed_at(step, place, lambda: finish(place))
        assert finish(place) == 10
        assert killing.contents(place) == want, step


# ---------------------------------------------------------------- interrupted while parts are opened


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_nothing_is_removed_while_parts_are_opened(tmp_path, made, name, error, monkeypatch):
    """SystemExit is what the command makes of SIGTERM."""
    write, parts = WAYS[name]
    begun(made, tmp_path / name, write)
    before = killing.contents(tmp_path / parts)
    assert sum(file.startswith("part-") for file in before) == 3
    for number in range(3):

        def read(folder, part, digest, *, of=number, plain=stock.read):
            if part.number == of:
                raise error
            return plain(folder, part, digest)

        monkeypatch.setattr(stock, "read", read)
        with pytest.raises(error):
            write(made, ALONE, tmp_path / name, QUIET)
        monkeypatch.undo()
        assert killing.contents(tmp_path / parts) == before
    assert write(made, ALONE, tmp_path / name, QUIET) == 10


@pytest.mark.parametrize("name", WAYS)
def test_a_broken_plan_costs_no_part(tmp_path, made, name):
    write, parts = WAYS[name]
    begun(made, tmp_path / name, write)
    path = tmp_path / parts / plan.PLAN
    content = path.read_text()
    for broken in (content[:-9], content.replace("[[0, ", "[[1, ", 1), "[]", "7", content.replace("in.txt", "no.txt")):
        path.write_text(broken)
        with pytest.raises(ValueError, match=rf"{plan.PLAN}: is broken: .*: --force makes it anew"):
            plan.load(path.parent)
        done = []

        def engine(job, todo, progress, *, done=done):
            done += [part.number for part in todo]
            raise KeyboardInterrupt
            yield

        with pytest.raises(KeyboardInterrupt):
            write(made, engine, tmp_path / name, QUIET._replace(force=True))
        assert done == [3, 4] and path.read_text() == content


def test_a_call_that_could_not_begin_removes_nothing_of_another(tmp_path, made):
    """It found no folder, and another process made the folder and took its lock before it could."""
    folder = tmp_path / "out"

    def taken(path, *, wait, name=None, plain=run.locked):
        encoding.encode_folder(made, ALONE, folder, QUIET)
        (folder / plan.PLAN).unlink()
        raise ValueError(f"{path.parent}: another process is writing there")

    with pytest.MonkeyPatch.context() as patch:
        calls = iter([taken])
        plain = run.locked
        patch.setattr(run, "locked", lambda path, **options: next(calls, plain)(path, **options))
        with pytest.raises(ValueError, match="another process"):
            encoding.encode_folder(made, ALONE, folder, QUIET)
    assert len(list(folder.glob("part-*"))) == 5 and (folder / "manifest.json").exists()


# ---------------------------------------------------------------- parts that are not what they seem


def swap(folder):
    one, other = folder / "part-000000.parquet", folder / "part-000002.parquet"
    os.replace(one, folder / "x")
    os.replace(other, one)
    os.replace(folder / "x", other)


def repeat(folder):
    shutil.copy(folder / "part-000000.parquet", folder / "part-000002.parquet")


def shorten(folder):
    path = folder / "part-000000.parquet"
    kept = parquet.read_metadata(path).metadata
    parquet.write_table(parquet.read_table(path).slice(1).replace_schema_metadata(kept), path)


def rewrite(folder):
    """Other numbers under the same footer's claims."""
    path = folder / "part-000000.parquet"
    table, kept = parquet.read_table(path), parquet.read_metadata(path).metadata
    other = parquet.read_table(folder / "part-000001.parquet")["embedding"]
    parquet.write_table(table.set_column(1, "embedding", other).replace_schema_metadata(kept), path)


def flip(folder):
    path = folder / "part-000000.parquet"
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("harm, bad", [(swap, [0, 2]), (repeat, [2]), (shorten, [0]), (rewrite, [0]), (flip, [0])])
def test_parts_are_not_believed(tmp_path, made, name, harm, bad):
    write, parts = WAYS[name]
    (tmp_path / "good").mkdir()
    write(made, ALONE, tmp_path / "good" / name, QUIET)
    begun(made, tmp_path / name, write)
    harm(tmp_path / parts)
    said, done = [], []

    def engine(job, todo, progress):
        done.extend(part.number for part in todo)
        yield from ALONE(job, todo, progress)

    assert write(made, engine, tmp_path / name, Options(say=said.append)) == 10
    assert done == [*bad, 3, 4]
    assert f"{len(bad)} parts are damaged, as part-00000{bad[0]}.parquet" in said[1]
    got, want = (
        killing.contents(p) if p.is_dir() else p.read_bytes() for p in (tmp_path / name, tmp_path / "good" / name)
    )
    assert got == want


@pytest.mark.parametrize("harm", [swap, repeat, shorten, rewrite, flip])
def test_the_manifest_is_not_written_over_a_bad_part(tmp_path, made, harm):
    encoding.encode_folder(made, ALONE, tmp_path / "out", Options(encoding.Shard(0, 1)))
    harm(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out/part-00000\d.parquet: .*: run the command again"):
        finish(tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_part_too_many_is_named(tmp_path, made):
    folder = tmp_path / "out"
    encoding.encode_folder(made, ALONE, folder)
    extra = folder / "part-000007.parquet"
    shutil.copy(folder / "part-000001.parquet", extra)
    for call in (lambda: finish(folder), lambda: encoding.encode_folder(made, ALONE, folder)):
        with pytest.raises(ValueError, match=r"part-000007.parquet: expected 5 parts, of which this is none: remove"):
            call()
    assert extra.exists()
    extra.unlink()
    assert encoding.encode_folder(made, ALONE, folder, QUIET) == 10


def test_the_manifest_has_checksums(tmp_path, made):
    import hashlib

    encoding.encode_folder(made, ALONE, tmp_path / "out")
    for part in json.loads((tmp_path / "out" / "manifest.json").read_text())["parts"]:
        assert part["sha256"] == hashlib.sha256((tmp_path / "out" / part["file"]).read_bytes()).hexdigest()


def test_every_length_and_many_bits_of_a_part(tmp_path, made):
    """A part that is changed in any byte is not there."""
    folder = tmp_path / "out"
    encoding.encode_folder(made, ALONE, folder)
    known = plan.load(folder)
    part, path = known.parts[3], folder / known.parts[3].name
    content = path.read_bytes()
    for length in [*range(0, len(content), 9), len(content) - 1]:
        path.write_bytes(content[:length])
        assert not stock.is_there(folder, part, known.digest), length
        with pytest.raises(ValueError, match=r"part-000003.parquet: .*: run the command again") as caught:
            finish(folder)
        assert "\n" not in str(caught.value)
    for place in range(0, len(content), 3):
        data = bytearray(content)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        assert not stock.is_there(folder, part, known.digest), place
    path.write_bytes(content)
    assert stock.is_there(folder, part, known.digest)
