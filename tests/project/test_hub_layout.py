"""`make hub`: the layout is complete, imports nothing by the package's name, and lives in one process with the package."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import s2sent_kernels

ROOT = Path(__file__).parents[2]
B, L, N, D = 2, 5, 3, 16
# Imported inside functions, where a name says what it needs; at import torch is all.
OPTIONAL = {"triton", "safetensors"}

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


def layout():
    spec = importlib.util.spec_from_file_location("s2sent_hub_layout", ROOT / "hub" / "layout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub")
    layout().write(target)
    return target


def imported(variant):
    """The module of a variant, as the library imports it."""
    identity = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(identity, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[identity] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def copy(folder):
    return imported(folder / "build" / "torch-cpu")


def test_variants_and_what_they_say(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "NOTICE", "README.md", "build"]
    said = {path.name: json.loads((path / "metadata.json").read_text()) for path in (folder / "build").iterdir()}
    assert said.keys() == {"torch-cpu", "torch-cuda"}
    for name, metadata in said.items():
        assert metadata["backend"] == {"type": name.removeprefix("torch-")} and metadata["name"] == "s2sent-kernels"
        assert metadata["id"].isidentifier() and metadata["python-depends"] == []
    assert said["torch-cpu"]["id"] != said["torch-cuda"]["id"]
    assert not list(folder.rglob("*.so")) and not list(folder.rglob("__pycache__"))


def test_imports_are_relative_and_lead_into_the_layout(folder):
    variant = folder / "build" / "torch-cuda"
    modules = sorted(variant.rglob("*.py"))
    assert len(modules) > 40
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops = {node.module.partition(".")[0]}
            elif isinstance(node, ast.ImportFrom):
                place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                there = place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
                assert place.is_relative_to(variant) and there, f"{path}:{node.lineno}"
                if node.module is None or (place.is_dir() and not (place / "__init__.py").read_text().strip()):
                    for alias in node.names:
                        assert (place / f"{alias.name}.py").is_file() or (place / alias.name).is_dir(), alias.name
                continue
            else:
                continue
            assert tops <= sys.stdlib_module_names | {"torch"} | OPTIONAL, f"{path}:{node.lineno}: {tops}"


def test_it_has_the_packages_public_names(copy):
    assert set(copy.__all__) == set(s2sent_kernels.__all__) - {"Embedder"}
    for name in copy.__all__:
        assert getattr(copy, name) is not getattr(s2sent_kernels, name)


def states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, L, D, generator=generator).requires_grad_() for _ in range(N)]


def result(package, training):
    """o, and its gradients, of a selector of this copy of the package, by its ops over the reference."""
    torch.manual_seed(0)
    selector = package.S2SentSelector(D, N, 4, 2, block_prior=True, backend="reference").train(training)
    u = states()
    out = selector.pool(u)
    out.square().sum().backward()
    return [out.detach(), *(each.grad for each in u), *(each.grad for each in selector.parameters())]


@pytest.mark.parametrize("training", [False, True])
def test_the_same_bits_as_the_package(copy, training):
    for mine, theirs in zip(result(copy, training), result(s2sent_kernels, training), strict=True):
        assert torch.equal(mine, theirs)


def test_its_ops_are_its_own(copy):
    own = getattr(torch.ops, copy.__name__)
    u = [each.detach() for each in states()]
    arguments = (u, None, None, 2, "paper", "mean", "reference")
    assert torch.equal(own.squeeze(*arguments)[0], torch.ops.s2sent.squeeze(*arguments)[0])
    assert {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{copy.__name__}::")} == {
        name.replace("s2sent::", f"{copy.__name__}::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("s2sent::")
    }
    assert not copy.backends()["native"].usable  # that of the package is not taken


def test_selectors_go_between_copies_as_folders(copy, tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    ours = s2sent_kernels.S2SentSelector(D, N, 4, 2, backend="reference").eval()
    ours.save_pretrained(tmp_path / "selector")
    theirs = copy.S2SentSelector.from_pretrained(tmp_path / "selector", backend="reference")
    assert torch.equal(ours.pool(states()), theirs.pool(states()))
    assert copy.S2SentSelector.from_pretrained("all-MiniLM-L6-v2").hidden_size == 384


def test_another_content_is_another_name(folder, tmp_path, monkeypatch):
    module = layout()
    files = {**module.contents(), "more.py": b""}
    monkeypatch.setattr(module, "contents", lambda: files)
    module.write(tmp_path)
    ids = [json.loads((one / "build/torch-cpu/metadata.json").read_text())["id"] for one in (folder, tmp_path)]
    assert ids[0] != ids[1]


def test_a_folder_of_something_else_is_kept(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="folder: expected one that is new, empty or an older layout"):
        layout().write(tmp_path)
    assert (tmp_path / "mine").exists()


SCRIPT = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
copy = get_local_kernel(Path(sys.argv[1]))
torch.manual_seed(0)
selector = copy.S2SentSelector(16, 3, 4, 2, backend="reference").eval()
u = [torch.randn(2, 5, 16) for _ in range(3)]
with torch.no_grad():
    expected = selector.pool(u)
    selector.backend = "triton"
    torch.testing.assert_close(selector.pool(u), expected)
print(copy.__name__)
"""


def test_the_library_loads_it(folder):
    """And its Triton kernels run, in the interpreter. Not among the extras: transformers behaves otherwise where it is there."""
    pytest.importorskip("kernels")
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("_s2sent_kernels_cpu_")
