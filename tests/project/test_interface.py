"""The public interface is what tests/data/interface.txt says."""

import difflib
import importlib
import re

import pytest
from public_interface import RECORD, ROOT, find, interface, public

import s2sent_kernels

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "docs" / "recipes").glob("*.py"))]
EXTRAS = {"transformers", "sentence_transformers", "numpy"}  # what a public module may lack here


def test_the_interface_stays():
    difference = difflib.unified_diff(
        RECORD.read_text(encoding="utf-8").splitlines(), interface().splitlines(), RECORD.name, "now", lineterm="", n=1
    )
    text = "\n".join(difference)
    assert not text, (
        f"the public interface changed:\n{text}\n"
        "If that is meant: python tests/public_interface.py writes the record again, and CHANGELOG.md gets a line."
    )


def test_the_names_of_the_package_are_those_of_the_record():
    assert public()["s2sent_kernels"] == s2sent_kernels.__all__


@pytest.mark.parametrize("module", public())
def test_public_names_exist(module):
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        if {error.name, getattr(error.__cause__, "name", None)} & EXTRAS:
            pytest.skip(str(error))
        raise
    for name in public()[module]:
        assert hasattr(loaded, name), name


def test_what_the_pages_import_is_public():
    found = set()
    for page in PAGES:
        for module, names in re.findall(
            r"from (s2sent_kernels[\w.]*) import ([\w, ]+)", page.read_text(encoding="utf-8")
        ):
            found |= {(module, name.strip()) for name in names.split(",")}
    assert len(found) >= 12
    assert {(module, name) for module, name in found if name not in public().get(module, ())} == set()


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(LookupError, match="s2sent_kernels has no swap"):
        find("s2sent_kernels", "swap")
