"""Run with: pytest examples/own_method"""

from my_losses import METHOD, CalibratedConfig

from rayalign.testing import check_method


def test_my_method() -> None:
    check_method(METHOD)
    check_method(METHOD, CalibratedConfig(beta=0.5, target=0.0, weight=1.0))
