"""docs/compatibility.md is what its results give, and the combinations reach from the oldest release that is promised."""

import re
import sys
from pathlib import Path

import compatibility
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


def test_the_page_is_what_the_results_give():
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.page(compatibility.results())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no tomllib")
def test_the_oldest_combination_is_what_is_promised():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    wanted = [project["requires-python"], *project["dependencies"], *extras]
    oldest = compatibility.COMBINATIONS["oldest"]
    assert f">={oldest.python}" == wanted[0]
    for requirement in oldest.requirements():
        package, version = requirement.split("==")
        floors = {m[1] for one in wanted if (m := re.fullmatch(rf"{package}(?:\[\w+\])?>=([\d.]+)", one))}
        assert len(floors) == 1, (package, floors)
        (floor,) = floors
        assert re.sub(r"(\.0)*$", "", version) == re.sub(r"(\.0)*$", "", floor)


def test_counts_of_a_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/></testcase>'
        '<testcase classname="b" name="not"><skipped/></testcase><testcase name="never"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    found = compatibility.counts(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert found["names"] == ["None::never", "a::bad"]


def test_what_was_not_run_says_why():
    text = compatibility.tables({"oldest": {"reason": "no such package"}})
    assert "| not run | no such package |" in text and "not tried yet" in text
