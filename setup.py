"""Whether the compiled backend is built. S2SENT_BUILD decides; everything else stands in pyproject.toml.

    S2SENT_BUILD=auto    (or unset) what torch and the tools here allow: the CPU part needs a C++ compiler, the CUDA part also
                         a torch built for CUDA and nvcc of its major version. Without the first it is pure Python. One
                         printed line says what is left out and why
    S2SENT_BUILD=0       pure Python
    S2SENT_BUILD=cpu     the CPU part, or an error that names what is missing
    S2SENT_BUILD=cuda    the CPU part and the CUDA part, or an error that names what is missing

No GPU need be there: TORCH_CUDA_ARCH_LIST says for which ones the CUDA part is compiled (unset: ARCHITECTURES). MAX_JOBS
bounds how many files are compiled at once, where ninja is installed.

torch is imported only where something is built, so that a pure Python install works without it. Build with
``pip install --no-build-isolation``: isolation would hide the torch that the extension is for.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig

from setuptools import setup

CHOICES = ("auto", "0", "cpu", "cuda")
SOURCES = [
    "csrc/bindings.cpp", "csrc/bindings_cpu.cpp", "csrc/cpu/fuse.cpp", "csrc/cpu/gate.cpp", "csrc/cpu/squeeze.cpp",
    "csrc/cpu/tokens.cpp",
]  # fmt: skip
HEADERS = [
    "csrc/bindings.h", "csrc/cpu/batch.h", "csrc/cpu/fuse.h", "csrc/cpu/gate.h", "csrc/cpu/squeeze.h", "csrc/cpu/tokens.h",
    "csrc/stages.h",
]  # fmt: skip
CUDA_SOURCES = [
    "csrc/bindings_cuda.cpp", "csrc/cuda/device.cu", "csrc/cuda/fuse.cu", "csrc/cuda/fuse_backward.cu", "csrc/cuda/gate.cu",
    "csrc/cuda/gate_backward.cu", "csrc/cuda/product.cu", "csrc/cuda/select.cu", "csrc/cuda/squeeze.cu",
    "csrc/cuda/squeeze_backward.cu", "csrc/cuda/tokens.cu",
]  # fmt: skip
CUDA_HEADERS = [
    "csrc/cuda/cluster.cuh", "csrc/cuda/gate.cuh", "csrc/cuda/launch.h", "csrc/cuda/select.cuh", "csrc/cuda/tokens.cuh",
]  # fmt: skip
# Those of them that nvcc knows, and PTX of the newest. csrc/cuda/select.cu needs the "a".
ARCHITECTURES = ("8.0", "9.0a", "10.0", "12.0")
MINIMUM_TORCH = "2.11"
TARGET_VERSION = "0x020b000000000000"  # the stable ABI as of MINIMUM_TORCH, whatever newer torch it is built with
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fvisibility=hidden",
    "-ffp-contract=off",  # a kernel compiled for several instruction sets gives the same bits on each
    "-fno-math-errno", "-fno-trapping-math",  # conditional floating point vectorises; changes no bits
]  # fmt: skip
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA",
    "--fmad=false",  # variants of a kernel cannot differ in what is fused: fmaf stands where it is meant
]  # fmt: skip


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
    """Where torch looks for the CUDA toolkit: CUDA_HOME, CUDA_PATH, nvcc on the PATH, or /usr/local/cuda."""
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME


def missing_cuda():
    """What a build of the CUDA part lacks here beyond the CPU part's needs, or None. No GPU is asked for."""
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
    """TORCH_CUDA_ARCH_LIST where it is unset: those of ARCHITECTURES that nvcc compiles for, and PTX for newer ones."""
    command = [os.path.join(cuda_home(), "bin", "nvcc"), "--list-gpu-code"]
    known = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    found = [arch for arch in ARCHITECTURES if "sm_" + arch.strip("a").replace(".", "") in known]
    return ";".join(found) + "+PTX"


def extension(cuda=False):
    """Arguments of ``setup`` that build s2sent_kernels._C: one abi3 library for every Python and every torch that is new
    enough."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    macros = [("TORCH_TARGET_VERSION", TARGET_VERSION)]
    if cuda:
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
        module = CUDAExtension(
            "s2sent_kernels._C",
            SOURCES + CUDA_SOURCES,
            depends=HEADERS + CUDA_HEADERS,
            define_macros=[*macros, ("S2SENT_CUDA", None)],
            # USE_CUDA declares torch's CUDA functions of the stable ABI
            extra_compile_args={"cxx": [*FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
            py_limited_api=True,
        )
    else:
        module = CppExtension(
            "s2sent_kernels._C",
            SOURCES,
            depends=HEADERS,
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
