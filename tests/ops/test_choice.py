"""Which backend computes: what is usable, what "auto" chooses, what a named backend refuses."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import make_parameters
from refusals import B, D, H, N, each_raises, everything, gate, raises

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector
from s2sent_kernels.engines import choice
from s2sent_kernels.engines.native import limits as native
from s2sent_kernels.engines.triton import limits
from s2sent_kernels.formula.call import KERNEL_DTYPES, Call

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BUILT = pytest.mark.skipif(not s2.backends()["native"].usable, reason=s2.backends()["native"].reason)


# ---------------------------------------------------------------- backends


def test_backends_says_what_is_usable():
    status = s2.backends()
    assert list(status) == ["reference", "triton", "native"]
    assert status["reference"].usable
    for name, entry in status.items():
        assert isinstance(entry, s2.BackendStatus), name
        assert isinstance(entry.usable, bool) and entry.reason


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("S2SENT_BACKEND", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is usable here")
def test_triton_without_a_gpu_says_why(no_interpreter):
    status = s2.backends()["triton"]
    assert not status.usable
    assert "CUDA" in status.reason or "not installed" in status.reason


def test_a_named_backend_that_is_not_usable_raises(no_interpreter, monkeypatch, batch):
    """CPU tensors and no interpreter: Triton is refused, with or without a GPU."""
    each_raises(everything(*batch, backend="triton"), ValueError, "backend", "triton")
    monkeypatch.setattr(native, "status", lambda: s2.BackendStatus(False, "is not built"))
    each_raises(everything(*batch, backend="native"), ValueError, "backend", "native", "not built")
    for backend in ("triton", "native"):
        with raises(ValueError, "backend", backend):
            gate(torch.zeros(B, D), make_parameters(N, D), backend)
        selector = S2SentSelector(
            D, N, H, backend=backend
        ).eval()  # building one is allowed: it may be for another machine
        for call in (selector, selector.pool, selector.gates):
            with raises(ValueError, "backend", backend):
                call(*batch)
        with raises(ValueError, "backend", backend):
            torch.ops.s2sent.squeeze(batch.hidden_states, None, None, 4, "paper", None, backend)


def test_auto_on_the_cpu_is_the_reference_without_the_extension(no_interpreter, monkeypatch, batch, recwarn):
    monkeypatch.setattr(native, "status", lambda: s2.BackendStatus(False, "is not built"))
    assert choice.choose("auto", Call(CPU, torch.float32)) == "reference"
    a, _ = s2.squeeze(*batch)
    b, _ = s2.squeeze(*batch, backend="reference")
    assert torch.equal(a, b)
    assert not recwarn.list


def test_the_variable_replaces_auto(no_interpreter, monkeypatch, batch):
    monkeypatch.setattr(native, "status", lambda: s2.BackendStatus(False, "is not built"))
    monkeypatch.setenv("S2SENT_BACKEND", "native")
    each_raises(everything(*batch, backend="auto"), ValueError, "native", "not built")
    with raises(ValueError, "native", "not built"):
        S2SentSelector(D, N, H).eval().pool(*batch)
    monkeypatch.setenv("S2SENT_BACKEND", "reference")
    expected, _ = s2.squeeze(*batch, backend="reference")
    assert torch.equal(s2.squeeze(*batch)[0], expected)
    monkeypatch.setenv("S2SENT_BACKEND", "auto")
    assert torch.equal(s2.squeeze(*batch)[0], expected)


def test_the_variable_replaces_auto_only(no_interpreter, monkeypatch, batch):
    monkeypatch.setenv("S2SENT_BACKEND", "native")
    for call in everything(*batch, backend="reference").values():
        call()
    S2SentSelector(D, N, H, backend="reference").eval().pool(*batch)


@pytest.mark.parametrize("value", ["cuda", "Reference"])
def test_a_bad_variable(no_interpreter, monkeypatch, batch, value):
    monkeypatch.setenv("S2SENT_BACKEND", value)
    each_raises(everything(*batch, backend="auto"), ValueError, "S2SENT_BACKEND", "reference", "triton", repr(value))
    s2.squeeze(*batch, backend="reference")


def test_importing_needs_torch_alone():
    """The import loads neither Triton nor CUDA nor any optional package."""
    code = (
        "import sys, torch; before = set(sys.modules); import s2sent_kernels; new = set(sys.modules) - before; "
        "assert not torch.cuda.is_initialized(); "
        "print(*sorted(new & {'triton', 'transformers', 'matplotlib', 'safetensors', 'torch._dynamo'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


# ---------------------------------------------------------------- the native backend


def status_of(folder, before=""):
    """The status of native in a fresh process with the package in ``folder``, after a call with "auto" on the CPU. The finder of
    an editable install is removed, because it would find a missing extension elsewhere."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        f"import s2sent_kernels as s2, torch; from s2sent_kernels.engines.native import limits as native\n{before}\n"
        "s2.squeeze([torch.zeros(1, 2, 4)]); print(s2.__file__); print(*s2.backends()['native'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    where, status = run.stdout.strip().split("\n", 1)
    assert Path(where).parent.parent == Path(folder)
    return status


