"""Contracts that a plug-in's author can call in a test: does my strategy, my sink, my state hold?

    from learnit_r8.testing import check_strategy

    def test_my_strategy():
        check_strategy(MyStrategy)

Every check raises `AssertionError` with a sentence that says what to do; what the plug-in itself raises passes through.
"""

from learnit_r8.testing.clock import FakeClock
from learnit_r8.testing.sinks import check_sink, sample_events
from learnit_r8.testing.states import check_resume
from learnit_r8.testing.strategies import check_strategy

__all__ = ["FakeClock", "check_resume", "check_sink", "check_strategy", "sample_events"]
