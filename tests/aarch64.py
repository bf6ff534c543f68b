"""`make aarch64`: the CPU part of the extension on the other processor that wheels are asked for, without one.

    python tests/aarch64.py [--folder build/aarch64]

The cross compiler builds the extension by setup.py, and QEMU's user emulation runs Python, torch and the tests. Needs Debian 12
with the packages that ``TOOLS`` names, `dpkg --add-architecture arm64`, and 6 GB: torch's wheels for aarch64 are built for CUDA
and load its libraries. What came of it is kept in docs/compatibility.json. An emulated processor computes what a real one does,
bit by bit, but its speed says nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from compatibility import EMULATED, GROUPS, PACKAGES, ROOT, Outcome, counts, keep

TOOLS = {
    "qemu-aarch64-static": "qemu-user-static",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "apt-get": "apt",
    "dpkg": "dpkg",
}
PYTHON = "3.11"  # of Debian 12
# Python, its headers, and the libraries that they and torch load.
DEBIAN = (
    "python3.11", "python3.11-minimal", "libpython3.11", "libpython3.11-dev", "libpython3.11-minimal", "libpython3.11-stdlib",
    "libc6", "libstdc++6", "libgcc-s1", "libgomp1", "libssl3", "libffi8", "zlib1g", "libbz2-1.0", "liblzma5", "libsqlite3-0",
    "libexpat1", "libuuid1", "libreadline8", "libtinfo6", "libncursesw6", "libcrypt1",
)  # fmt: skip
GLIBC = (17, 18, 24, 25, 26, 27, 28)  # releases 2.x whose manylinux wheels run on Debian 12
WITH = ("numpy<2.4", "pytest>=8", "hypothesis>=6", "safetensors>=0.5", "setuptools>=77,<82")
# oneDNN and cpuinfo ask Linux which processor this is, and do not expect another machine's answer.
CPU, MIDR = "neoverse-n1", "0x00000000413fd0c1"
CPUINFO = """processor\t: {}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
INTERPRETER = """#!/bin/sh
export QEMU_CPU={cpu} QEMU_STACK_SIZE={stack}
exec qemu-aarch64-static -L {root} {root}/usr/bin/python3.11 "$@"
"""
TRIED = ("golden files, formulas", "ops", "native")  # of compatibility.GROUPS: what needs the extension and torch alone


def system(folder: Path) -> Path:
    """The root folder of a Debian for aarch64 with what Python needs, and files that describe its processor."""
    root, packages = folder / "root", folder / "packages"
    if not (root / "usr/bin/python3.11").exists():
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *(f"{name}:arm64" for name in DEBIAN)], cwd=packages, check=True)
        for package in packages.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, root], check=True)
    (root / "proc").mkdir(exist_ok=True)
    cores = range(os.cpu_count() or 1)
    (root / "proc/cpuinfo").write_text("".join(map(CPUINFO.format, cores)))
    for core in cores:
        registers = root / f"sys/devices/system/cpu/cpu{core}/regs/identification"
        registers.mkdir(parents=True, exist_ok=True)
        (registers / "midr_el1").write_text(MIDR + "\n")
    return root


def libraries(folder: Path) -> Path:
    """The folder that torch and what the tests need are installed into."""
    site = folder / "site"
    if not (site / "torch").exists():
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", site, "--only-binary=:all:"]
        command += ["--python-version=3.11", *platforms, "--platform=manylinux2014_aarch64"]
        subprocess.run([*command, f"torch=={EMULATED['aarch64'].torch}", *WITH], check=True)
    return site


class Machine:
    """An emulated one, with a copy of the checkout's tracked files: the built extension must not stay in the checkout."""

    def __init__(self, folder: Path) -> None:
        self.root, self.site, self.source = system(folder), libraries(folder), folder / "source"
        # Linux starts programs of this machine alone: what the tests start as sys.executable is a script of it.
        self.interpreter = folder / "python"
        self.interpreter.write_text(INTERPRETER.format(stack=2**27, cpu=CPU, root=self.root))
        self.interpreter.chmod(0o755)
        (self.site / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(self.interpreter)!r}\n")
        shutil.rmtree(self.source, ignore_errors=True)
        self.source.mkdir()
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        archive = ["tar", "--create", "--null", "--files-from=-"]
        packed = subprocess.run(archive, cwd=ROOT, input=files, capture_output=True, check=True).stdout
        subprocess.run(["tar", "--extract"], cwd=self.source, input=packed, check=True)

    def python(self, *arguments: str, check: bool = True, **environment: str) -> None:
        settings = {"PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        command = [self.interpreter, *arguments]
        subprocess.run(command, cwd=self.source, env=os.environ | settings | environment, check=check)

    def build(self) -> None:
        """setup.py runs in the emulator; the cross compiler that it starts is a program of this machine."""
        cross = {"CXX": "aarch64-linux-gnu-g++", "CC": "aarch64-linux-gnu-gcc", "CPATH": str(self.root / "usr/include")}
        self.python("setup.py", "--quiet", "build_ext", "--inplace", S2SENT_BUILD="cpu", MAX_JOBS="1", **cross)

    def versions(self) -> dict[str, str]:
        found = {one.name: one.version for one in importlib.metadata.distributions(path=[str(self.site)])}
        return {package: found.get(package, "") for package in ("python", *PACKAGES)} | {"python": PYTHON}


def main() -> None:
    parser = argparse.ArgumentParser(description="The extension's CPU part on an emulated aarch64.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "aarch64", help="where it is made and kept")
    folder = parser.parse_args().folder.resolve()
    lacking = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if lacking:
        parser.error(f"needs Debian's packages {', '.join(lacking)}")
    machine = Machine(folder)
    machine.build()
    found = {}
    for group in TRIED:
        environment, *tests = GROUPS[group]
        report = folder / "report.xml"
        report.unlink(missing_ok=True)
        arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests)
        machine.python(*arguments, check=False, **environment)
        found[group] = counts(report)
    keep("aarch64", Outcome(machine.versions(), found), "aarch64, emulated")
    sys.exit(sum(group["failed"] for group in found.values()) > 0)


if __name__ == "__main__":
    main()
