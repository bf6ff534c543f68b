"""`make matrix`: the wheel in build/matrix beside other Pythons and other releases of what it works with, each combination of
tests/compatibility.py in an environment of its own. What came of it is kept in docs/compatibility.json.

    nox --list
    nox --session "matrix(oldest)"

A combination whose Python is not here is skipped; one whose packages cannot be had is recorded as not run. An environment with a
torch for CUDA takes 6 GB: --envdir says where.
"""

import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tests"))

from compatibility import COMBINATIONS, GROUPS, PACKAGES, TESTS, Outcome, counts, keep  # noqa: E402

nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize("python,name", [nox.param(one.python, name, id=name) for name, one in COMBINATIONS.items()])
def matrix(session: nox.Session, name: str) -> None:
    wanted = COMBINATIONS[name].requirements()
    (wheel,) = (ROOT / "build" / "matrix").glob("*.whl")
    try:
        session.install(*wanted, *TESTS)
        session.install("--no-deps", str(wheel))
    except nox.command.CommandFailed:
        keep(name, Outcome(reason=f"pip cannot install {', '.join(wanted)} here"))
        raise
    found = {}
    for group, (environment, *arguments) in GROUPS.items():
        report = Path(session.create_tmp()) / f"{name}.xml"
        # The script, and not `python -m pytest`, which would import the checkout's package.
        command = ("pytest", "-q", f"--junitxml={report}", *arguments)
        session.run(*command, env=environment, success_codes=range(256))
        found[group] = counts(report)
    asked = f"import importlib.metadata as m, platform; print(platform.python_version(), *map(m.version, {PACKAGES}))"
    versions = session.run("python", "-c", asked, silent=True).split()
    keep(name, Outcome(dict(zip(("python", *PACKAGES), versions, strict=True)), found))
    failed = sum(group["failed"] for group in found.values())
    if failed:
        session.error(f"{name}: {failed} tests failed")
