"""Check arguments; every message says what was expected, what came, and if need be the remedy."""

import math
from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a value that is not one of a `Literal`'s.

    Raises:
        ValueError: It is not.
    """
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_positive(name: str, value: float | None, remedy: str = "") -> None:
    """Refuse a number that is not positive and finite.

    Raises:
        ValueError: It is not; the message ends with the remedy.
    """
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"{name} must be > 0, got {value}" + (f"; {remedy}" if remedy else ""))


def check_at_least(least: int, **numbers: int) -> None:
    """Refuse numbers, given by name, that are below the least.

    Raises:
        ValueError: One is.
    """
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_grey_levels(name: str, sigma: float | None, remedy: str) -> None:
    """Refuse a standard deviation that is not in (0, 255] grey levels of an 8-bit image.

    Raises:
        ValueError: It is not; the message ends with the remedy.
    """
    if sigma is None or not 0 < sigma <= 255:
        raise ValueError(f"{name} must be in (0, 255] grey levels, got {sigma}; {remedy}")
