"""Whether the compiled backend is built. S2SENT_BUILD decides; everything else stands in pyproject.toml.

    S2SENT_BUILD=auto    (or unset) the CPU part where torch can be imported and a C++ compiler is there; else pure Python,
                         and one printed line says why
    S2SENT_BUILD=0       pure Python
    S2SENT_BUILD=cpu     the CPU part, or an error that names what is missing
    S2SENT_BUILD=cuda    does not exist yet: an error

torch is imported only where something is built, so that a pure Python install works without it. Build with
``pip install --no-build-isolation``: isolation would hide the torch that the extension is for.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig

from setuptools import setup

CHOICES = ("auto", "0", "cpu", "cuda")
SOURCES = ["csrc/bindings.cpp", "csrc/cpu/fuse.cpp", "csrc/cpu/gate.cpp", "csrc/cpu/squeeze.cpp"]
HEADERS = ["csrc/cpu/batch.h", "csrc/cpu/fuse.h", "csrc/cpu/gate.h", "csrc/cpu/squeeze.h"]
MINIMUM_TORCH = "2.11"
TARGET_VERSION = "0x020b000000000000"  # the stable ABI as of MINIMUM_TORCH, whatever newer torch it is built with
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fvisibility=hidden",
    "-ffp-contract=off",  # a kernel compiled for several instruction sets gives the same bits on each
    "-fno-math-errno", "-fno-trapping-math",  # conditional floating point vectorises; changes no bits
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


def extension():
    """Arguments of ``setup`` that build s2sent_kernels._C: one abi3 library for every Python and every torch that is new
    enough."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    module = CppExtension(
        "s2sent_kernels._C",
        SOURCES,
        depends=HEADERS,
        define_macros=[("TORCH_TARGET_VERSION", TARGET_VERSION)],
        extra_compile_args=FLAGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def decide(choice):
    """Arguments of ``setup`` for S2SENT_BUILD=choice."""
    if choice not in CHOICES:
        raise SystemExit(f"S2SENT_BUILD: expected one of {CHOICES}, got {choice!r}")
    if choice == "0":
        return {}
    if choice == "cuda":
        raise SystemExit("S2SENT_BUILD: the CUDA part of the compiled backend does not exist yet, got 'cuda'")
    lacking = missing()
    if lacking is None:
        return extension()
    if choice == "cpu":
        raise SystemExit(f"S2SENT_BUILD: 'cpu' needs {lacking}")
    print(f"s2sent_kernels: pure Python, without the compiled backend: it needs {lacking}")
    return {}


if __name__ == "__main__":
    setup(**decide(os.environ.get("S2SENT_BUILD") or "auto"))
