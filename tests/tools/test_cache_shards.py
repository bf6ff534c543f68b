"""Ranks that fill one cache: the bits of one process, whatever order they run in and however often they are interrupted."""

import threading

import numpy
import pytest
from builders import TEXTS, make_encoder_and_tokenizer

from s2sent_kernels import cache
from s2sent_kernels.cache_files import Unfinished

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

SETTINGS = cache.Settings(token_frequencies=3, batch_size=1, max_length=32, pooling="cls")  # a batch a text: 8
FILES = ["about.json", "frequencies.npy", "lengths.npy", "pooled.npy"]


@pytest.fixture(scope="module")
def model():
    return make_encoder_and_tokenizer()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return cache.make(*model, TEXTS, tmp_path_factory.mktemp("whole"), SETTINGS)


def assert_equal_files(made, whole):
    assert made.folder.name == whole.folder.name
    assert sorted(path.name for path in made.folder.iterdir()) == FILES
    for name in FILES:
        assert (made.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize("world", [1, 2, 3, 11])
def test_ranks_one_after_the_other_give_the_files_of_one_process(world, model, whole, tmp_path):
    """11 are more than there are batches."""
    order = [*range(1, world), 0]
    for rank in order[:-1]:
        assert cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=(rank, world)) is None
    assert_equal_files(cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=(0, world)), whole)
    for shard in ((0, world), (1, 2), None):  # all find it complete
        assert_equal_files(cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=shard), whole)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {whole.folder.name}


def test_ranks_at_once(whole, tmp_path):
    models = [make_encoder_and_tokenizer() for _ in range(3)]
    barrier, found = threading.Barrier(3, timeout=60), []

    def work(rank):
        barrier.wait()
        found.append(cache.make(*models[rank], TEXTS, tmp_path, SETTINGS, shard=(rank, 3)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [one for one in found if one is not None]
    assert len(found) == 3 and made
    assert_equal_files(made[0], whole)


def test_an_interrupted_rank_goes_on(model, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RECORD_EVERY", 1)
    summaries, calls = cache._summaries, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return summaries(*arguments)

    assert cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=(0, 2)) is None
    monkeypatch.setattr(cache, "_summaries", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=(1, 2))
    assert_equal_files(cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=(1, 2)), whole)
    assert len(calls) == 5  # of four batches, two were kept and the third ran again


def test_a_missing_rank_is_named(model, tmp_path):
    for rank in (0, 3):
        cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=(rank, 4))
    message = r"expected all to be done, still missing rank 1 \(0 of 2 batches\), rank 2 \(0 of 2 batches\): run these"
    with pytest.raises(ValueError, match=message):
        cache.make(*model, TEXTS, tmp_path, SETTINGS)


def test_ranks_that_ended_before_they_could_complete_the_cache(model, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Unfinished, "finish", lambda *_: None)
    for rank in range(2):
        assert cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=(rank, 2)) is None
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_fill", None)
    assert_equal_files(cache.make(*model, TEXTS, tmp_path, SETTINGS), whole)


def test_a_rank_that_another_process_holds(model, whole, tmp_path):
    with Unfinished(tmp_path, whole.folder.name, 2).taken_by(1):
        with pytest.raises(ValueError, match="another process is writing there"):
            cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=(1, 2))
        assert cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=(0, 2)) is None


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_shards_that_cannot_be(shard, model, tmp_path):
    with pytest.raises(ValueError, match=r"shard: expected \(rank, world\) with 0 <= rank < world, got"):
        cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=shard)


@pytest.mark.parametrize("shard", ["1/2", (1,), (0, 2.0), (True, 2), 1])
def test_shards_of_another_type(shard, model, tmp_path):
    with pytest.raises(TypeError, match=r"shard: expected two integers \(rank, world\), got"):
        cache.make(*model, TEXTS, tmp_path, SETTINGS, shard=shard)


def test_rows_are_read_as_numpy_reads_them(whole):
    assert numpy.load(whole.folder / "lengths.npy").dtype == numpy.int64
    assert numpy.load(whole.folder / "frequencies.npy").shape == (8, 4, 3, 16)
