"""`--engine ray` on one machine: the local engine's bits, a worker killed half-way, the driver killed and run again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_encoders
import pytest

pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")

from pyarrow import parquet  # noqa: E402

from s2sent_kernels.tools import encoding  # noqa: E402
from s2sent_kernels.tools.encoding import Cluster, Columns, Options, Request, ray_engine  # noqa: E402

ALONE = encoding.in_this_process(fake_encoders.lengths("cpu"))
TESTS = Path(__file__).parents[1]
DRIVER = """if True:
    import sys, pathlib, fake_encoders
    from s2sent_kernels.tools import encoding
    path, folder, address = sys.argv[1:]
    request = encoding.Request([path], encoding.Columns("text", "id"), part_rows=20)
    engine = encoding.Cluster(fake_encoders.slow_lengths, address, workers=2, gpus=0).engine
    encoding.encode_folder(request, engine, pathlib.Path(folder))
"""


@pytest.fixture(scope="module")
def cluster():
    """Two workers for all tests."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), before])  # the workers inherit it
    context = ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        configure_logging=False,
    )
    yield context.address_info["address"]
    ray.shutdown()
    os.environ["PYTHONPATH"] = before


def write(folder, texts):
    path = folder / "in.parquet"
    parquet.write_table(pa.table({"id": [f"n{i}" for i in range(len(texts))], "text": texts}), path)
    return Request([str(path)], Columns("text", "id"), part_rows=20)


def same_bytes(request, folder, one):
    encoding.encode_folder(request, ALONE, one)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in folder.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (folder / name).read_bytes()


def test_a_worker_killed_half_way_and_the_bits_of_the_local_engine(cluster, tmp_path, monkeypatch):
    """There is room for two of the three workers: if the third takes the killed one's place, that one's part is done by an idle
    one."""
    monkeypatch.setattr(ray_engine, "PATIENCE", 2.0)
    died = tmp_path / "died"
    texts = [f"DIE {died}" if i == 150 else "x" * (i % 7) for i in range(310)]
    request = write(tmp_path, texts)
    engine = Cluster(fake_encoders.once, workers=3, gpus=0).engine
    count = encoding.encode_folder(request, engine, tmp_path / "out")
    assert count == 310 and died.exists()
    same_bytes(request, tmp_path / "out", tmp_path / "one")


def test_the_driver_killed_and_run_again(cluster, tmp_path):
    request, folder = write(tmp_path, ["x" * (i % 7) for i in range(1000)]), tmp_path / "out"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, request.inputs[0], str(folder), cluster])
    deadline = time.monotonic() + 240  # a busy machine takes a minute to start Ray's workers
    while len(list(folder.glob("part-*"))) < 5 and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert 5 <= len(before) < 50 and not (folder / "manifest.json").exists()
    said = []
    engine = Cluster(fake_encoders.lengths, workers=2, gpus=0).engine
    assert encoding.encode_folder(request, engine, folder, Options(say=said.append)) == 1000
    assert "going on after" in said[0] and all(path.stat().st_mtime_ns == time for path, time in before.items())
    same_bytes(request, folder, tmp_path / "one")


def test_a_worker_that_cannot_be_made(cluster, tmp_path):
    request = write(tmp_path, ["x"])
    with pytest.raises(RuntimeError, match=r"Ray: .*no such model") as caught:
        encoding.encode_folder(request, Cluster(fake_encoders.broken, workers=1, gpus=0).engine, tmp_path / "out")
    assert "\n" not in str(caught.value)
