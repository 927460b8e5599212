"""The GIL-yield protocol, searched exhaustively: clean with all rules, broken without any one.

The model and what it leaves out are described in `model/gil_yield.py`. A failing run
prints the shortest sequence of steps that leads to the failure (`pytest -s` shows those
of the rules taken away on purpose, too).
"""

from dataclasses import fields

import pytest

from tests.model.gil_yield import Rules, Scenario, Touch, explore

ONE = (Touch(0),)
TWO = (Touch(0), Touch(1))
AGAIN = (Touch(0), Touch(0))
WITHOUT_GIL = (Touch(0, holds_gil=False),)

CLEAN = {
    "two pages": Scenario(TWO),
    "a toucher without the GIL": Scenario(WITHOUT_GIL),
    "first without the GIL, then with it": Scenario((*WITHOUT_GIL, Touch(1))),
    "readahead and another signal": Scenario(TWO, readaheads=1, other_signals=1),
    "a failing ioctl": Scenario(TWO, ioctl_errors=1, readaheads=1, other_signals=1),
    "eviction": Scenario(AGAIN, evictions=1, other_signals=1),
    "eviction, another page": Scenario(TWO, evictions=1, other_signals=1),
    "eviction, without the GIL, then with it": Scenario(
        (*WITHOUT_GIL, Touch(0)), evictions=1, other_signals=1
    ),
    "eviction and a failing ioctl": Scenario(AGAIN, evictions=1, ioctl_errors=1, other_signals=1),
    "three touches": Scenario((Touch(0), Touch(1), Touch(0)), evictions=1, readaheads=1),
    "only the sentry reads": Scenario(AGAIN, evictions=1, other_signals=1, loop_reads=False),
}

# For each rule a scenario that needs it, and how it must fail there.
NEEDED = {
    "slot_at_read": (Scenario(ONE), "stuck"),
    "in_order": (Scenario(TWO, readaheads=1), "stuck"),
    "recheck": (Scenario(TWO, readaheads=1), "lost yield"),
    "epoch": (Scenario(AGAIN, evictions=1), "lost yield"),
    "count_removals": (Scenario(AGAIN, evictions=1), "lost yield"),
    "wake_stale": (Scenario(AGAIN, evictions=1), "stuck"),
    "one_call": (Scenario(ONE, readaheads=1), "stuck"),
    "wake_late": (Scenario((*WITHOUT_GIL, Touch(0)), evictions=1), "stuck"),
    "wake_missing": (Scenario(ONE, readaheads=1, ioctl_errors=1), "stuck"),
    "pc_match": (Scenario(ONE, readaheads=1, other_signals=1), "wrong step"),
    "retry": (Scenario(TWO, other_signals=1), "stuck"),
    "answered": (Scenario((*WITHOUT_GIL, Touch(1))), "stuck"),
    "rearm_kernel": (Scenario(ONE, readaheads=1, other_signals=1), "stuck"),
    "nogil_final": (Scenario(WITHOUT_GIL), "wrong step"),
}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", CLEAN.values(), ids=CLEAN)
def test_clean_with_all_rules(scenario: Scenario) -> None:
    result = explore(scenario, Rules())
    print(result)
    assert result.failure is None, str(result)


def test_every_rule_is_tried() -> None:
    assert set(NEEDED) == {field.name for field in fields(Rules)}


@pytest.mark.slow
@pytest.mark.parametrize("rule", NEEDED)
def test_broken_without_the_rule(rule: str) -> None:
    scenario, failure = NEEDED[rule]
    assert explore(scenario, Rules()).failure is None
    result = explore(scenario, Rules().without(rule))
    print(f"without {rule}: {result}")
    assert result.failure == failure
    assert result.trace


def test_failure_a_needs_a_loop_that_reads() -> None:
    """The hang is not in reading late, but in reading and then waiting for the GIL."""
    rules = Rules().without("slot_at_read")
    assert explore(Scenario(TWO, readaheads=1), rules).failure == "stuck"
    assert explore(Scenario(TWO, readaheads=1, loop_reads=False), rules).failure is None
