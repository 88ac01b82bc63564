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


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("adaptive", js.adaptive()),
        ("adaptive:0.5", js.adaptive(0.5)),
        ("adaptive:0.5:3", js.adaptive(0.5, minimum=3)),
        ("adaptive:0.5:3:7", js.adaptive(0.5, minimum=3, maximum=7)),
    ],
)
def test_adaptive_can_be_written(text: str, schedule: object) -> None:
    assert refresh_schedule(text) == schedule


@pytest.mark.parametrize("text", ["", "often", "0.5", "adaptive:x", "adaptive:0.8:1.5", "adaptive:0.8:1:2:3"])
def test_a_text_that_is_no_schedule_is_told_what_would_be(text: str) -> None:
    with pytest.raises(js.InputError, match=r"refresh_every must be .* adaptive:0.8:10:400.*got"):
        refresh_schedule(text)


def test_a_written_threshold_is_checked_too() -> None:
    with pytest.raises(js.InputError, match=r"threshold must lie in \(0, 1\], got 1.5"):
        refresh_schedule("adaptive:1.5")
