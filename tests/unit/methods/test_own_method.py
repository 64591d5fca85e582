"""The example of a user's own method works as its README says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.methods import WPOWeighting, compose, resolve
from rayalign.testing import check_method

EXAMPLE = Path(__file__).parents[3] / "examples" / "own_method"


def test_the_example_resolves_and_passes_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    method = resolve("my_losses:METHOD")
    check_method(method)
    check_method(compose(method, WPOWeighting()))
