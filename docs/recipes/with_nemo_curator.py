"""Embeddings as a stage of a NeMo Curator pipeline: python with_nemo_curator.py INPUT MODEL OUTPUT

INPUT is a folder of Parquet with the columns id and text, MODEL a saved folder. Run with NeMo Curator 1.4.0, Ray 2.60.0.
"""

import sys
from dataclasses import dataclass, field

from nemo_curator.backends.ray_data import RayDataExecutor
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.stages.text.io.reader import ParquetReader
from nemo_curator.stages.text.io.writer import ParquetWriter
from nemo_curator.tasks import DocumentBatch


@dataclass
class Embed(ProcessingStage[DocumentBatch, DocumentBatch]):
    folder: str
    name: str = "s2sent"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))  # on a GPU: gpus=1.0 beside it

    def inputs(self):
        return ["data"], ["text"]

    def outputs(self):
        return ["data"], ["text", "embedding"]

    def setup(self, worker_metadata=None):
        from s2sent_kernels.sentence_transformers import load

        self.model = load(self.folder)  # once a worker

    def process(self, task):
        frame = task.to_pandas()
        frame["embedding"] = list(self.model.encode(frame["text"].tolist(), normalize_embeddings=True))
        return DocumentBatch(dataset_name=task.dataset_name, data=frame, _metadata=task._metadata)


if __name__ == "__main__":
    source, folder, target = sys.argv[1:]
    stages = [ParquetReader(source, fields=["id", "text"]), Embed(folder), ParquetWriter(target)]
    Pipeline(name="embeddings", stages=stages).run(RayDataExecutor())
