"""What setup.py builds and what it refuses; every CUDA source compiles, where nvcc is installed."""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------- setup.py


@pytest.fixture
def setup_py():
    path = ROOT / "setup.py"
    if not path.exists():
        pytest.skip("not a checkout")
    spec = importlib.util.spec_from_file_location("s2sent_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("choice", ["gpu", "CPU", "1", ""])
def test_an_unknown_choice_is_an_error(setup_py, choice):
    with pytest.raises(SystemExit, match=r"S2SENT_BUILD: expected one of .*'auto', '0', 'cpu', 'cuda'.* got"):
        setup_py.decide(choice)


def test_zero_builds_nothing(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "missing", lambda: pytest.fail("looked for a compiler"))
    assert setup_py.decide("0") == {}


def test_auto_falls_back_and_says_why(setup_py, monkeypatch, capsys):
    monkeypatch.setattr(setup_py, "missing", lambda: "a C++ compiler")
    assert setup_py.decide("auto") == {}
    out = capsys.readouterr().out
    assert "it needs a C++ compiler" in out and out.count("\n") == 1


def test_cpu_that_cannot_be_built_is_an_error(setup_py, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(SystemExit, match=r"S2SENT_BUILD: 'cpu' needs a C\+\+ compiler.*/no/such/compiler"):
        setup_py.decide("cpu")
    monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"S2SENT_BUILD: 'cpu' needs torch"):
        setup_py.decide("cpu")


@pytest.fixture
def cuda_torch(setup_py, monkeypatch):
    """As if torch were built for CUDA 13.0 and nvcc 13.1 were installed, without a GPU."""
    monkeypatch.setattr(setup_py, "missing", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    monkeypatch.setattr(setup_py, "cuda_home", lambda: "/toolkit")
    monkeypatch.setattr(setup_py, "nvcc_release", lambda nvcc: (13, 1))


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_cuda_is_built_where_torch_and_nvcc_fit(setup_py, cuda_torch, monkeypatch, choice):
    monkeypatch.setattr(setup_py, "extension", lambda cuda=False: {"cuda": cuda})
    assert setup_py.decide(choice) == {"cuda": True}
    assert setup_py.decide("cpu") == {"cuda": False}


def lacking_torch(setup_py, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)


def lacking_nvcc(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "nvcc_release", lambda nvcc: None)


def another_nvcc(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "nvcc_release", lambda nvcc: (12, 9))


@pytest.mark.parametrize(
    "change, cause",
    [
        (lacking_torch, r"a torch built for CUDA \(got "),
        (lacking_nvcc, r"nvcc \(CUDA_HOME is '/toolkit'"),
        (another_nvcc, r"nvcc of CUDA 13\.0's major version.*got 12\.9 in /toolkit"),
    ],
)
def test_cuda_that_cannot_be_built(setup_py, cuda_torch, monkeypatch, capsys, change, cause):
    """ "cuda" is then an error; "auto" builds the CPU part and prints what is left out."""
    change(setup_py, monkeypatch)
    monkeypatch.setattr(setup_py, "extension", lambda cuda=False: {"cuda": cuda})
    with pytest.raises(SystemExit, match="S2SENT_BUILD: 'cuda' needs " + cause):
        setup_py.decide("cuda")
    assert setup_py.decide("auto") == {"cuda": False}
    out = capsys.readouterr().out
    assert re.search("its CUDA part needs " + cause, out) and out.count("\n") == 1


def test_cuda_without_a_compiler_is_an_error(setup_py, cuda_torch, monkeypatch):
    monkeypatch.setattr(setup_py, "missing", lambda: "a C++ compiler")
    with pytest.raises(SystemExit, match=r"S2SENT_BUILD: 'cuda' needs a C\+\+ compiler"):
        setup_py.decide("cuda")


def test_every_source_is_built(setup_py):
    kinds = (".cpp", ".h", ".cu", ".cuh")
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds}
    assert found == {*setup_py.SOURCES, *setup_py.HEADERS, *setup_py.CUDA_SOURCES, *setup_py.CUDA_HEADERS}


# ---------------------------------------------------------------- nvcc

ARCHITECTURES = ("80", "90a", "100", "120")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ONE_PASS = "csrc/cuda/sm90/select.cu"


def compiled(setup_py, source, architecture, *to):
    """What the assembler says of a source's kernels."""
    gencode = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [NVCC, *setup_py.NVCC_FLAGS, gencode, "-Xptxas=-v", *to, str(ROOT / source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def registers(said):
    return [int(count) for count in re.findall(r"Used (\d+) registers", said)]


def fewest_of_one_pass():
    """csrc/cuda/sm90/select.cu recognises an empty kernel by its register count, which is below this one."""
    return int(re.search(r"kLoaderRegisters = (\d+)", (ROOT / "csrc/cuda/sm90/layout.cuh").read_text())[1])


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_every_source_without_spills(setup_py, tmp_path, architecture):
    """The host's code is the same for every GPU, and compiled with the first."""
    sources = [source for source in setup_py.CUDA_SOURCES if source.endswith(".cu")]
    assert len(sources) > 5 and ONE_PASS in sources
    kind = "-c" if architecture == ARCHITECTURES[0] else "-cubin"

    def said_of(source):
        return compiled(setup_py, source, architecture, kind, "-o", str(tmp_path / f"{Path(source).stem}.o"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = dict(zip(sources, pool.map(said_of, sources), strict=True))
    for source, text in said.items():
        spills = re.findall(r"(\d+) bytes spill", text)
        assert spills and not any(map(int, spills)), f"{source} spills on sm_{architecture}: {text}"
    if architecture == "90a":
        assert_empty_without_its_features(setup_py, registers(said[ONE_PASS]))


def assert_empty_without_its_features(setup_py, used):
    """``used``: registers of the one-pass kernels of sm_90a. For sm_90, without its own features, they are empty."""
    empty = registers(compiled(setup_py, ONE_PASS, "90", "-cubin", "-o", os.devnull))
    assert len(empty) == len(used) > 0
    assert max(empty) < fewest_of_one_pass() <= min(used)
