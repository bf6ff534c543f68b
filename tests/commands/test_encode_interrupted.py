"""`s2sent encode` interrupted within a part: batches that were encoded are not encoded again, and the output has the bytes of a
run that nobody interrupted, whatever was kept of how many runs."""

import os
import shutil

import killing
import pytest
import torch
from builders import save_model, sentences

pa = pytest.importorskip("pyarrow")
pytest.importorskip("sentence_transformers")

from s2sent_kernels import batch_runner  # noqa: E402
from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.tools.encoding import begun  # noqa: E402

OUTPUTS = {"out.npy": ".out.npy.parts", "out.parquet": ".out.parquet.parts", "out/": "out"}
TEXTS = sentences(40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("encode")
    save_model(root)
    return root / "whole"


@pytest.fixture
def encode(tmp_path, model, monkeypatch):
    """The command, with batches of few texts and parts of many. ``encode.batches`` counts those that the encoder runs."""
    monkeypatch.chdir(tmp_path)
    write(TEXTS)
    ran = batch_runner.BatchRunner._run

    def counted(*given):
        encode.batches += 1
        if encode.batches == encode.stop:
            raise encode.error
        return ran(*given)

    def encode(output, *options, stop=0, error=KeyboardInterrupt):
        encode.batches, encode.stop, encode.error = 0, stop, error
        command = ["encode", str(tmp_path / "in.txt"), "--model", str(model), "--output", output]
        return main([*command, "--device", "cpu", "--batch-tokens", "12", "--part-rows", "30", *options])

    monkeypatch.setattr(batch_runner.BatchRunner, "_run", counted)
    return encode


def write(texts):
    with open("in.txt", "w") as file:
        file.write("".join(f"{text}\n" for text in texts))


def result(output):
    return killing.contents(output_of(output)) if output.endswith("/") else output_of(output).read_bytes()


def output_of(output):
    from pathlib import Path

    return Path(output)


def whole(encode, output):
    """What an uninterrupted run gives, and how many batches it has. Its output is moved away."""
    assert encode(output) == 0
    want, count = result(output), encode.batches
    assert not any(begun.is_begun(name) for _, _, names in os.walk(".") for name in names)
    os.makedirs("whole")
    for name in {output.rstrip("/"), f"{output}.json"} & set(os.listdir()):
        os.rename(name, f"whole/{name}")
    return want, count


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_interruption_costs_no_batch(encode, output, capsys):
    want, count = whole(encode, output)
    assert count > 12
    capsys.readouterr()
    done = 0
    for stop in (3, 4, 5):  # each run does one batch less than where it is stopped
        assert encode(output, stop=stop) == 130
        said = capsys.readouterr()
        assert encode.batches == stop and (done == 0) == ("going on" not in said.out)
        done += stop - 1
        kept = int(said.err.split(" texts are encoded and kept: the same command goes on after them")[0])
        assert kept >= done
    assert not any(name.startswith("part-") for name in os.listdir(OUTPUTS[output]))  # all was within the first part
    assert encode(output) == 0
    assert encode.batches == count - done
    assert f"going on after {kept} of 40 texts\n" in capsys.readouterr().out
    assert result(output) == want
    assert not any(begun.is_begun(name) for _, _, names in os.walk(".") for name in names)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="autograd has threads for GPUs, with which a process cannot be forked"
)
def test_killed_within_a_part(encode, output, monkeypatch):
    """Whatever is on the disk then: half a batch, or none. What was there before the last batches is not encoded again."""
    monkeypatch.setattr(begun, "RECORD_SECONDS", 0.0)
    torch.set_num_threads(1)
    want, count = whole(encode, output)
    os.makedirs("place")
    os.chdir("place")
    operations = killing.operations(".", lambda: encode(output))
    assert operations > 2 * count  # each batch is added and synced
    spared = 0
    for step in killing.points(operations):
        for name in os.listdir():
            shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)
        assert killing.killed_at(step, ".", lambda: encode(output))
        if output.endswith("/") or not os.path.exists(output):
            assert encode(output) == 0
            spared = max(spared, count - encode.batches)
            assert not any(begun.is_begun(name) for _, _, names in os.walk(".") for name in names)
        assert result(output) == want, step
        assert set(os.listdir()) - {OUTPUTS[output]} <= {
            output.rstrip("/"),
            *([f"{output}.json"] if output == "out.npy" else []),
        }
    assert spared > count // 2


