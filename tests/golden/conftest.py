"""``pytest tests/golden --update-golden`` writes the references anew; say in the change why they moved."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden trajectories anew")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    # A run of the whole suite loads this file too late for its option.
    return bool(request.config.getoption("--update-golden", default=False))
