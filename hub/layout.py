"""The part of the package that the library `kernels` loads from a hub or a folder: functions, module, ops, the Triton kernels and
the plain PyTorch that they are tested against. No compiled code, no encoders, no commands.

    python hub/layout.py [build/hub]      then kernels.get_local_kernel(Path("build/hub"))

    FOLDER/build/torch-cpu/, torch-cuda/     the same modules, imported under a name of the library's choice
    FOLDER/build/*/metadata.json             that name
    FOLDER/README.md, LICENSE, NOTICE

A process may hold several releases of a kernel, and the pip package beside them. So each has its ops in a namespace of its own,
which ends in a hash of what the folder holds; ops/namespace.py is the file that differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "s2sent_kernels"
NAME, VERSION = "s2sent-kernels", 1  # VERSION: of the public names; the hub counts it apart from the package's
BACKENDS = ("cpu", "cuda")
MODULES = (
    "blockwise.py", "derivatives.py", "files.py", "functional.py", "offloaded.py", "plan.py", "recomputed.py", "scalars.py",
    "selector.py", "synchronised.py", "validate.py", "checkpoints/__init__.py", "checkpoints/pretrained.py",
    "checkpoints/published.py", "checkpoints/tensors.py", "engines/**/*.py", "formula/**/*.py", "ops/**/*.py", "data/*/*",
)  # fmt: skip
NAMESPACE_FILE = "ops/namespace.py"


def contents() -> dict[str, bytes]:
    """The files of a variant by their paths, but for its metadata and its namespace."""
    found = sorted({path for pattern in MODULES for path in PACKAGE.glob(pattern)})
    files = {path.relative_to(PACKAGE).as_posix(): path.read_bytes() for path in found}
    return {"__init__.py": (ROOT / "hub" / "__init__.py").read_bytes(), **files}


def write(folder: Path) -> None:
    """Write the layout to ``folder``, which is new, empty, or holds an older layout, which is removed."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "build" / "torch-cpu" / "metadata.json").is_file():
        raise SystemExit(f"folder: expected one that is new, empty or an older layout, got {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    files = contents()
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    own = files[NAMESPACE_FILE].decode()
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        identity = f"_{NAME.replace('-', '_')}_{backend}_{digest.hexdigest()[:12]}"
        renamed = own.replace('NAMESPACE = "s2sent"', f'NAMESPACE = "{identity}"')
        assert renamed != own, NAMESPACE_FILE
        metadata = {
            "name": NAME,
            "id": identity,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        mine = {NAMESPACE_FILE: renamed.encode(), "metadata.json": f"{json.dumps(metadata, indent=2)}\n".encode()}
        for name, content in (files | mine).items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for source in (ROOT / "hub" / "README.md", ROOT / "LICENSE", ROOT / "NOTICE"):
        shutil.copy(source, folder / source.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "hub")
    write(parser.parse_args().folder)
