"""How much the fault suite tries, and its random numbers."""

import random
import signal

import pytest

from tests.faults.processes import take_signals


@pytest.fixture(autouse=True)
def _signals_are_taken():
    before = take_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def long(pytestconfig) -> bool:
    """Whether this is the long form."""
    return pytestconfig.getoption("long")


@pytest.fixture
def seed(pytestconfig) -> int:
    return pytestconfig.getoption("seed")


@pytest.fixture
def chance(seed) -> random.Random:
    """Random numbers of the suite's seed."""
    return random.Random(seed)
