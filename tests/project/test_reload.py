"""importlib.reload of every module, as notebooks do: an op or a configuration that is registered already is no error."""

import subprocess
import sys

RELOAD = """
import importlib, pkgutil, sys
import torch
import s2sent_kernels

for module in pkgutil.walk_packages(s2sent_kernels.__path__, "s2sent_kernels."):
    try:
        importlib.import_module(module.name)
    except ImportError:  # of an optional package
        pass
names = [name for name in sys.modules if name.split(".")[0] == "s2sent_kernels" and not name.endswith("._C")]
assert "s2sent_kernels.ops.library" in names
for _ in range(2):
    for name in names:
        importlib.reload(sys.modules[name])
for backend in s2sent_kernels.backends():
    if not s2sent_kernels.backends()[backend].usable:
        continue
    device = "cuda" if backend == "triton" else "cpu"
    selector = s2sent_kernels.S2SentSelector(16, 3, 5, backend=backend).eval().to(device)
    states = [torch.randn(2, 4, 16, requires_grad=True, device=device) for _ in range(3)]
    for call in (selector, selector.pool, torch.compile(selector, backend="aot_eager", fullgraph=True)):
        call(states).sum().backward()
    assert all(state.grad.any() for state in states)
print("fine")
"""


def test_every_module_can_be_reloaded():
    done = subprocess.run([sys.executable, "-c", RELOAD], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
