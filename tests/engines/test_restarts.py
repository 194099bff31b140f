"""An engine starts anew, unless it fails too often."""

import time

import pytest

from coconut_serve.engines.restarts import RestartBudget


def test_fourth_failure_within_the_window_is_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = RestartBudget(60.0)
    assert [budget.allows_another() for _ in range(4)] == [True, True, True, False]
    now += 60.0
    assert budget.allows_another()
