"""The compiled backend beside its kernels: when it is usable, when it is chosen, what setup.py builds, threads."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from builders import make_parameters

import s2sent_kernels as s2
from s2sent_kernels import backend as backend_module
from s2sent_kernels import functional

ROOT = Path(__file__).parents[2]
BUILT = pytest.mark.skipif(not s2.backends()["native"].usable, reason=s2.backends()["native"].reason)
N, B, L, H, M = 5, 6, 40, 8, 4


# ---------------------------------------------------------------- status


def status_of(folder, before=""):
    """What a fresh process says of the package in ``folder``, after a use of "auto" on the CPU. The finder of an editable
    install would go on looking for a missing extension elsewhere."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        f"import s2sent_kernels as s2, torch; from s2sent_kernels import backend\n{before}\n"
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
    status = status_of(Path(s2.__file__).parent.parent, "backend.NATIVE_INTERFACE = 10**6")
    assert status.startswith("False the compiled extension has interface ") and "1000000" in status


@BUILT
def test_importing_does_not_load_it():
    code = "import sys, s2sent_kernels; sys.exit('s2sent_kernels._C' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(s2.__file__).parent.parent, check=True)


@BUILT
def test_auto_takes_it_on_the_cpu(monkeypatch):
    monkeypatch.delenv("S2SENT_BACKEND", raising=False)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert backend_module.choose("auto", torch.device("cpu"), dtype) == "native"
    assert backend_module.choose("auto", torch.device("cpu"), torch.float64) == "reference"
    assert backend_module.choose("auto", torch.device("meta"), torch.float32) == "reference"


@BUILT
def test_it_refuses_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"backend: 'native' .*got torch.float64"):
        backend_module.choose("native", torch.device("cpu"), torch.float64)
    with pytest.raises(ValueError, match=r"backend: 'native' .*got meta tensors"):
        backend_module.choose("native", torch.device("meta"), torch.float32)


@BUILT
def test_cuda_tensors_need_a_build_with_cuda(monkeypatch):
    if torch.ops.s2sent_native.cuda_architectures():
        pytest.skip("the CUDA part is built")
    with pytest.raises(
        ValueError, match=r"backend: 'native' .*got cuda tensors, and it was built without its CUDA part"
    ):
        backend_module.choose("native", torch.device("cuda"), torch.float32)


@BUILT
def test_native_stands_in_for_triton_on_cuda(monkeypatch, recwarn):
    monkeypatch.delenv("S2SENT_BACKEND", raising=False)
    usable, refused = backend_module.BackendStatus(True, ""), backend_module.BackendStatus(False, "no Triton")
    monkeypatch.setattr(backend_module, "triton_interprets", lambda: False)
    monkeypatch.setattr(backend_module, "native_cuda_refusal", lambda index: None)
    for status, chosen in ((usable, "triton"), (refused, "native")):
        monkeypatch.setattr(backend_module, "_triton_status", lambda *_, status=status: status)
        assert backend_module.choose("auto", torch.device("cuda", 0), torch.bfloat16) == chosen
    assert not recwarn.list


@BUILT
def test_auto_takes_one_pass_where_it_is_faster(monkeypatch):
    monkeypatch.delenv("S2SENT_BACKEND", raising=False)
    usable, capability = backend_module.BackendStatus(True, ""), (9, 0)
    monkeypatch.setattr(backend_module, "triton_interprets", lambda: False)
    monkeypatch.setattr(backend_module, "_triton_status", lambda *_: usable)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    refusal: str | None = None
    monkeypatch.setattr(backend_module, "native_cuda_refusal", lambda index: refusal)

    def chosen(dtype=torch.bfloat16, tokens=(12, 768)):
        backend_module._one_pass_is_faster.cache_clear()
        return backend_module.choose("auto", torch.device("cuda", 0), dtype, tokens)

    try:
        assert chosen() == chosen(torch.float16) == "native"
        assert chosen(tokens=None) == chosen(tokens=(3, 768)) == chosen(torch.float32) == "triton"
        refusal = "no GPU code for it"
        assert chosen() == "triton"
        refusal, capability = None, (10, 0)
        assert chosen() == "triton"
    finally:
        backend_module._one_pass_is_faster.cache_clear()


def test_the_choice_is_told_of_tokens_without_gradients(monkeypatch):
    told = []
    monkeypatch.setattr(
        functional, "choose", lambda *call: told.append(call[3] if len(call) > 3 else None) or "reference"
    )
    hidden = [torch.randn(2, 4, 12) for _ in range(3)]
    parameters = make_parameters(dtype=torch.float32)
    wanted = parameters._replace(up_bias=parameters.up_bias.clone().requires_grad_())
    functional.select(hidden, parameters, frequencies=1)
    with torch.no_grad():
        functional.select(hidden, wanted, frequencies=1)
    assert told.pop(0) == (3, 12) and (3, 12) in told and set(told) <= {(3, 12), None}
    told.clear()
    functional.select(hidden, wanted, frequencies=1)
    functional.select(hidden, parameters, frequencies=1, training=True)
    functional.select(hidden, parameters, frequencies=1, profile="official")
    functional.select_pool(hidden, parameters, frequencies=1)
    assert set(told) == {None}


