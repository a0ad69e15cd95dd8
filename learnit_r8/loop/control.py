"""What people ask of a running loop: signals, and the commands of sinks, from any rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from learnit_r8 import events
from learnit_r8.clock import Clock
from learnit_r8.loop.ranks import Ranks
from learnit_r8.loop.signals import Interrupts
from learnit_r8.sinks import EventBus
from learnit_r8.types import Command


class Control:
    """Takes in signals and commands, and says whether the loop has to stop.

    Args:
        bus: Its sinks give commands.
        ranks: What one rank is asked counts for all.
        clock: Sleeps while the run is paused.
        saves: Whether the run can be saved.
        signals: Names of the signals to catch.

    Attributes:
        interrupts: Keeps signals for the next step boundary.
        stop: The command to stop that is in force, or None.
        together: A checkpoint is written by all ranks at once, so all of them have to be asked for it.
    """

    def __init__(self, bus: EventBus, ranks: Ranks, clock: Clock, *, saves: bool, signals: Sequence[str]) -> None:
        self.interrupts = Interrupts(saves=saves, signals=signals)
        self.stop: Command | None = None
        self.together = False
        self._bus = bus
        self._ranks = ranks
        self._clock = clock

    @property
    def stops_now(self) -> bool:
        """Whether no further batch may be handed out."""
        return self.stop is Command.STOP_AFTER_STEP

    @property
    def interrupted(self) -> bool:
        """Whether a signal is to be acted on at this step boundary, on all ranks at the same one."""
        return self.interrupts.pending is not None and (self._ranks.world_size == 1 or bool(self._ranks.signal))

    def heed_ranks(self) -> None:
        """Take over the signals and commands that any rank got."""
        if self._ranks.signal:  # else one that has come meanwhile waits for the next exchange
            self.interrupts.pending = self._ranks.signal
        self.stop = self._ranks.command or self.stop

    def obey(self, step: int, save: Callable[[], None]) -> None:
        """Carry out what sinks ask for; while paused, wait here.

        Args:
            step: Global step.
            save: Writes a checkpoint.

        Raises:
            KeyboardInterrupt: One asked to stop at once.
        """
        paused = False
        while self._bus.commanding:
            for command in self._bus.commands(step):
                if command is Command.CHECKPOINT and self.together:
                    self._ranks.asks_save = True
                elif command is Command.CHECKPOINT:
                    save()
                elif command in (Command.PAUSE, Command.RESUME):
                    paused = command is Command.PAUSE
                    self._bus.emit(events.Paused, step, paused)
                elif command is Command.STOP_NOW:
                    raise KeyboardInterrupt
                elif self._ranks.world_size > 1:
                    self._ranks.asked = command
                else:
                    self.stop = command
            if not paused or self.stops_now or self.interrupts.pending is not None:
                return
            self._clock.sleep(0.05)
