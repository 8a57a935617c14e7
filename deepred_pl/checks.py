"""Check arguments; every message says what was expected, what came, and if need be the remedy."""

import math
from numbers import Integral
from typing import Any, get_args


class RestorationWarning(UserWarning):
    """A measurement or setting that is probably a mistake."""


def as_plain(value: Any) -> Any:
    """A number or list of Python for a scalar, array or tensor of another library."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_factory(name: str, value: object, kind: type, example: str) -> None:
    """Raise ValueError if an object of the class came in place of what creates one."""
    if isinstance(value, kind) or not (value is None or callable(value)):
        got = f"a {type(value).__name__}" if isinstance(value, kind) else repr(value)
        raise ValueError(
            f"{name} must be a class or function that creates it, got {got}; give for example "
            f"functools.partial({example})"
        )


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless the value is one of a `Literal`'s."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_positive(name: str, value: float | None, remedy: str = "") -> None:
    """Raise ValueError, which ends with the remedy, unless the number is positive and finite."""
    if value is None or not 0 < value < math.inf:
        raise ValueError(
            f"{name} must be > 0 and finite, got {value}" + (f"; {remedy}" if remedy else "")
        )


def check_at_least(least: int, **numbers: int) -> None:
    """Raise ValueError if one of the numbers, given by name, is below the least."""
    for name, value in numbers.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_grey_levels(name: str, sigma: float | None, remedy: str) -> None:
    """Raise ValueError, which ends with the remedy, unless sigma is in (0, 255] grey levels."""
    if sigma is None or not 0 < sigma <= 255:
        raise ValueError(f"{name} must be in (0, 255] grey levels, got {sigma}; {remedy}")
