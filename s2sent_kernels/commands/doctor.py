"""Print versions, the backends and why they are or are not usable."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

from .. import __version__, families
from ..capture import BlockCapture
from ..engines.choice import BACKEND_VARIABLE, backends, choose
from ..formula.call import Call
from ..packed import refusal
from ..validate import DEBUG_VARIABLE
from . import common

VARIABLES = (BACKEND_VARIABLE, DEBUG_VARIABLE, "TRITON_INTERPRET")
PACKAGES = ("torch", "triton", "transformers")


def add(commands: Any) -> None:
    about = "print versions, the backends and why they are or are not usable"
    command = commands.add_parser("doctor", help=about, description=about)
    command.add_argument(
        "--model",
        help="path or hub id of an encoder, or folder of encoder and selector: how it is run, too (default: none)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the contents of a bug report: versions, devices, environment variables, backends and reasons. With a model, whether
    its texts are encoded without padding, and why not."""
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
    if arguments.model is not None:
        lines += [(f"model {arguments.model}", line) for line in _model(arguments.model)]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def _model(model: str) -> list[str]:
    """Of what kind its encoder is, and whether it can be run packed on the CPU."""
    whole = common.holds_selector(model)
    encoder: Any
    if whole:
        encoder = common.load_pipeline(common.resolve(model, None)).encoder
    else:
        encoder, _, _ = common.load_model(model, torch.device("cpu"))
    with BlockCapture(encoder) as capture:
        reason = refusal(capture, torch.device("cpu"))
    blocks = f"{type(encoder).__name__} of {len(families.find_blocks(encoder))} blocks"
    return [blocks, "batches without padding" if reason is None else f"batches are padded: {reason}"]
