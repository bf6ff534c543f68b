"""Embeddings in a Spark job, by mapPartitions: python with_spark.py INPUT MODEL OUTPUT

INPUT is Parquet with the columns id and text, MODEL a saved folder that all executors see. Run with PySpark 4.3.0.
"""

import sys
from itertools import islice

from pyspark.sql import Row, SparkSession


def embed(folder, rows):
    from s2sent_kernels.sentence_transformers import load

    model, rows = load(folder), iter(rows)  # once a partition: make partitions large
    while some := list(islice(rows, 4096)):
        embeddings = model.encode([row.text for row in some], normalize_embeddings=True)
        for row, embedding in zip(some, embeddings.tolist(), strict=True):
            yield Row(id=row.id, embedding=embedding)


if __name__ == "__main__":
    source, folder, target = sys.argv[1:]
    spark = SparkSession.builder.getOrCreate()
    rows = spark.read.parquet(source).select("id", "text").rdd.mapPartitions(lambda part: embed(folder, part))
    spark.createDataFrame(rows, "id string, embedding array<float>").write.parquet(target)
    spark.stop()
