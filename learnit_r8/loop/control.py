"""What people ask of a running loop: signals, and the commands of sinks, from any rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from learnit_r8 import events
from learnit_r8.core.clock import Clock
from learnit_r8.loop.ranks import Ranks, Word
from learnit_r8.loop.signals import Interrupts
from learnit_r8.sinks import EventBus
from learnit_r8.types import Command


class Control:
    """Takes in signals and commands, and says whether the loop has to stop.

    Attributes:
        interrupts: Keeps signals for the next step boundary.
        stop: The command to stop that is in force, or None.
        together: Every rank writes checkpoints, so all of them have to be asked for one.
        save_due: A rank was asked for a checkpoint that all of them write.
    """

    def __init__(self, bus: EventBus, ranks: Ranks, clock: Clock, *, saves: bool, signals: Sequence[str]) -> None:
        self.interrupts = Interrupts(saves=saves, signals=signals)
        self.stop: Command | None = None
        self.together = self.save_due = self._asks_save = False
        self._bus = bus
        self._ranks = ranks
        self._clock = clock
        self._asked: Command | None = None  # of this rank, to be told the others
        self._signal = 0  # that a rank had at the last exchange
        self._paused = self._at_once = False  # on all ranks

    @property
    def stops_now(self) -> bool:
        """Whether no further batch may be handed out."""
        return self.stop is Command.STOP_AFTER_STEP

    @property
    def interrupted(self) -> bool:
        """Whether a signal is to be acted on at this step boundary, on all ranks at the same one."""
        return self.interrupts.pending is not None and (self._ranks.world_size == 1 or bool(self._signal))

    def ask_for_save(self) -> None:
        """Have all ranks write a checkpoint, after the next exchange."""
        self._asks_save = True

    def word(self, damaged: int | None, *, skipped: bool) -> Word:
        """Return what this rank has to say to the others, once."""
        word = Word(self.interrupts.pending or 0, self._asked, self._asks_save, damaged, skipped)
        self._asked, self._asks_save = None, False
        return word

    def hear(self, word: Word) -> None:
        """Take over the signals and commands that any rank got."""
        self._signal, command = word.signal, word.command
        self.save_due |= word.saves
        if word.signal:  # else one that has come meanwhile waits for the next exchange
            self.interrupts.pending = word.signal
        if command is Command.STOP_NOW:
            self._at_once = True
        elif command in (Command.PAUSE, Command.RESUME):
            self._paused = command is Command.PAUSE
        else:
            self.stop = command or self.stop

    def act_together(self, step: int) -> None:
        """Carry out what another exchange told all ranks: stop at once, or wait until one of them says to go on.

        Raises:
            KeyboardInterrupt: One asked to stop at once.
        """
        if self._at_once:
            self._at_once = False
            raise KeyboardInterrupt
        if not self._paused:
            return
        self._bus.emit(events.Paused(step=step, paused=True))
        ends = (Command.RESUME, Command.STOP_NOW, Command.STOP_AFTER_STEP, Command.STOP_AFTER_EPOCH)
        while self._paused:
            asked = [command for command in self._bus.commands(step) if command in ends]
            mine = ends.index(asked[-1]) + 1 if asked else -(self.interrupts.pending is not None)
            heard = self._ranks.everyone(float(mine))
            if heard.any():  # a signal ends the pause, too: the next step's exchange tells of it
                self._paused = False
                command = ends[int(heard.max()) - 1] if heard.max() > 0 else Command.RESUME
                self.stop = command if command in ends[2:] else self.stop
                self._at_once = command is Command.STOP_NOW
            else:
                self._clock.sleep(0.05)
        self._bus.emit(events.Paused(step=step, paused=False))
        self.act_together(step)

    def obey(self, step: int, save: Callable[[], None]) -> None:
        """Carry out what sinks ask for; while paused, wait here.

        Raises:
            KeyboardInterrupt: One asked to stop at once.
        """
        paused = False
        while self._bus.commanding:
            for command in self._bus.commands(step):
                if command is Command.CHECKPOINT and self.together:
                    self.ask_for_save()
                elif command is Command.CHECKPOINT:
                    save()
                elif self._ranks.world_size > 1:
                    self._asked = command
                elif command in (Command.PAUSE, Command.RESUME):
                    paused = command is Command.PAUSE
                    self._bus.emit(events.Paused(step=step, paused=paused))
                elif command is Command.STOP_NOW:
                    raise KeyboardInterrupt
                else:
                    self.stop = command
            if not paused or self.stops_now or self.interrupts.pending is not None:
                return
            self._clock.sleep(0.05)
