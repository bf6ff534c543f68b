"""The house rules that a program can check, from the syntax trees of the sources; nothing of the package is imported."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "s2sent_kernels"
MOST_PARAMETERS = 8
LONGEST_FILE = 400
MOST_SKIPS = 40
# Public functions and methods, whose signatures are promises.
PUBLIC = {
    "functional.py": {"squeeze", "gate", "fuse", "select", "select_pool"},
    "selector.py": {"S2SentSelector.__init__"},
    "transformers.py": {"S2SentModel.forward"},
    "embedder.py": {"Embedder.__init__"},
    "saved_model.py": {"S2SentConfig.__init__"},
    "frozen.py": {"fit", "prepare"},
}
# Where a signature is given from outside: an op's schema, a kernel's pointers and strides.
EXEMPT = ("ops", "engines/triton")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


def sources(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes)


def functions(tree: ast.AST, prefix: str = ""):
    """(qualified name, node) of every function, methods and nested functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        name = getattr(node, "name", None)
        yield from functions(node, f"{prefix}{name}." if isinstance(name, str) else prefix)


def parameters(node: ast.FunctionDef) -> list[str]:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_no_function_has_more_than_eight_parameters():
    """A call is a Batch, a Reading and a Gating; only public functions and op boundaries unpack them."""
    found = []
    for path in sources(PACKAGE, ".py"):
        place = path.relative_to(PACKAGE).as_posix()
        if place.startswith(EXEMPT):
            continue
        for name, node in functions(ast.parse(path.read_text(encoding="utf-8"))):
            count = len(parameters(node))
            if count > MOST_PARAMETERS and name not in PUBLIC.get(place, ()):
                found.append(f"{place}:{node.lineno}: {name} has {count}")
    assert not found, "\n".join(found)


def test_launches_and_helpers_of_triton_have_no_more_than_eight_parameters():
    """engines/triton is exempt for its kernels alone: functions with @triton.jit and those that only they call."""
    found = []
    for path in sources(PACKAGE / "engines" / "triton", ".py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            if len(parameters(node)) > MOST_PARAMETERS:
                found.append(f"{path.name}:{node.lineno}: {node.name} has {len(parameters(node))}")
    assert not found, "\n".join(found)


def test_nothing_else_is_committed_at_the_top():
    """What a command or a test writes into the current folder has been committed before."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a clone")
    assert {Path(line).parts[0] for line in files.stdout.splitlines()} <= {
        *(
            ".ci",
            ".gitattributes",
            ".gitignore",
            "CHANGELOG.md",
            "CITATION.cff",
            "CONTRIBUTING.md",
            "LICENSE",
            "MANIFEST.in",
            "Makefile",
            "NOTICE",
        ),
        *(
            "README.md",
            "bench",
            "csrc",
            "docs",
            "hub",
            "noxfile.py",
            "pyproject.toml",
            "s2sent_command.py",
            "s2sent_kernels",
            "setup.py",
            "tests",
        ),
    }


def test_files_are_short():
    files = sources(PACKAGE, ".py") + sources(ROOT / "csrc", ".cpp", ".h", ".cu", ".cuh")
    assert len(files) > 50
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {name: length for name, length in lengths.items() if length > LONGEST_FILE}
    assert not long


def test_few_lines_are_kept_from_the_formatter():
    """`fmt: skip` only where a table is easier to read."""
    mark = "# fmt: " + "skip"
    folders = [PACKAGE, ROOT / "bench", ROOT / "tests"]
    paths = [path for folder in folders for path in sources(folder, ".py")] + [ROOT / "setup.py"]
    counts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count(mark) for path in paths}
    assert sum(counts.values()) < MOST_SKIPS, {name: count for name, count in counts.items() if count}


def module_of(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_sets_a_global_of_another():
    """An engine's behaviour follows from its arguments; native has no global ONE_PASS."""
    found = []
    for path in sources(PACKAGE, ".py") + sources(ROOT / "bench", ".py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = imported_modules(tree)
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                continue
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) in modules:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(target)}")
    assert not found, "\n".join(found)
    native = ast.parse((PACKAGE / "engines" / "native" / "engine.py").read_text(encoding="utf-8"))
    names = {name.id for node in native.body for name in ast.walk(node) if isinstance(name, ast.Name)}
    assert "ONE_PASS" not in names


def imported_modules(tree: ast.AST) -> set[str]:
    """The names under which a file imports modules of the package."""
    known = {module_of(path) for path in sources(PACKAGE, ".py")}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origin = (node.module or "").removeprefix("s2sent_kernels").strip(".")
            for alias in node.names:
                names = (f"{origin}.{alias.name}".strip("."), alias.name)
                if any(name in known or any(one.endswith("." + name) for one in known) for name in names):
                    found.add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name for alias in node.names if alias.name.startswith("s2sent_kernels")}
    return found
