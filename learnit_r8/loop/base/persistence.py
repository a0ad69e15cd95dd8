"""The run's state, and its checkpoints: when one is due, what it holds, what is restored."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8 import events
from learnit_r8._version import __version__
from learnit_r8.core.arrays import sample_ids
from learnit_r8.core.portable import portable, unpacked
from learnit_r8.errors import CheckpointError, ConfigError, ProtocolError, tell
from learnit_r8.loop.base.parts import Parts
from learnit_r8.loop.counters import Progress, check_state, grown
from learnit_r8.loop.growth import Growth, keys_of
from learnit_r8.loop.saver import State, not_saved
from learnit_r8.loop.shards import common_checkpoint

if TYPE_CHECKING:
    from learnit_r8.checkpoint import LoadedCheckpoint


class Persistence(Parts):
    """A run that can be saved and restored."""

    def update_cpu_backup(self, state: Any) -> None:
        """Keep a deep copy of the model's state in RAM, to roll back to.

        Args:
            state: Any tree of arrays, tensors, dicts, lists and copyable objects.
        """
        self._check_open()
        if self._measured.ema is not None:
            state = self._measured.ema.around(state)
        if self._search is None:  # a backup amid the search would be of a model that is thrown away
            self._safety.keep(state, self._progress.global_step)

    def restore_best(self) -> int:
        """Bring the model back to the checkpoint with the best value of the metric that `keep_best` names.

        Without one: to the backup in RAM, or else the checkpoint, whose losses were lowest.
        The run's position, learning rate and catalog stay as they are.

        Returns:
            The step of that state.

        Raises:
            LookupError: There is none.
            RuntimeError: `load_callback` failed.
        """
        return self._safety.restore_best(self._progress.global_step, self._progress.epoch)

    def exclude(self, ids: Iterable[Hashable]) -> None:
        """Leave samples out of all epochs that begin from now on; it is part of the run's state.

        On several ranks all have to call it, with the same ids.

        Args:
            ids: Sample ids, or keys where the run was given keys, any number of them; those that are left out already
                do no harm.

        Raises:
            TypeError: No whole numbers.
            ValueError: One is no sample, or no batch would be left.
            KeyError: One is the key of no sample.
        """
        chosen = self._ids(ids)
        rest = self._config.num_samples - len(np.union1d(self._catalog.left_out, chosen))
        if rest < self._config.world_size:
            raise ValueError(f"exclude would leave {rest} of {self._config.num_samples} samples: no batch to train on")
        self._safety.leave_out(self._progress.global_step, tuple(chosen.tolist()), "exclude() was called with them")

    def relabelled(self, ids: Iterable[Hashable]) -> None:
        """Take note that the labels (or data) of samples were changed: all that is known of them is forgotten.

        They are suspects no more, come back if they were left out, and are seen anew as in the first epoch. What a
        strategy of its own remembers (spaced repetition: when they are due) follows with their next losses. On several
        ranks all have to call it, with the same ids.

        Args:
            ids: Sample ids, or keys where the run was given keys, any number of them.

        Raises:
            TypeError: No whole numbers.
            ValueError: One is no sample.
            KeyError: One is the key of no sample.
        """
        chosen, step = self._ids(ids), self._progress.global_step
        self._catalog.renew(chosen, step)
        self._guard.forget(chosen)
        message = f"{len(chosen)} samples were relabelled: what was known of them is forgotten"
        self._bus.emit(events.Notice(step=step, message=message))

    def _ids(self, given: Iterable[Any]) -> NDArray[np.int64]:
        return sample_ids(given if self.keys is None else self.keys.numbers(given), self._config.num_samples)

    def grow(self, more: int | Iterable[Hashable], groups: Any = None) -> None:
        """Take in samples that have come: they join the epochs that begin from now on, and are part of the run's state.

        What is known of the others stays, as does the rest of an epoch that is under way. On several ranks all have to
        call it, with the same samples.

        Args:
            more: How many; their ids follow the last one. Where the run was given keys: the keys of the new ones.
            groups: Class of each new one, int `[n]`, where the run was given groups.

        Raises:
            ConfigError: It cannot be done, or a key is there already; nothing has changed.
            ProtocolError: The search of `auto_find_lr` is due.
        """
        self._check_open()
        if self._search is not None:
            raise ProtocolError("the LR search is due, which goes over the samples that there were: grow after it")
        before = self._config.num_samples
        Growth(self._args, self._chooser.rules, self.keys, more, groups).apply(
            self._catalog, self._chooser, self._guard, self._safety, self._budget
        )
        self._grown += self._config.num_samples - before
        self._desk.ready.clear()  # the rates follow the new length of the run

    @property
    def best_checkpoint(self) -> Path | None:
        """The run's checkpoint with the best value of the metric that `keep_best` names; None while there is none."""
        if self._config.keep_best is None or self._config.checkpoint_dir is None:
            return None
        self._saver.settle()
        best = self._saver.store.best()
        return None if best is None else best[1]

    def save_checkpoint(self, is_final: bool = False, *, name: str = "") -> Path:
        """Write the run's state, and the model through `save_callback`; return the checkpoint's path.

        On several ranks, rank 0 writes it; the others write nothing and get the directory's path. With a collective
        `save_callback` all ranks have to call it.

        Args:
            is_final: Mark the checkpoint as the run's last one: it stays whatever follows.
            name: A word that is added to the folder's name; such a checkpoint stays too.

        Raises:
            CheckpointError: Nothing was saved; earlier checkpoints are as they were.
        """
        step = self._progress.global_step
        if self._args.save is not None and self._desk.in_step and (self._ranks.writes or self._together):
            raise CheckpointError(
                f"the loss of step {step} has not been reported, so the model may be a step ahead of the run: call "
                "save_checkpoint after update_with_loss, or outside the batch loop"
            )
        return self._save(name or ("final" if is_final else ""))

    def load_checkpoint(self, filepath: str | Path | None = None, *, path: str | Path | None = None) -> None:
        """Restore the run's state, and the model through `load_callback`.

        What this scheduler was created with counts where the run may differ from it (the learning rate, the batch
        size, the budget, the groups, ...).

        Args:
            filepath: A checkpoint, or a directory of them: the newest valid one of the run that saved there last.
            path: Another name for it.

        Raises:
            FileNotFoundError: There is none.
            CheckpointError: It cannot be used; the run is as it was.
        """
        found = one_of("load_checkpoint", filepath=filepath, path=path)
        if self._config.shard is not None:
            found = common_checkpoint(Path(found), *self._config.shard, self._args.all_gather)
        self._restore(self._saver.find(found))

    def state_dict(self) -> State:
        """Return all that the next step depends on: JSON scalars, lists, dicts and numpy arrays.

        Saved with `torch.save` it loads with `torch.load`'s defaults (see `portable.py`).

        Raises:
            ProtocolError: The search of `auto_find_lr` is running.
        """
        if self._search is not None and self._search.running:
            raise ProtocolError("the LR search is running: its state cannot be saved, save before or after it")
        state = {
            "version": __version__,
            "config": self._config.to_json(),
            "groups": None if self._args.groups is None else self._args.groups.copy(),
            "keys": self.keys and self.keys.state_dict(),
            **self._progress.state_dict(),
            "searched": self._search is None,
            "budget": self._budget.state_dict(),
            "tickets": self._desk.state_dict(),
            "chooser": self._chooser.state_dict(),
            "catalog": self._catalog.state_dict(),
            "safety": self._safety.state_dict(),
            "guard": self._guard.state_dict(),
            "measured": self._measured.state_dict(),
        }
        return portable(state)  # type: ignore[no-any-return]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a finished run goes on where there are more epochs now.

        Raises:
            ConfigError: The state belongs to another data set, strategy or seed, and nothing has changed; or it is
                damaged, and the run goes on as before, without the backups in RAM that it had.
            ProtocolError: The search of `auto_find_lr` is running.
        """
        state = unpacked(state)
        check_state(state, self._config, self._chooser.rules)
        keys = keys_of(state, self.keys, self._config.num_samples)
        saved, size = state["config"]["num_samples"], self._config.num_samples
        state = grown(state, size)
        before, flags = self.state_dict(), (self._search, self._control.stop, self._begun, self._resumed)
        try:
            self._apply(state)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            self._apply(before)
            self._search, self._control.stop, self._begun, self._resumed = flags
            reason = f"the state is damaged ({type(error).__name__}: {error}): load another one, or start a new run"
            raise ConfigError([reason]) from error
        self._call(keys)
        if keys is not None and state.get("keys") is None:
            self.tell("the state was saved without keys: its samples are taken for those of the keys, in their order")
        if saved != size:
            self.tell(
                f"the run was saved with {saved} samples and has {size}: the new ones, from id {saved} on, join the "
                "epochs that begin from here"
            )

    def _restore(self, loaded: LoadedCheckpoint) -> None:
        check_state(loaded.state, self._config, self._chooser.rules)
        keys_of(loaded.state, self.keys, self._config.num_samples)
        if self._args.load is not None:  # first: it may fail, and nothing has changed yet
            self._args.load(str(loaded.model_path), from_ram=False)
        elif loaded.holds_model:
            message = f"there is no load_callback: the model in {loaded.path} was not loaded"
            self._bus.emit(events.Notice(step=loaded.step, message=message, level="warning"))
        self.load_state_dict(loaded.state)
        self._saver.restored(loaded, self._progress.finished_epoch)

    def _apply(self, state: Mapping[str, Any]) -> None:
        self._progress = Progress.from_state(state)
        if state["searched"] and (state["config"].get("auto_find_lr") or self._progress.global_step):
            self._search = None
        self._budget.load_state_dict(state["budget"])
        if state["config"].get("initial_lr") != self._config.initial_lr:  # what was given now counts
            self._budget.peak = self._config.initial_lr
        self._catalog.load_state_dict(state["catalog"])
        self._desk.load_state_dict(state["tickets"], self._progress.epoch, int(state["chooser"]["batches"]))
        done, total = self._budget.position(self._progress.epoch, 0, 1, self._progress.global_step)
        self._chooser.load_state_dict(state["chooser"], self._progress.epoch, self._progress.global_step, done / total)
        self._safety.load_state_dict(state["safety"])
        self._guard.load_state_dict(state["guard"])
        if told := self._measured.load(state.get("measured")):
            self.tell(told)
        self._epoch_started = self._clock.monotonic()
        self._lr = self._lr_at(self._chooser.drawn, self._chooser.batches)
        self._control.stop = None
        self._begun = False
        self._resumed = True
        self._saver.note(self._progress.global_step, self._progress.finished_epoch)
        self._due_at = 0

    def _save(self, tag: str = "") -> Path:
        step, epoch = self._progress.global_step, self._progress.finished_epoch
        write = partial(self._saver.save, step, epoch, self.state_dict, tag)
        if self._together is None:
            return write() if self._ranks.writes else self._saver.store.directory
        if self._ranks.writes:
            return self._together.lead(write)
        self._saver.note(step, epoch)
        path = self._together.follow(self.state_dict)
        self._saver.note(step, epoch, path)
        return path

    def _save_if_due(self) -> None:
        best = self._saver.best_due and not self._control.together  # else all ranks hear of it with the next report
        if best or self._saver.due(self._progress.global_step, self._progress.finished_epoch):
            self._save_if_possible(background=self._together is None)

    def _save_if_possible(self, *, background: bool = False) -> None:
        """Save; a failure is an event and a warning, and training goes on."""
        if self._config.checkpoint_dir is None or not (self._ranks.writes or self._together) or self._is_parents():
            return
        if self._search is not None and self._search.running:
            return
        try:
            if background:
                self._saver.save_in_background(
                    self._progress.global_step, self._progress.finished_epoch, self.state_dict
                )
            else:
                self._save()
        except CheckpointError as error:
            not_saved(error)

    def _is_parents(self) -> bool:
        """Whether this process was forked from the run's, which alone saves it; said once, if it trains on."""
        if self._pid in (0, os.getpid()):
            return False
        if self._forked_at < self._progress.global_step:
            tell(
                f"a process that was forked from the run's, at step {self._forked_at}, goes on with it, and saves "
                "nothing, as the run is its parent's: leave the loop in it, or give it a run of its own",
                stacklevel=3,
            )
            self._forked_at = sys.maxsize
        return True

    def _save_last(self) -> None:
        """Save the last state of a run that has a cadence, unless that has been done."""
        if self._saver.owes(self._progress.global_step) and not self._diverged:
            self._save_if_possible()

    def _rescue(self, thrown: BaseException | None) -> str:
        """Save what a run that is thrown out of its loops, or left by `break`, has done since its last checkpoint.

        Args:
            thrown: What throws it out, or None: who leaves a loop of his own will has not left a step halfway.

        Returns:
            What to tell of it; "" where there is nothing to say.
        """
        step = self._progress.global_step
        signalled = self._control.interrupts.pending is not None
        writes = self._ranks.writes or self._together is not None
        if self._diverged or not writes or not (signalled or self._saver.owes(step)):
            return ""
        if self._together is not None and not self._control.interrupted:
            return ""  # the others may be elsewhere, and all have to write it
        halfway = self._desk.in_step or (thrown is not None and self._desk.left_in_step)
        if halfway and self._args.save is not None:
            back = self._safety.recall(step, self._saver.saved_at)
            if back is None:
                return self._saver.broken_off(step)
            again = 0
            if back < step:  # the batches since come again, and count when they have
                self._desk.start_pass(None)
                again, losses = self._desk.replay(back)
                self._progress.take_back(again, losses)
                self._progress.global_step -= again
            self._save_if_possible()
            return self._saver.brought_back(step, back, again)
        self._save_if_possible()
        return self._saver.farewell(step, writes=True)


def one_of(function: str, **names: Any) -> Any:
    """Return the one argument that was given under one of several names."""
    given = [value for value in names.values() if value is not None]
    if len(given) != 1:
        raise TypeError(f"{function} needs a path as {' or '.join(names)}, got {names}")
    return given[0]
