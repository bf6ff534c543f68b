"""Caches whose process was killed, and caches that are damaged: the same bytes again, or one kind of error that names the file
and what to do."""

import json
import os
import shutil

import killing
import numpy
import pytest
from builders import TEXTS, make_encoder_and_tokenizer
from test_cache_shards import FILES, SETTINGS

from s2sent_kernels import cache
from s2sent_kernels.cache_files import Unfinished

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model():
    return make_encoder_and_tokenizer()


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(cache, "RECORD_EVERY", 2)
    monkeypatch.setattr(cache, "RECORD_SECONDS", 1e9)  # not by chance


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return cache.make(*model, TEXTS, tmp_path_factory.mktemp("whole"), SETTINGS).folder


def make(model, folder, **options):
    return cache.make(*model, TEXTS, folder, SETTINGS, **options)


def counted(monkeypatch):
    calls, plain = [], cache._summaries
    monkeypatch.setattr(cache, "_summaries", lambda *given: calls.append(1) or plain(*given))
    return calls


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize("world", [None, 2])
def test_killed_at_file_operations(tmp_path, model, whole, world):
    place = tmp_path / "place"
    ranks = [{}] if world is None else [{"shard": (rank, world)} for rank in range(world)]

    def fill():
        for rank in ranks:
            make(model, place, **rank)

    place.mkdir()
    count = killing.operations(place, fill)
    assert count > 20
    for step in killing.points(count):
        shutil.rmtree(place)
        place.mkdir()
        assert killing.killed_at(step, place, fill)
        fill()
        make(model, place)
        assert killing.contents(place / whole.name) == killing.contents(whole), step
        others = [path.name for path in place.iterdir() if path.name != whole.name]
        assert all(name.endswith(".lock") for name in others), step


def test_killed_again_and_again(tmp_path, model, whole):
    """Each time a little later."""
    step = 3
    while killing.killed_at(step, tmp_path, lambda: make(model, tmp_path)):
        step += 7
    assert step > 20 and killing.contents(make(model, tmp_path).folder) == killing.contents(whole)


def test_what_a_killed_process_left_in_a_complete_cache_is_removed(tmp_path, model, whole):
    shutil.copytree(whole, tmp_path / whole.name)
    hexes = "0123456789abcdef" * 2
    for name in (
        "progress.json",
        "progress-3.json",
        f".about.json.{hexes}",
        f".progress.json.{hexes}",
        "pooled.npy.new",
    ):
        (tmp_path / whole.name / name).write_text("")
    (tmp_path / whole.name / "notes.txt").write_text("mine")
    assert sorted(killing.contents(make(model, tmp_path).folder)) == [*FILES[:3], "notes.txt", FILES[3]]


# ---------------------------------------------------------------- an interrupted pass that is damaged


@pytest.fixture
def part(tmp_path, model, monkeypatch):
    """A pass that ended after five of eight batches; four of them are recorded."""
    plain, calls = cache._summaries, []

    def failing(*given):
        calls.append(given)
        if len(calls) == 6:
            raise RuntimeError("power cut")
        return plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_summaries", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            make(model, tmp_path)
    (folder,) = tmp_path.glob(".*.part")
    assert json.loads((folder / "progress.json").read_text())["batches"] == 4
    return folder


def test_progress_is_recorded_after_seconds(tmp_path, model, whole, monkeypatch):
    """However slow the batches are. Here one takes two seconds, and a record is due after three."""
    monkeypatch.setattr(cache, "RECORD_EVERY", 1000)
    monkeypatch.setattr(cache, "RECORD_SECONDS", 3.0)
    now, plain, noted = [0.0], cache._summaries, []
    monkeypatch.setattr(cache, "clock", lambda: now[0])

    def slow(*given):
        now[0] += 2.0
        return plain(*given)

    def note(self, rank, done, write=cache.Unfinished.note):
        noted.append(done.batches)
        write(self, rank, done)

    monkeypatch.setattr(cache, "_summaries", slow)
    monkeypatch.setattr(cache.Unfinished, "note", note)
    assert killing.contents(make(model, tmp_path).folder) == killing.contents(whole)
    assert noted == [2, 4, 6, 8]


def last_row_of_batch(batch):
    return cache.encoders.longest_first(TEXTS)[batch]


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("batch, kept", [(0, 0), (3, 2), (7, 4)])
def test_damaged_rows_are_encoded_again(tmp_path, model, whole, part, monkeypatch, name, batch, kept):
    """Those that are recorded, and what follows them; the others are to be written anyway."""
    array = numpy.load(part / f"{name}", mmap_mode="r+")
    array[last_row_of_batch(batch)] += 1
    array.flush()
    calls = counted(monkeypatch)
    if batch < 4:
        with pytest.warns(
            UserWarning, match=rf"batches {kept} to {kept + 1} of rank 0 are damaged: they and those after"
        ):
            found = make(model, tmp_path)
    else:
        found = make(model, tmp_path)
    assert len(calls) == 8 - kept and killing.contents(found.folder) == killing.contents(whole)


