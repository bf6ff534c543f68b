"""The servers of docs/serving.md: each block runs as it stands, but for its port, and answers with the model's embeddings."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers")
np = pytest.importorskip("numpy")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
TEXTS = ["the cat sat on the mat", "a dog ran", "moon"]
SECONDS = 120  # on a machine that is busy; the servers need about ten
RAY = """
import ray, sys, time
from ray import serve
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
import server
serve.run(server.app)
print("up", flush=True)
sys.stdin.read()
serve.shutdown()
"""


def block(heading):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.split(f"## {heading}\n")[1].split("\n## ")[0], re.M | re.S)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15, f"{heading}: {len(lines)} lines"
    return code


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "tests" / "data" / "sentence_transformer", tmp_path / "model")
    return tmp_path


@pytest.fixture(scope="module")
def expected():
    from s2sent_kernels.sentence_transformers import load

    return load(ROOT / "tests" / "data" / "sentence_transformer", device="cpu").encode(TEXTS, normalize_embeddings=True)


@contextlib.contextmanager
def running(folder, *command):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), environment.get("PYTHONPATH", "")])
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        except BaseException:
            print((folder / "log").read_text()[-4000:])
            raise
        finally:
            process.stdin.close()  # ends the Ray driver
            if command[0] == "server.py":
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started and left: LitServe's manager outlives it
            process.wait()


def answer(process, port, path, content):
    """The server's answer, once it is up."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    end = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return json.load(response)
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.2)


def test_litserve(folder, expected):
    pytest.importorskip("litserve")
    port = free_port()
    (folder / "server.py").write_text(block("LitServe, with OpenAI's route").replace("port=8000", f"port={port}"))
    with running(folder, "server.py") as process:
        for texts in (TEXTS, TEXTS[0]):
            found = answer(process, port, "/v1/embeddings", {"model": "model", "input": texts})["data"]
            embeddings = np.asarray([one["embedding"] for one in found])
            np.testing.assert_allclose(embeddings, expected[: len(found)], atol=1e-6)
            assert len(found) == (1 if isinstance(texts, str) else len(texts))


def test_ray_serve(folder, expected):
    pytest.importorskip("ray.serve")
    port = free_port()
    (folder / "server.py").write_text(block("Ray Serve"))
    (folder / "ray_driver.py").write_text(RAY)
    with running(folder, "ray_driver.py", str(port)) as process:
        for text, embedding in zip(TEXTS, expected, strict=True):
            found = answer(process, port, "/", {"text": text})["embedding"]
            np.testing.assert_allclose(found, embedding, atol=1e-6)
