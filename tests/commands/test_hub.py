"""A hub that does not answer: it is asked once, a command says beforehand for whom it looks, and what is cached is taken."""

import os
import socket
import subprocess
import sys
import threading

import pytest
from builders import save_encoder

from s2sent_kernels import hub as module

pytest.importorskip("sentence_transformers")

NAME = "somebody/encoder"
LOOKING = f"looking for {NAME} on the hub; HF_HUB_OFFLINE=1 takes what is cached\n"


@pytest.fixture
def hub():
    """Address of a hub that hangs up, and the requests that it got."""
    server, connections = socket.create_server(("127.0.0.1", 0)), []

    def hang_up():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # the server is closed
                return
            connections.append(connection.recv(1000).partition(b" HTTP")[0].decode())
            connection.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", connections
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def run(tmp_path, address, *command, offline="0"):
    """Of a process of its own, since the library reads its settings as it is imported."""
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": offline}
    env["NO_PROXY"] = "127.0.0.1"
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=tmp_path)


def asked(connections):
    """How often for the encoder; the library asks for something of its own, too."""
    return sum(NAME in line for line in connections)


def cached(tmp_path):
    """An encoder as the library keeps one that was downloaded."""
    folder = tmp_path / "hf" / "hub" / f"models--{NAME.replace('/', '--')}"
    save_encoder(folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)


COMMANDS = [
    ["doctor", "--model", NAME],
    ["train", "--data", "pairs.tsv", "--output", "out", "--model", NAME],
    ["train", "--freeze-encoder", "--data", "pairs.tsv", "--output", "out", "--model", NAME],
    [
        "encode",
        "pairs.tsv",
        "--column",
        "anchor",
        "--output",
        "out.npy",
        "--model",
        NAME,
        "--selector",
        "all-MiniLM-L6-v2",
    ],
    ["inspect", "--text", "a", "--model", NAME, "--selector", "all-MiniLM-L6-v2"],
    ["export", "--output", "out.onnx", "--model", NAME, "--selector", "all-MiniLM-L6-v2"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_a_command_says_for_whom_it_looks(tmp_path, hub, command):
    if "train" in command:
        pytest.importorskip("datasets")
    address, connections = hub
    (tmp_path / "pairs.tsv").write_text("anchor\tpositive\n" + "".join(f"a {i}\tb {i}\n" for i in range(4)))
    said = run(tmp_path, address, "-m", "s2sent_kernels.cli", *command)
    assert said.returncode == 2
    lines = [line for line in said.stderr.splitlines(keepends=True) if not line.endswith(" ...\n")]  # of what took long
    assert lines[0] == LOOKING
    error = "".join(lines[1:])
    assert (
        error.startswith(f"s2sent: error: --model {NAME}: there is no folder and no shipped name (")
        and error.count("\n") == 1
    )
    assert asked(connections) == 1
    why = f"no model of the hub is cached under it, and the hub {address} does not answer ("
    assert (
        why in error and error.endswith("); HF_HUB_OFFLINE=1 takes cached ones unasked\n") and "expected" not in error
    )


def test_a_hub_that_does_not_know_the_name(tmp_path):
    """It answers, and is not blamed."""
    import http.server

    class Unknown(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unknown) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for command in (["inspect", "--text", "a", "--model", NAME], COMMANDS[1]):
            (tmp_path / "pairs.tsv").write_text("anchor\tpositive\n" + "".join(f"a {i}\tb {i}\n" for i in range(4)))
            said = run(tmp_path, address, "-m", "s2sent_kernels.cli", *command)
            error = said.stderr.splitlines()[-1]
            names = "(all-MiniLM-L6-v2, all-mpnet-base-v2)"
            wanted = f"there is no folder and no shipped name {names} of this name, and no model of the hub"
            assert said.returncode == 2 and error == f"s2sent: error: --model {NAME}: {wanted}"
        server.shutdown()


LOAD = f"""
from s2sent_kernels import parts
import torch
encoder, tokenizer, name = parts.load_model({NAME!r}, torch.device("cpu"))
assert parts.max_seq_length({NAME!r}) is None
parts.load_transformer({NAME!r})
"""


def test_what_is_cached_is_taken(tmp_path, hub):
    address, connections = hub
    cached(tmp_path)
    said = run(tmp_path, address, "-c", LOAD)
    assert said.returncode == 0, said.stderr
    assert asked(connections) == 1  # and not again, for a minute


def test_offline_no_hub_is_asked(tmp_path, hub):
    address, connections = hub
    cached(tmp_path)
    said = run(tmp_path, address, "-c", LOAD, offline="1")
    assert said.returncode == 0, said.stderr
    said = run(tmp_path, address, "-m", "s2sent_kernels.cli", "doctor", "--model", "somebody/else", offline="1")
    assert said.returncode == 2 and LOOKING not in said.stderr and said.stderr.count("s2sent: error: ") == 1
    assert said.stderr.splitlines()[-1].startswith("s2sent: error: --model somebody/else: ")
    assert not asked(connections)


def test_an_answer_counts_for_a_while(monkeypatch):
    """The same for a model that is there, and for one that is not."""
    library = pytest.importorskip("huggingface_hub")
    now, questions = [100.0], []

    def model_info(self, name, timeout):
        questions.append(name)
        if name == "user/none":
            raise ValueError("no such model")

    monkeypatch.setattr(library.HfApi, "model_info", model_info)
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "_asked", {})
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for name in ("user/none", "user/a", "user/b"):
        assert module.reached(name) == name
    assert questions == ["user/none"]
    now[0] += module.ASKED_EVERY
    assert module.reached("user/b") == "user/b" and questions == ["user/none", "user/b"]