@pytest.mark.filterwarnings("ignore:.*are encoded again")
@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize(
    "harm",
    [
        os.unlink,
        lambda path: os.truncate(path, 150),
        lambda path: os.truncate(path, 3000),
        lambda path: os.truncate(path, 0),
    ],
)
def test_an_array_that_is_gone_is_not_zeros(tmp_path, model, whole, part, monkeypatch, name, harm):
    harm(part / name)
    calls = counted(monkeypatch)
    assert killing.contents(make(model, tmp_path).folder) == killing.contents(whole) and len(calls) == 8


@pytest.mark.filterwarnings("ignore:.*are encoded again")
def test_an_array_of_fewer_rows_is_not_taken(tmp_path, model, whole, part):
    numpy.save(part / "lengths.npy", numpy.zeros(3, numpy.int64))
    assert killing.contents(make(model, tmp_path).folder) == killing.contents(whole)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"batches": 4}', b'{"batches": 9, "sha256": 3, "arrays": []}'])
def test_a_record_of_progress_that_is_none(tmp_path, model, whole, part, content):
    (part / "progress.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"progress.json: the batches that it tells of are encoded again"):
        assert killing.contents(make(model, tmp_path).folder) == killing.contents(whole)


def test_the_share_of_another_rank_is_checked_before_the_cache_is_complete(tmp_path, model, whole):
    assert make(model, tmp_path, shard=(0, 2)) is None
    unfinished = Unfinished(tmp_path, whole.name, 2)
    array = numpy.load(unfinished.folder / "pooled.npy", mmap_mode="r+")
    array[last_row_of_batch(0)] += 1
    array.flush()
    with pytest.warns(UserWarning, match="of rank 0 are damaged"):
        assert make(model, tmp_path, shard=(1, 2)) is None
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"still missing rank 0 \(0 of 4 batches\)"):
        make(model, tmp_path)
    with pytest.warns(UserWarning):
        assert killing.contents(make(model, tmp_path, shard=(0, 2)).folder) == killing.contents(whole)


# ---------------------------------------------------------------- a complete cache that is damaged


@pytest.fixture
def copied(tmp_path, whole):
    shutil.copytree(whole, tmp_path / whole.name)
    return tmp_path / whole.name


def refused(model, folder, name):
    with pytest.raises(cache.DamagedCache) as caught:
        make(model, folder.parent, verify=True)
    message = str(caught.value)
    assert message.startswith(f"{folder}/") and message.count("\n") == 0
    assert name is None or message.startswith(f"{folder / name}: "), message
    assert message.endswith(f": remove {folder}, and the cache is made again")


@pytest.mark.parametrize("name", FILES)
def test_every_bit_counts(model, copied, name):
    path = copied / name
    content = path.read_bytes()
    for place in [*range(0, len(content), max(1, len(content) // 40)), len(content) - 1]:
        if name == "about.json" and content[place : place + 1].isspace():
            continue
        for bit in (0, 4, 7):
            data = bytearray(content)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            refused(model, copied, None)
    path.write_bytes(content)
    assert len(make(model, copied.parent, verify=True)) == 8


@pytest.mark.parametrize("name", FILES)
def test_every_length_counts_without_being_asked(model, copied, name):
    path = copied / name
    content = path.read_bytes()
    for length in sorted({0, 1, 5, 9, 60, 127, 128, len(content) // 2, len(content) - 3}):
        path.write_bytes(content[:length])
        with pytest.raises(cache.DamagedCache, match=rf"{copied.name}/"):
            make(model, copied.parent)
        refused(model, copied, name)
    path.unlink()
    refused(model, copied, name)
    path.mkdir()
    refused(model, copied, name)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_runs(tmp_path, model, copied):
    numpy.save(copied / "pooled.npy", numpy.array([Trap(tmp_path / "ran")], dtype=object), allow_pickle=True)
    refused(model, copied, "pooled.npy")
    import pickle

    for name in FILES:
        shutil.copy(copied / name, tmp_path / "kept")
        (copied / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
        refused(model, copied, None)
        shutil.copy(tmp_path / "kept", copied / name)
    assert not (tmp_path / "ran").exists()


def test_caches_of_earlier_releases_have_no_checksums(model, copied):
    about = json.loads((copied / "about.json").read_text())
    del about["arrays"]
    (copied / "about.json").write_text(json.dumps(about))
    assert len(make(model, copied.parent)) == 8
    with pytest.raises(ValueError, match="an earlier release made it, without checksums: remove it"):
        make(model, copied.parent, verify=True)
