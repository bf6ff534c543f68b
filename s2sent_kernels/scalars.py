"""Options that are no tensors: each is judged here, in the same words for every function, module and backend."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")

LARGEST = sys.float_info.max  # a Python integer may be larger, and then no operator takes it
LARGEST_INT = 2**63 - 1  # of an operator's schema


def positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive number, got {value}")
    if isinstance(value, int) and value > LARGEST_INT:
        raise ValueError(f"{name}: expected a number of 64 bits, got {value}")


def number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name}: expected a number that a float can hold, got {value}")


def finite_number(name: str, value: Any) -> None:
    number(name, value)
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def positive_number(name: str, value: Any) -> None:
    number(name, value)
    if not 0 < value <= LARGEST:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def at_least_zero(name: str, value: Any) -> None:
    number(name, value)
    if not 0 <= value <= LARGEST:
        raise ValueError(f"{name}: expected a finite number, 0 or more, got {value}")


def share(name: str, value: Any) -> None:
    number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")


def flag(name: str, value: Any) -> None:
    """True or False: what else Python takes for one of them, as "no" for True, is a mistake."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def device(name: str, value: Any) -> torch.device | None:
    """The device that ``value`` means; None means torch's default."""
    if value is None:
        return None
    try:
        return torch.device(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected a torch.device, its name or None, got {type(value).__name__}") from error
    except RuntimeError as error:
        raise ValueError(f"{name}: expected a torch.device, its name or None, got {value!r}") from error


def working_device(name: str, value: Any) -> torch.device:
    """The device that ``value`` means, where a tensor can be made and read on it."""
    where = device(name, value) or torch.get_default_device()
    try:
        torch.zeros(1, device=where).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason, _, _ = str(error).partition("\n")
        raise ValueError(f"{name}: {str(where)!r} cannot be used: {reason}") from error
    return where


def dtype(name: str, value: Any) -> torch.dtype | None:
    """``value``, where it is a floating dtype; None means torch's default."""
    if value is not None and (not isinstance(value, torch.dtype) or not value.is_floating_point):
        got = value if isinstance(value, torch.dtype) else type(value).__name__
        raise TypeError(f"{name}: expected a floating dtype or None, got {got}")
    return value


def option(name: str, value: Any, allowed: Sequence[T]) -> T:
    """``value``, where it is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {tuple(allowed)}, got {value!r}")
    return value


def word(name: str, value: Any, allowed: Sequence[T]) -> T:
    """``value``, where it is a string: an op's schema would refuse anything else without naming the words it allows. Whether it
    is one of them the op judges."""
    return value if isinstance(value, str) else option(name, value, allowed)  # type: ignore[return-value]
