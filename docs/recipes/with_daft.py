"""Embeddings in a Daft query, by a class UDF: python with_daft.py INPUT MODEL OUTPUT

INPUT is a folder or glob of Parquet with the columns id and text, MODEL a saved folder. Run with Daft 0.7.26.
"""

import sys

import daft
from daft import DataType, Series, col


@daft.cls
class Embed:
    def __init__(self, folder: str):
        from s2sent_kernels.sentence_transformers import load

        self.model = load(folder)  # once a worker

    @daft.method.batch(return_dtype=DataType.list(DataType.float32()), batch_size=4096)
    def __call__(self, texts: Series):
        return list(self.model.encode(texts.to_pylist(), normalize_embeddings=True))


if __name__ == "__main__":
    source, folder, target = sys.argv[1:]
    embed = Embed(folder)
    daft.read_parquet(source).select(col("id"), embed(col("text")).alias("embedding")).write_parquet(target)