@pytest.fixture
def pure(tmp_path):
    """The package without its extension."""
    source = Path(s2.__file__).parent
    shutil.copytree(source, tmp_path / "s2sent_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_a_missing_extension(pure):
    assert status_of(pure).startswith("False the compiled extension is not built")


def test_a_broken_extension(pure):
    (pure / "s2sent_kernels" / "_C.abi3.so").write_bytes(b"no library")
    assert status_of(pure).startswith("False the compiled extension does not load: ImportError: ")


def test_an_extension_that_does_not_register_its_ops(pure):
    (pure / "s2sent_kernels" / "_C.py").write_text("")
    assert status_of(pure).startswith("False the compiled extension does not load: AttributeError: ")


@BUILT
def test_an_extension_of_another_version():
    status = status_of(Path(s2.__file__).parent.parent, "native.INTERFACE = 10**6")
    assert status.startswith("False the compiled extension has interface ") and "1000000" in status


@BUILT
def test_importing_does_not_load_it():
    code = "import sys, s2sent_kernels; sys.exit('s2sent_kernels._C' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(s2.__file__).parent.parent, check=True)


@BUILT
def test_auto_takes_it_on_the_cpu(monkeypatch):
    monkeypatch.delenv("S2SENT_BACKEND", raising=False)
    for dtype in KERNEL_DTYPES:
        assert choice.choose("auto", Call(CPU, dtype)) == "native"
    assert choice.choose("auto", Call(CPU, torch.float64)) == "reference"
    assert choice.choose("auto", Call(torch.device("meta"), torch.float32)) == "reference"


@BUILT
def test_it_refuses_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"backend: 'native' .*got torch.float64"):
        choice.choose("native", Call(CPU, torch.float64))
    with pytest.raises(ValueError, match=r"backend: 'native' .*got meta tensors"):
        choice.choose("native", Call(torch.device("meta"), torch.float32))


@BUILT
def test_cuda_tensors_need_a_build_with_cuda(monkeypatch):
    if torch.ops.s2sent_native.cuda_architectures():
        pytest.skip("the CUDA part is built")
    with pytest.raises(
        ValueError, match=r"backend: 'native' .*got cuda tensors, and it was built without its CUDA part"
    ):
        choice.choose("native", Call(torch.device("cuda"), torch.float32))


@pytest.fixture
def on_cuda(no_interpreter, monkeypatch):
    """As if a GPU were there that both engines support; returns a function that sets why one of them cannot be used."""
    refusals = {"triton": None, "native": None}
    monkeypatch.setattr(limits, "triton_interprets", lambda: False)
    monkeypatch.setattr(
        limits, "_status", lambda *_: s2.BackendStatus(refusals["triton"] is None, refusals["triton"] or "")
    )
    monkeypatch.setattr(native, "cuda_refusal", lambda index: refusals["native"])
    return refusals.__setitem__


@BUILT
def test_auto_tries_native_first_on_cuda(on_cuda, recwarn):
    assert choice.choose("auto", Call(CUDA, torch.bfloat16)) == "native"
    on_cuda("native", "built without its CUDA part")
    assert choice.choose("auto", Call(CUDA, torch.bfloat16)) == "triton"
    assert not recwarn.list


@BUILT
def test_auto_serves_more_blocks_than_native_supports(on_cuda, recwarn):
    """On CUDA native is limited to 128 blocks: named it raises, "auto" falls back and warns."""
    on_cuda("triton", "no Triton, for the test of many blocks")
    most = native.MAXIMUM_BLOCKS
    assert choice.choose("auto", Call(CUDA, torch.bfloat16, num_blocks=most)) == "native"
    assert not recwarn.list
    more = Call(CUDA, torch.bfloat16, num_blocks=most + 1)
    with pytest.warns(RuntimeWarning, match="falls back to plain PyTorch"):
        assert choice.choose("auto", more) == "reference"
    with pytest.raises(ValueError, match=rf"backend: 'native' .*up to {most} blocks on CUDA, got N = {most + 1}"):
        choice.choose("native", more)
    assert choice.choose("native", more._replace(device=CPU)) == "native"


def test_limits_are_printed(capsys):
    for name, status in s2.backends().items():
        if status.usable:
            assert choice.LIMITS[name].LIMITS in status.reason