@pytest.mark.parametrize("harm", ["shortened", "changed", "empty", "foreign", "huge", "longer"])
def test_what_is_kept_is_not_believed(encode, harm):
    want, count = whole(encode, "out.npy")
    assert encode("out.npy", stop=6) == 130
    folder = output_of(OUTPUTS["out.npy"])
    (path,) = (path for path in folder.iterdir() if begun.is_begun(path.name))
    content = path.read_bytes()
    record = len(content) // 5
    flipped = bytearray(content)
    flipped[2 * record] ^= 1
    # The number of batches that are still good, where what comes before the harm has another length than 2 of 5 records.
    path.write_bytes(
        {
            "shortened": content[:-1],
            "changed": bytes(flipped),
            "empty": b"",
            "foreign": b"\xff" * 500,
            "huge": content[: begun.HEAD.size - 12] + b"\xff" * 12 + content[begun.HEAD.size :],
            "longer": content + content[:50],
        }[harm]
    )
    least, most = {"shortened": (4, 4), "changed": (1, 4), "longer": (5, 5)}.get(harm, (0, 0))
    assert encode("out.npy") == 0
    assert least <= count - encode.batches <= most
    assert result("out.npy") == want


def test_batches_with_other_texts_are_encoded_again(encode, capsys):
    """A row was repaired: the batches without it stay, although all are of the same part."""
    want, count = whole(encode, "out.npy")
    write([*TEXTS[:5], "another text", *TEXTS[6:]])
    assert encode("out.npy", stop=9) == 130
    write(TEXTS)
    assert encode("out.npy") == 0
    assert 0 < count - encode.batches < 8
    assert result("out.npy") == want


def test_another_recipe_finds_nothing(encode, capsys):
    assert encode("out.npy", stop=4) == 130
    capsys.readouterr()
    assert encode("out.npy", "--normalize") == 2
    assert "out.npy: the work of another run is kept (normalize false, not true)" in capsys.readouterr().err
    assert encode("out.npy", stop=2) == 130  # it was not thrown away
    assert "going on after" in capsys.readouterr().out
    assert encode("out.npy", "--normalize", "--force") == 0
    count = encode.batches
    assert "the work of another run is thrown away" in capsys.readouterr().out
    assert encode("again.npy", "--normalize") == 0 and encode.batches == count
    assert result("again.npy") == result("out.npy")


def test_a_bad_row_costs_no_batch(encode, capsys):
    """Found while the part is encoded, in a folder, whose files are not looked at before."""
    with open("in.txt", "ab") as file:
        file.write(b"\xff\n")
    assert encode("out/") == 2
    count = encode.batches
    write([*TEXTS, "good"])
    assert encode("out/") == 0
    assert encode.batches < count


def test_progress_counts_what_is_encoded_now(encode, monkeypatch, capsys):
    """The texts of earlier runs are no part of the rate."""
    from s2sent_kernels.tools import progress

    made = []
    plain = progress.Progress.__init__

    def init(self, *given, **options):
        plain(self, *given, **options)
        made.append(self)

    begun = []
    monkeypatch.setattr(progress.Progress, "__init__", init)
    monkeypatch.setattr(progress.Progress, "begin", lambda self: begun.append(self.texts))
    assert encode("out.npy", stop=6) == 130
    first = made[0].texts
    begun.clear()
    assert encode("out.npy") == 0
    assert made[1].before == first > 0 and made[1].before + made[1].texts == made[1].total == 40
    assert len(begun) > 2 and begun.count(0) > 2  # at the start, with the model, and after batches that were found


def test_memory_does_not_grow_with_what_waits(encode, monkeypatch):
    """So many bytes are written although the time has not come."""
    monkeypatch.setattr(begun, "MOST_BYTES", 1000)
    assert encode("out.npy", stop=15, error=MemoryError) == 2
    waiting = []
    plain = begun.Begun.add

    def add(self, *given):
        plain(self, *given)
        waiting.append(self._bytes)

    monkeypatch.setattr(begun.Begun, "add", add)
    assert encode("out.parquet") == 0 and max(waiting) <= 1000
