"""What people ask of a running loop: signals, and the commands of sinks, from any rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from learnit_r8 import events
from learnit_r8.core.clock import Clock
from learnit_r8.loop.ranks import Ranks, Word
from learnit_r8.loop.signals import Interrupts
from learnit_r8.sinks import EventBus
from learnit_r8.types import Command

_END_A_PAUSE = (Command.RESUME, Command.STOP_NOW, Command.STOP_AFTER_STEP, Command.STOP_AFTER_EPOCH)


class Control:
    """Takes in signals and commands, and says whether the loop has to stop.

    Attributes:
        interrupts: Keeps signals for the next step boundary.
        stop: The command to stop that is in force, or None.
        together: Every rank writes checkpoints, so all of them have to be asked for one.
        asks_save, asks_share: After the next exchange all ranks write a checkpoint, hear what this one has logged.
        save_due, share_due: They do now.
    """

    def __init__(self, bus: EventBus, ranks: Ranks, clock: Clock, *, saves: bool, signals: Sequence[str]) -> None:
        self.interrupts = Interrupts(saves=saves, signals=signals)
        self.stop: Command | None = None
        self.together = self.save_due = self.share_due = self.asks_save = self.asks_share = False
        self._bus = bus
        self._ranks = ranks
        self._clock = clock
        self._asked: Command | None = None  # of this rank, to be told the others
        self._signal = 0  # that a rank had at the last exchange
        self._paused = self._at_once = False  # on all ranks

    @property
    def interrupted(self) -> bool:
        """Whether a signal is to be acted on at this step boundary, on all ranks at the same one."""
        return self.interrupts.pending is not None and (self._ranks.world_size == 1 or bool(self._signal))

    @property
    def waits(self) -> bool:
        """Whether a command of a sink is to be carried out, or one is in force that holds the loop."""
        return self._paused or self._at_once or self._bus.asked

    def word(self, *, skipped: bool) -> Word:
        """Return what this rank has to say to the others, once."""
        word = Word(self.interrupts.pending or 0, self._asked, self.asks_save, skipped, self.asks_share)
        self._asked, self.asks_save, self.asks_share = None, False, False
        return word

    def hear(self, word: Word) -> None:
        """Take over the signals and commands that any rank got."""
        self._signal = word.signal
        self.save_due |= word.saves
        self.share_due |= word.shares
        if word.signal:  # else one that has come meanwhile waits for the next exchange
            self.interrupts.pending = word.signal
        self._take(word.command)

    def _take(self, command: Command | None) -> None:
        if command is Command.STOP_NOW:
            self._at_once = True
        elif command in (Command.PAUSE, Command.RESUME):
            self._paused = command is Command.PAUSE
        else:
            self.stop = command or self.stop

    def obey(self, step: int, save: Callable[[], None]) -> None:
        """Carry out what sinks ask for, those of other ranks by the last exchange; while paused, wait here."""
        for command in self._asked_here(step, save):
            if self._ranks.world_size > 1:
                self._asked = command
            else:
                self._take(command)
        if self._paused:
            self._bus.emit(events.Paused(step=step, paused=True))
            self._wait(step, save)
            self._bus.emit(events.Paused(step=step, paused=False))
        if self._at_once:
            self._at_once = False
            raise KeyboardInterrupt

    def _asked_here(self, step: int, save: Callable[[], None]) -> Iterator[Command]:
        for command in self._bus.commands(step):
            if command is not Command.CHECKPOINT:
                yield command
            elif self.together:
                self.asks_save = True
            else:
                save()

    def _wait(self, step: int, save: Callable[[], None]) -> None:
        """Return when a rank is asked to go on or to stop or has a signal, or when none can be asked any more."""
        signal, nobody = -1, -2
        while self._paused:
            asked = [command for command in self._asked_here(step, save) if command in _END_A_PAUSE]
            mine = 0 if self._bus.commanding else nobody
            if self.interrupts.pending is not None:  # the next step's exchange tells of it
                mine = signal
            heard = self._ranks.everyone(_END_A_PAUSE.index(asked[-1]) + 1 if asked else mine)
            if heard.max() > 0 or signal in heard or (heard == nobody).all():
                self._paused = False
                self._take(_END_A_PAUSE[int(heard.max()) - 1] if heard.max() > 0 else None)
            else:
                self._clock.sleep(0.05)
