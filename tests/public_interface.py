"""The public interface as text: what docs/design.md calls public, with signatures, fields and attributes, and every option of the
command line.

    python tests/public_interface.py        # writes tests/data/interface.txt

It is read from the sources' syntax trees, so that it is the same under every release of Python and torch, and needs no extra.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").is_file())
PACKAGE = "s2sent_kernels"
RECORD = ROOT / "tests" / "data" / "interface.txt"
HEADING = "## What is public"
# Methods of Python's own protocols that callers use, by syntax or by name.
PROTOCOLS = ("__init__", "__call__", "__len__", "__iter__", "__getitem__", "__enter__", "__exit__")
KINDS = ("property", "cached_property", "classmethod", "staticmethod", "overload", "setter")

Definition = ast.FunctionDef | ast.ClassDef


def public() -> dict[str, list[str]]:
    """The public names of each public module, from the table of docs/design.md."""
    section = (
        (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", section, re.M)
    return {module: re.findall(r"`(\w+)`", names) for module, names in rows}


# ---------------------------------------------------------------- definitions


class Found(NamedTuple):
    module: str
    nodes: list[Definition]  # several where a function has overloads


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tree_of(module: str) -> ast.Module:
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def origins(module: str) -> dict[str, tuple[str, str]]:
    """What a module imports from the package: where each name comes from, and its name there."""
    package = module.split(".") if source_of(module).name == "__init__.py" else module.split(".")[:-1]
    found = {}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) + 1 - node.level]
            for alias in node.names:
                origin = ".".join([*start, *filter(None, [node.module])])
                found[alias.asname or alias.name] = (origin, alias.name)
    return found


def find(module: str, name: str) -> Found | None:
    """The definition of a function or class of the package; None where it is defined elsewhere or is another thing.

    Raises:
        LookupError: the module neither defines nor imports the name.
    """
    body = tree_of(module).body
    nodes = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    if nodes:
        return Found(module, nodes)
    if name in origins(module):
        return find(*origins(module)[name])
    if name not in {target.id for node in ast.walk(tree_of(module)) for target in targets(node)} | imported(module):
        raise LookupError(f"{module} has no {name}")
    return None


def targets(node: ast.AST) -> list[ast.Name]:
    given = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target for target in given if isinstance(target, ast.Name)]


def imported(module: str) -> set[str]:
    imports = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


# ---------------------------------------------------------------- lines


def kind_of(function: ast.FunctionDef) -> str:
    """Its decorators that callers notice, as words in front."""
    names = [ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list]
    return "".join(f"@{name} " for name in names if name in KINDS)


def signature(function: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{kind_of(function)}{function.name}({ast.unparse(function.args)}){returns}"


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in PROTOCOLS


def fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Those of a NamedTuple or dataclass, and other attributes of the class: their names, and what is said of them."""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign | ast.Assign):
            names = [target.id for target in targets(statement) if is_public(target.id)]
            annotation = f": {ast.unparse(statement.annotation)}" if isinstance(statement, ast.AnnAssign) else ""
            value = "" if statement.value is None else f" = {ast.unparse(statement.value)}"
            yield from ((name, f"{name}{annotation}{value}") for name in names)


def attributes(node: ast.ClassDef) -> Iterator[str]:
    """Public ones that ``__init__`` sets."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            for place in ast.walk(method):
                stored = isinstance(place, ast.Attribute) and isinstance(place.ctx, ast.Store)
                if stored and ast.unparse(place.value) == "self" and is_public(place.attr):
                    yield place.attr


class Class:
    """A class with what it inherits from the package's own classes, so that nothing changes where a member moves to one."""

    def __init__(self) -> None:
        self.bases: dict[str, None] = {}  # those of other packages
        self.fields: dict[str, str] = {}  # in their order, by name
        self.attributes: set[str] = set()
        self.methods: dict[str, list[str]] = {}  # signatures by name; a setter is a second one

    def add(self, module: str, node: ast.ClassDef) -> None:
        for name, field in fields(node):
            self.fields.setdefault(name, field)
        self.attributes |= set(attributes(node))
        methods: dict[str, list[str]] = {}
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and is_public(method.name):
                methods.setdefault(method.name, []).append(signature(method))
        self.methods = methods | self.methods
        for base in node.bases:
            parent = self._of_package(module, base)
            if parent is None:
                self.bases[ast.unparse(base)] = None
            else:
                self.add(parent.module, parent.nodes[0])

    @staticmethod
    def _of_package(module: str, base: ast.expr) -> Found | None:
        if not isinstance(base, ast.Name):
            return None
        defined = {node.name for node in tree_of(module).body if isinstance(node, ast.ClassDef)}
        return find(module, base.id) if base.id in defined or base.id in origins(module) else None

    def lines(self) -> Iterator[str]:
        yield from self.fields.values()
        yield from (f"self.{name}" for name in sorted(self.attributes - set(self.fields)))
        yield from (line for _, lines in sorted(self.methods.items()) for line in lines)


def lines_of(module: str, name: str) -> Iterator[str]:
    definition = find(module, name)
    if definition is None:
        yield name
        return
    for node in definition.nodes:
        if isinstance(node, ast.FunctionDef):
            yield signature(node)
            continue
        found = Class()
        found.add(definition.module, node)
        yield f"class {name}({', '.join(found.bases)})"
        yield from (f"    {line}" for line in found.lines())


# ---------------------------------------------------------------- the command line


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)


def option(action: argparse.Action) -> str:
    """Without help, which is prose."""
    of_type = getattr(action.type, "__name__", None) or type(action.type).__name__
    details: dict[str, Any] = {
        "action": type(action).__name__.strip("_").removesuffix("Action").replace("Store", "").lower() or None,
        "type": None if action.type is None else of_type,
        "nargs": action.nargs,
        "choices": None if action.choices is None else sorted(map(str, action.choices)),
        "const": action.const if action.nargs == "?" else None,
        "default": None if action.default in (None, argparse.SUPPRESS, False) else action.default,
        "required": True if action.option_strings and action.required else None,
    }
    name = ", ".join(action.option_strings) or action.dest
    return " ".join([name, *(f"{key}={value}" for key, value in details.items() if value is not None)])


def command_lines() -> Iterator[str]:
    from s2sent_kernels.cli import _parser

    for parser in parsers(_parser()):
        yield f"$ {parser.prog}"
        yield from (f"    {option(action)}" for action in parser._actions)
        for group in parser._mutually_exclusive_groups:
            names = " | ".join(action.option_strings[0] for action in group._group_actions)
            yield f"    one of: {names}{' (required)' if group.required else ''}"


def interface() -> str:
    lines = []
    for module, names in public().items():
        lines += [f"{module}:", *(f"    {line}" for name in names for line in lines_of(module, name)), ""]
    return "\n".join([*lines, *command_lines(), ""])


if __name__ == "__main__":
    RECORD.write_text(interface(), encoding="utf-8")