# ---------------------------------------------------------------- threads


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@BUILT
@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("mask", [None, "right", "packed"])
@pytest.mark.parametrize("batch_size", [1, B])
def test_bits_do_not_depend_on_the_number_of_threads(batch_size, mask, pooling):
    """Outputs, and the hidden states' gradients."""
    torch.manual_seed(0)
    size = 768  # large enough that every stage is shared
    parameters = s2.GateParameters(*(torch.randn(shape) for shape in ((H, size), (H,), (N * size, H), (N * size,))))
    hidden = [torch.randn(batch_size, L, size) for _ in range(N)]
    where = {}
    lengths = torch.tensor([L - 7 * b for b in range(batch_size)])
    if mask == "right":
        where = {"attention_mask": torch.arange(L) < lengths[:, None]}
    elif mask == "packed":
        hidden = [u.flatten(0, 1) for u in hidden]
        where = {"cu_seqlens": torch.arange(0, batch_size * L + 1, L, dtype=torch.int32)}

    def run():
        leaves = [u.detach().requires_grad_() for u in hidden]
        options = {"frequencies": M, "backend": "native", **where}
        if pooling is None:
            output = functional.select(leaves, parameters, **options)
        else:
            output = functional.select_pool(leaves, parameters, pooling=pooling, **options)
        return [output, *torch.autograd.grad(output.sum(), leaves)]

    results = []
    for number in (1, 2, 3):
        with threads(number):
            results.append(run())
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@BUILT
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_bits_do_not_depend_on_where_the_padding_is(pooling):
    torch.manual_seed(0)
    parameters = s2.GateParameters(*(torch.randn(shape) for shape in ((H, 64), (H,), (N * 64, H), (N * 64,))))
    hidden = [torch.randn(1, L, 64) for _ in range(N)]
    options = {"frequencies": M, "pooling": pooling, "backend": "native"}
    alone = functional.select_pool(hidden, parameters, **options)
    place = torch.stack([torch.randperm(3 * L).sort()[1][:L].sort()[0], torch.arange(2 * L, 3 * L)])  # holes, left
    padded = [torch.full((2, 3 * L, 64), float("nan")) for _ in range(N)]
    mask = torch.zeros(2, 3 * L, dtype=torch.bool).scatter(1, place, True)
    for u, wide in zip(hidden, padded, strict=True):
        wide[mask] = u.expand(2, -1, -1).flatten(0, 1)
    assert torch.equal(functional.select_pool(padded, parameters, mask, **options), alone.expand(2, -1))


# ---------------------------------------------------------------- storage types


@BUILT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_is_read_and_rounded_as_pytorch_does(dtype):
    """All 65536 of them, subnormal, infinite and NaN too, times numbers that make every kind of rounding."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None, None]
    generator = torch.Generator().manual_seed(0)
    for gates in (torch.ones(1, 1, 2**16), torch.rand(1, 1, 2**16, generator=generator) * 4, torch.full((), 0.5)):
        gates = gates.expand(1, 1, 2**16)
        found = functional.fuse([every], gates, backend="native")
        # fuse adds to 0, which turns -0 into 0
        assert torch.equal(found.nan_to_num(nan=123.0), (gates * every.float()).to(dtype).nan_to_num(nan=123.0))
        assert torch.equal(found.isnan(), every.isnan())


# ---------------------------------------------------------------- tables


@BUILT
def test_tables_of_factors_stay():
    """A captured CUDA graph reads them for as long as it is replayed, whatever else was computed since."""
    native = importlib.import_module("s2sent_kernels.native")
    device = torch.device("cpu")

    def tables():
        return [native._block_factors(n, 4, "paper", device)[0] for n in range(6, 90)] + [
            native._grid_factors(size, 4, device) for size in range(1, 90)
        ]

    assert all(a is b for a, b in zip(tables(), tables(), strict=True))


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
    """As if torch were built for CUDA 13.0 and nvcc of 13.1 were there; no GPU is."""
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
    """An error where it was asked for; "auto" builds the CPU part and says what is left out."""
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

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["80", "90a", "100", "120"])
def test_nvcc_compiles_every_source_without_spills(setup_py, tmp_path, architecture):
    sources = [source for source in setup_py.CUDA_SOURCES if source.endswith(".cu")]
    assert len(sources) > 5

    def compiled(source):
        command = [
            NVCC, *setup_py.NVCC_FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v", "-c",
            str(ROOT / source), "-o", str(tmp_path / (Path(source).stem + ".o")),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, result in zip(sources, pool.map(compiled, sources), strict=True):
            assert result.returncode == 0, result.stderr
            spills = re.findall(r"(\d+) bytes spill", result.stderr)
            assert spills and not any(map(int, spills)), f"{source} spills on sm_{architecture}: {result.stderr}"


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_nvcc_without_the_a_leaves_the_one_pass_kernel_empty_and_known_for_it(setup_py):
    """sm_90 without its own features: csrc/cuda/select.cu tells the kernel that does nothing by its registers."""
    source = (ROOT / "csrc/cuda/select.cuh").read_text()
    fewest = int(re.search(r"kLoaderRegisters = (\d+)", source)[1])
    used = {}
    for architecture in ("90", "90a"):
        command = [
            NVCC, *setup_py.NVCC_FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v", "-c",
            str(ROOT / "csrc/cuda/select.cu"), "-o", os.devnull,
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        used[architecture] = [int(count) for count in re.findall(r"Used (\d+) registers", result.stderr)]
    assert len(used["90"]) == len(used["90a"]) > 0
    assert max(used["90"]) < fewest <= min(used["90a"])
