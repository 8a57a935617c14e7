"""How much the fault suite tries, and its random numbers."""

import random

import pytest


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
