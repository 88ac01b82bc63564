"""Bad schedules are refused."""

import pytest

import jaxsparse as js
from jaxsparse.select.schedules import refresh_schedule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"minimum": 0}, "minimum"),
        ({"minimum": 9, "maximum": 8}, "maximum"),
    ],
)
def test_adaptive_names_the_bad_option(options: dict, message: str) -> None:
    with pytest.raises(js.InputError, match=message):
        js.adaptive(**options)


@pytest.mark.parametrize("period", [0, -3])
def test_a_period_below_one_is_refused(period: int) -> None:
    with pytest.raises(js.InputError, match="refresh_every must be at least 1"):
        refresh_schedule(period)
