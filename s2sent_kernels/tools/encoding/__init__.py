"""Files of texts to embeddings, in constant memory. A run is divided into parts, ranges of rows of an input file, each written
whole or not at all, so that any number of workers on any number of machines can take them, and an interrupted run goes on."""

from .begin import Options, Shard, hidden
from .begun import kept
from .finish import finish
from .join import OUTPUTS
from .local import Engine, MakeEncoder, in_this_process, one_process_a_device
from .parts import Encoder
from .plan import IN_A_FILE, IN_A_FOLDER, Request, state
from .provenance import sidecar
from .ray_engine import Cluster
from .reading import Row, read_texts
from .rows import Columns, DataError
from .run import Failed, encode_file, encode_folder, remove_leftovers, sample
from .sources import expand
from .stock import MANIFEST
from .stored import Stored, open_stored

__all__ = [
    "IN_A_FILE",
    "IN_A_FOLDER",
    "MANIFEST",
    "OUTPUTS",
    "Cluster",
    "Columns",
    "DataError",
    "Encoder",
    "Engine",
    "Failed",
    "MakeEncoder",
    "Options",
    "Request",
    "Row",
    "Shard",
    "Stored",
    "encode_file",
    "encode_folder",
    "expand",
    "finish",
    "hidden",
    "in_this_process",
    "kept",
    "one_process_a_device",
    "open_stored",
    "read_texts",
    "remove_leftovers",
    "sample",
    "sidecar",
    "state",
]
