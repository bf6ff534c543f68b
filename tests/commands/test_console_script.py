"""The console script, as an installer writes it: an interruption at any time ends it with exit code 130 and without a traceback,
also while torch is imported, which is before the command can take care of anything. An import that lasts is told."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2sent_kernels.waiting import SILENCE  # as it is: a fixture makes it endless

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")

# Tells when torch is looked for, which then may last.
WATCH = """
import os
import sys
import time

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch", flush=True)
            time.sleep(float(os.environ.get("LASTS", "0")))

sys.meta_path.insert(0, Watch())
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """What pip writes for the entry point of pyproject.toml, behind what tells how far it is."""
    module, function = re.search(
        r'^s2sent = "(\w+(?:\.\w+)*):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.M
    ).groups()
    path = tmp_path_factory.mktemp("bin") / "s2sent"
    path.write_text(
        f"{WATCH}\nfrom {module} import {function}\nif __name__ == '__main__':\n    sys.exit({function}())\n"
    )
    return path


def begun(script, *arguments, environment=(), **options):
    """The process, which imports torch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict(environment)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, script, *arguments], env=environment, text=True, **pipes, **options)
    assert process.stdout.readline() == "torch\n"
    return process


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.3, 0.6, 1.0, 3.0])
def test_an_interruption_while_libraries_are_imported(tmp_path, script, delay):
    pytest.importorskip("pyarrow")
    # It waits for standard input once all is imported.
    process = begun(script, "encode", "-", "--output", str(tmp_path / "out.npy"))
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    error = error.removeprefix("importing torch ...\n")
    assert "Traceback" not in error and error.endswith("s2sent: error: interrupted\n") and error.count("\n") <= 2
    assert list(tmp_path.iterdir()) == [] and out == ""


def test_an_import_that_lasts_is_told(script):
    import s2sent_command

    assert s2sent_command.SILENCE == SILENCE
    process = begun(script, "--version", environment={"LASTS": "4"})
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and error == "importing torch ...\n"


@pytest.mark.parametrize("quiet", [{"_ARGCOMPLETE": "1"}, {"RANK": "1"}])
def test_an_import_that_lasts_is_not_told(script, quiet):
    process = begun(script, "--version", environment={"LASTS": "4", **quiet})
    _, error = process.communicate(timeout=120)
    assert "torch" not in error


def test_a_process_that_ignores_interruptions_still_does(script):
    """As a shell starts one in the background."""
    process = begun(script, "--version", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "") and out.startswith("s2sent_kernels ")


def test_arguments_and_exit_codes_are_those_of_the_command(script):
    process = begun(script, "nosuch")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "nosuch" in error and out == ""
