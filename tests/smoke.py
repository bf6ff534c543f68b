"""What an installed distribution has to do with torch alone beside it; `make release` runs this file outside of the checkout:

    python smoke.py VERSION

Run by no pytest: it looks at what is installed, and the tests run on the checkout.
"""

import importlib.metadata
import subprocess
import sys
from importlib import resources
from pathlib import Path

import torch

import s2sent_kernels
from s2sent_kernels import GateParameters, S2SentSelector, backends, select_pool

B, L, N, D, H = 3, 5, 3, 16, 4


def main(version):
    distribution = importlib.metadata.distribution("s2sent_kernels")
    assert version == s2sent_kernels.__version__ == distribution.version, (version, distribution.version)
    assert Path(s2sent_kernels.__file__).parent.parent == Path(distribution.locate_file("")), s2sent_kernels.__file__
    others = {other.name for other in importlib.metadata.distributions()} & {"transformers", "numpy", "safetensors"}
    assert not others, f"expected torch alone, found {others}"

    names = {Path(str(path)).name for path in distribution.files or ()}
    assert {"LICENSE", "NOTICE", "py.typed"} <= names, names
    data = resources.files("s2sent_kernels") / "data"
    for path in ("sentences.txt", "all-MiniLM-L6-v2/model.safetensors", "all-mpnet-base-v2/model.safetensors"):
        assert (data / path).is_file(), path

    native = backends()["native"]
    assert native.usable, native.reason
    states = [torch.randn(B, L, D) for _ in range(N)]
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    gate = GateParameters(torch.randn(H, D), torch.zeros(H), torch.randn(N * D, H), torch.zeros(N * D), *[None] * 5)
    found, expected = (
        select_pool(states, gate, mask, frequencies=2, backend=backend) for backend in ("native", "reference")
    )
    torch.testing.assert_close(found, expected)

    selector = S2SentSelector(hidden_size=D, num_blocks=N, bottleneck=H, frequencies=2, block_prior=True)
    selector.pool(states, mask).square().sum().backward()
    assert all(parameter.grad is not None for parameter in selector.parameters())

    said = subprocess.run(
        [Path(sys.executable).with_name("s2sent"), "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == f"s2sent_kernels {version}", said.stdout
    failed = subprocess.run([Path(sys.executable).with_name("s2sent"), "demo"], capture_output=True, text=True)
    assert failed.returncode == 2 and "s2sent_kernels[demo]" in failed.stderr, failed.stderr
    print(f"s2sent_kernels {version} beside torch {torch.__version__} alone: native {native.reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
