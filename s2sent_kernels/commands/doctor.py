"""Print versions, the backends and why they are or are not usable."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

from .. import __version__
from ..engines.choice import BACKEND_VARIABLE, backends, choose
from ..formula.call import Call
from ..validate import DEBUG_VARIABLE

VARIABLES = (BACKEND_VARIABLE, DEBUG_VARIABLE, "TRITON_INTERPRET")
PACKAGES = ("torch", "triton", "transformers")


def add(commands: Any) -> None:
    about = "print versions, the backends and why they are or are not usable"
    commands.add_parser("doctor", help=about, description=about)


def run(_: argparse.Namespace) -> None:
    """Print the contents of a bug report: versions, devices, environment variables, backends and reasons."""
    lines = [("s2sent_kernels", __version__), ("python", f"{platform.python_version()}, {platform.platform()}")]
    for package in PACKAGES:
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        lines.append(("CUDA", f"torch was built with {torch.version.cuda or 'none'}"))
        for index in range(torch.cuda.device_count()):
            capability = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
            lines.append((f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {capability}"))
    else:
        lines.append(("CUDA", f"torch was built with {torch.version.cuda or 'none'}; no device"))
    lines += [(name, os.environ.get(name, "not set")) for name in VARIABLES]
    for name, status in backends().items():
        lines.append((f"backend {name}", f"{'usable' if status.usable else 'not usable'}: {status.reason}"))
    for device in devices:
        try:
            chosen = choose("auto", Call(torch.device(device), torch.float32))
        except ValueError as error:
            chosen = f"raises: {error}"
        lines.append((f"'auto' on {device}", chosen))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
