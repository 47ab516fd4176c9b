"""How often something that fails is tried again, and after which pause."""

from __future__ import annotations

import pytest

from slipstream.envs import EnvError
from slipstream.patience import Patience


def failed(patience: Patience[EnvError], kind: str, row: int) -> float:
    return patience.pause(EnvError(f"{kind} at {row}\nmore"), kind, row)


def test_pauses_double_up_to_a_limit_and_begin_anew_after_progress(caplog: pytest.LogCaptureFixture) -> None:
    patience = Patience[EnvError](9)
    pauses = [failed(patience, "it died", 99 * number) for number in range(8)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    assert failed(patience, "it died", 99 * 7 + 100) == pytest.approx(0.1)
    assert caplog.messages[0] == "it died at 0; it is brought back to where it was (1 of 9)\nmore"
    assert caplog.messages[1] == "it died at 99; it is brought back to where it was (2 of 9)"
    assert caplog.messages[-1] == "it died at 793; it is brought back to where it was (1 of 9)"


def test_the_first_in_a_row_is_raised_when_there_are_too_many() -> None:
    patience = Patience[EnvError](2)
    failed(patience, "it died", 10)
    failed(patience, "it hangs", 10)
    with pytest.raises(EnvError, match="it died at 10"):
        failed(patience, "it died", 20)


def test_the_same_at_the_same_row_is_hopeless() -> None:
    patience = Patience[EnvError](99)
    failed(patience, "it died", 10)
    failed(patience, "it hangs", 20)
    failed(patience, "it died", 20)
    with pytest.raises(EnvError, match="it hangs at 20"):
        failed(patience, "it hangs", 20)


def test_what_is_of_no_kind_may_come_again_at_the_same_row() -> None:
    patience = Patience[EnvError](3)
    failed(patience, "it died", 10)
    failed(patience, "", 10)
    failed(patience, "", 10)
    with pytest.raises(EnvError, match="it died at 10"):
        failed(patience, "", 10)


def test_none_are_tried_again_without_restarts(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(EnvError, match="it died at 0"):
        failed(Patience[EnvError](0), "it died", 0)
    assert not caplog.messages
