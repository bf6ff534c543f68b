"""docs/bitwise.md and tests/engines/test_bits.py: each row of the table has its test, and each test its row."""

import ast

import pytest
from promises import ROOT, WORDS, column_of, table

from s2sent_kernels.engines.choice import BACKENDS

BITS = ROOT / "tests" / "engines" / "test_bits.py"


def functions():
    """The tests, and the names of their parameters."""
    tree = ast.parse(BITS.read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {test.name: [argument.arg for argument in test.args.args] for test in tests}


def test_each_row_has_a_test_and_each_test_a_row():
    assert sorted(table()) == sorted(functions())


def test_each_test_asks_the_table():
    """The fixture "same" compares as the row says."""
    assert [name for name, parameters in functions().items() if "same" not in parameters] == []


@pytest.mark.parametrize("name", table())
def test_each_row_speaks_of_every_backend(name):
    row = table()[name]
    assert set(row) == {column_of(backend, device) for backend in BACKENDS for device in ("cpu", "cuda")}
    assert set(row.values()) <= set(WORDS)


def test_a_row_twice_is_an_error(tmp_path, monkeypatch):
    import promises

    page = tmp_path / "bitwise.md"
    page.write_text(
        "| | `triton` | test |\n| --- | --- | --- |\n" + "| a | same bits | `test_a` |\n" * 2, encoding="utf-8"
    )
    monkeypatch.setattr(promises, "PAGE", page)
    with pytest.raises(ValueError, match="test_a twice"):
        promises.table()
