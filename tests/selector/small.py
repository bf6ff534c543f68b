"""A small selector and its outputs, for the tests of the module."""

import builders
import torch
from torch import nn

from s2sent_kernels.formula.call import POOLINGS

N, B, L, D, H, M = 3, 6, 5, 16, 5, 4


def trained(dtype=torch.float64, **options):
    """A selector none of whose tensors is at its initial value, in eval mode."""
    return builders.make_selector(N, D, M, H=H, dtype=dtype, **options)


def outputs(selector, batch):
    return [
        selector(*batch),
        selector.gates(*batch),
        *(selector.pool(*batch, pooling=p) for p in POOLINGS),
    ]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Adapter(nn.Module):
    """A LoRA-like wrapper: the layer it wraps plus a product of two narrow ones."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))
