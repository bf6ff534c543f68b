"""The selector's corner cases and derivatives, written in tests/selector, on the engine under test."""

from selector.test_corner_values import *  # noqa: F403
from selector.test_corners import *  # noqa: F403
from selector.test_derivatives import *  # noqa: F403
