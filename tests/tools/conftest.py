"""Shared by the tests of `s2sent encode`'s parts."""

import pytest


@pytest.fixture
def made(tmp_path):
    """Ten texts in five parts."""
    from s2sent_kernels.tools.encoding import Request

    (tmp_path / "in.txt").write_text("".join("x" * i + "\n" for i in range(10)))
    return Request([str(tmp_path / "in.txt")], part_rows=2)
