"""docs/recipes: each script gives every row the model's own embedding. They run where their framework is installed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_sentence_transformer, save_encoder, sentences

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").is_file())
RECIPES = {"with_spark.py": "pyspark", "with_daft.py": "daft", "with_nemo_curator.py": "nemo_curator"}


def test_each_recipe_is_here():
    assert {path.name for path in (ROOT / "docs" / "recipes").iterdir()} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs(tmp_path, name):
    pytest.importorskip(RECIPES[name])
    from pyarrow import dataset, parquet, table

    from s2sent_kernels import S2SentSelector

    save_encoder(tmp_path / "encoder")
    torch.manual_seed(1)
    S2SentSelector(16, 2, 4, 4).save_pretrained(tmp_path / "selector", about={"blocks": [0, 1]})
    model = make_sentence_transformer(tmp_path / "encoder", tmp_path / "selector")
    model.save(str(tmp_path / "model"))
    (tmp_path / "in").mkdir()
    texts = {f"{part}-{i}": text for part in range(2) for i, text in enumerate(sentences(20, seed=part))}
    for part in range(2):
        rows = [(key, text) for key, text in texts.items() if key.startswith(f"{part}-")]
        columns = {"id": [key for key, _ in rows], "text": [text for _, text in rows]}
        parquet.write_table(table(columns), tmp_path / "in" / f"{part}.parquet")
    command = [
        sys.executable,
        ROOT / "docs" / "recipes" / name,
        *(tmp_path / folder for folder in ("in", "model", "out")),
    ]
    subprocess.run([*map(str, command)], check=True, timeout=300)
    found = dataset.dataset(tmp_path / "out", format="parquet").to_table().to_pylist()
    assert sorted(row["id"] for row in found) == sorted(texts)
    expected = model.encode([texts[row["id"]] for row in found], normalize_embeddings=True)
    np.testing.assert_allclose([row["embedding"] for row in found], expected, rtol=0, atol=1e-6)
