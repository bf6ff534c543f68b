"""The name under which torch knows this package's ops, in a file of its own: a copy that is a kernel of the hub has another, so
that both can be in one process (hub/layout.py)."""

import torch

NAMESPACE = "s2sent"
OPS = getattr(torch.ops, NAMESPACE)
