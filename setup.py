"""Builds the compiled backend, if S2SENT_BUILD and the tools here allow it; everything else is in pyproject.toml.

    S2SENT_BUILD=auto    (or unset) builds what it can: the CPU part needs a C++ compiler; the CUDA part also needs a torch
                         built for CUDA and nvcc of the same major version. Prints one line about what is left out, and why
    S2SENT_BUILD=0       pure Python
    S2SENT_BUILD=cpu     the CPU part, or an error that names what is missing
    S2SENT_BUILD=cuda    the CPU part and the CUDA part, or an error that names what is missing

No GPU is needed: the CUDA part is compiled for TORCH_CUDA_ARCH_LIST, or ARCHITECTURES if that is unset. MAX_JOBS limits how
many files are compiled at once, if ninja is installed.

torch is imported only to build the extension, so that a pure Python install works without it. Build with
``pip install --no-build-isolation``: isolation would hide the torch that the extension is for.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import setup

# torch says that numpy is missing, and setuptools that the checkout is what will be imported: nobody can act on either.
for said in ("Failed to initialize NumPy", r"\s*Editable installation"):
    warnings.filterwarnings("ignore", said)

CHOICES = ("auto", "0", "cpu", "cuda")
ROOT = Path(__file__).parent
INTERFACE_FILE = ROOT / "s2sent_kernels/engines/native/engine.py"


def files(*patterns):
    """Paths in csrc/ by glob, sorted, relative to this file."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


CUDA_SOURCES = files("bindings/cuda*.cpp", "cuda/**/*.cu")
CUDA_HEADERS = files("bindings/on_cuda.h", "cuda/**/*.h", "cuda/**/*.cuh")
SOURCES = [path for path in files("**/*.cpp") if path not in CUDA_SOURCES]
HEADERS = [path for path in files("**/*.h") if path not in CUDA_HEADERS]
# Compiled for by default, as far as nvcc supports them, plus PTX of the newest. csrc/cuda/sm90/ needs the "a".
ARCHITECTURES = ("8.0", "9.0a", "10.0", "12.0")
MINIMUM_TORCH = "2.11"
TARGET_VERSION = "0x020b000000000000"  # the stable ABI of MINIMUM_TORCH, also if built with a newer torch
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fvisibility=hidden",
    "-ffp-contract=off",  # a kernel gives the same bits on every instruction set that it is compiled for
    "-fno-math-errno", "-fno-trapping-math",  # lets conditional floating point vectorise; changes no bits
    "-Werror=switch",  # an enumerator without a case is an error
]  # fmt: skip
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA",
    "--fmad=false",  # only explicit fmaf is fused, so that variants of a kernel cannot differ
    "-Xcompiler=-Werror=switch",
]  # fmt: skip


def interface():
    """INTERFACE of the package: the number that tells it an extension built from other sources."""
    return re.search(r"^INTERFACE = (\d+)$", INTERFACE_FILE.read_text(encoding="utf-8"), re.MULTILINE)[1]


def missing():
    """What a build of the CPU part lacks here, or None."""
    if sys.platform == "win32":
        return "a compiler that takes GCC's options (Windows is not supported)"
    if importlib.util.find_spec("torch") is None:
        return "torch (install it first, then build with --no-build-isolation)"
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"a C++ compiler ({compiler!r} is not on the PATH; the variable CXX names another)"
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < tuple(int(part) for part in MINIMUM_TORCH.split(".")):
        return f"torch {MINIMUM_TORCH} or newer (got {torch.__version__})"
    return None


def nvcc_release(nvcc):
    """(major, minor) of the compiler at ``nvcc``, or None."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return found and (int(found[1]), int(found[2]))


def cuda_home():
    """The CUDA toolkit that torch uses: CUDA_HOME, CUDA_PATH, nvcc on the PATH, or /usr/local/cuda."""
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME


def missing_cuda():
    """What a build of the CUDA part lacks here, apart from what the CPU part needs, or None. Does not query a GPU."""
    import torch

    if torch.version.cuda is None:
        return f"a torch built for CUDA (got {torch.__version__})"
    home = cuda_home()
    release = home and nvcc_release(os.path.join(home, "bin", "nvcc"))
    if not release:
        return f"nvcc (CUDA_HOME is {home!r}; the variable CUDA_HOME names another)"
    if release[0] != int(torch.version.cuda.split(".")[0]):
        return (
            f"nvcc of CUDA {torch.version.cuda}'s major version, as torch's (got {release[0]}.{release[1]} in {home})"
        )
    return None


def architectures():
    """The default of TORCH_CUDA_ARCH_LIST: those of ARCHITECTURES that nvcc supports, and PTX for newer GPUs."""
    command = [os.path.join(cuda_home(), "bin", "nvcc"), "--list-gpu-code"]
    known = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    found = [arch for arch in ARCHITECTURES if "sm_" + arch.strip("a").replace(".", "") in known]
    return ";".join(found) + "+PTX"


def extension(cuda=False):
    """Arguments of ``setup`` that build s2sent_kernels._C: one abi3 library for every supported Python and torch."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    macros = [("TORCH_TARGET_VERSION", TARGET_VERSION), ("S2SENT_INTERFACE", interface())]
    depends = [*HEADERS, INTERFACE_FILE.relative_to(ROOT).as_posix()]
    if cuda:
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
        module = CUDAExtension(
            "s2sent_kernels._C",
            SOURCES + CUDA_SOURCES,
            depends=depends + CUDA_HEADERS,
            define_macros=[*macros, ("S2SENT_CUDA", None)],
            # USE_CUDA declares the CUDA functions of torch's stable ABI
            extra_compile_args={"cxx": [*FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
            py_limited_api=True,
        )
    else:
        module = CppExtension(
            "s2sent_kernels._C",
            SOURCES,
            depends=depends,
            define_macros=macros,
            extra_compile_args=FLAGS,
            py_limited_api=True,
        )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=cuda)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def decide(choice):
    """Arguments of ``setup`` for S2SENT_BUILD=choice."""
    if choice not in CHOICES:
        raise SystemExit(f"S2SENT_BUILD: expected one of {CHOICES}, got {choice!r}")
    if choice == "0":
        return {}
    lacking = missing()
    if lacking is not None:
        if choice != "auto":
            raise SystemExit(f"S2SENT_BUILD: {choice!r} needs {lacking}")
        print(f"s2sent_kernels: pure Python, without the compiled backend: it needs {lacking}")
        return {}
    if choice == "cpu":
        return extension()
    lacking = missing_cuda()
    if lacking is None:
        return extension(cuda=True)
    if choice == "cuda":
        raise SystemExit(f"S2SENT_BUILD: 'cuda' needs {lacking}")
    print(f"s2sent_kernels: the compiled backend for the CPU alone: its CUDA part needs {lacking}")
    return extension()


if __name__ == "__main__":
    setup(**decide(os.environ.get("S2SENT_BUILD") or "auto"))
