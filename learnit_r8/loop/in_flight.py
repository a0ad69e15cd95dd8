"""Batches are tickets: a loss is matched to the batch that caused it, however late it comes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnit_r8.errors import ProtocolError
from learnit_r8.types import Batch, Indices, unnoticed


class Ticket(NamedTuple):
    """An issued batch and what the scheduler keeps of it.

    Attributes:
        batch: What the user got; on several ranks it holds this rank's slice.
        indices: The whole global batch, int64, our own copy: users may write into theirs.
        weights: Importance weights of the global batch, or None for ones.
        cursor: Number of the batch within its epoch.
        batches: Batches of the epoch's plan when it was drawn: with the cursor its place in the learning-rate schedule.
        issued_at: Monotonic seconds.
        draw_seconds: Time that choosing the samples took.
        order: Places of the global batch that each rank takes; None: this one takes all.
    """

    batch: Batch
    indices: Indices
    weights: NDArray[np.float32] | None
    cursor: int
    batches: int
    issued_at: float
    draw_seconds: float
    order: Indices | None = None


class Loader(NamedTuple):
    """What stands between the scheduler and the loop that trains.

    Attributes:
        lead: Batches that it holds and the loop has not got, at most.
        ahead: Further batches that the loop holds before it reports the first of them.
        delivered: Returns how many batches of this pass the loop got so far.
        failed: Returns how many it got an error for instead; while it asks, the batch that is to come counts as one.
    """

    lead: int
    ahead: int
    delivered: Callable[[], int]
    failed: Callable[[], int] = lambda: 0


_LEFT_OUT = (
    "a batch that is left out (out of memory, bad data) is reported as update_with_loss(float('nan'), skipped=True), "
    "and what only evaluates takes evaluation_loader(loader)"
)


class InFlight:
    """Open tickets in the order of issue, and drawn batches that wait to be issued again."""

    def __init__(self, lookahead: int, replayed: int) -> None:
        self._lookahead = lookahead  # without a loader
        self._loader: Loader | None = None
        self._lead = 0  # of the loader; where it is 0 no batch can fail to come
        self._issued = 0  # in this pass over the batches
        self._stale = self._said = False
        self._failed = self._skipped = 0  # batches of this pass that did not come, and those of them that were reported
        self._next_id = 0
        self._open: dict[int, Ticket] = {}
        self._waiting: deque[Ticket] = deque()
        self.ready: list[Ticket] = []  # not drawn yet, but sure to be, as they are here; the next one last
        self._outdated: set[int] = set()
        self._calm: deque[tuple[int, Ticket, float]] = deque(maxlen=replayed)  # step, ticket, mean loss
        self._repeated: set[int] = set()  # batches of this epoch that came again
        self._asked = 0
        self.leave()

    # Where the model stands between two steps -----------------------------------------------

    def leave(self) -> None:
        """A loop begins, or is left: nobody is in a step any more."""
        self.left_in_step = self.in_step
        self.ready.clear()
        self._asked = self._back = 0  # batches asked for, also beyond the last one, and losses that came back
        self._between = 0  # batches that were out when the model was last known to stand between two steps
        self._news = True  # a loss has come back since a batch was last asked for

    def between_steps(self) -> bool:
        """A batch is asked for: return whether the model stands between two steps.

        It does where losses have come back since the last one was asked for. Where none have, a loader fills its
        queues, or batches are collected for one optimizer step.
        """
        between, self._news = self._news, False
        if between:
            self._between = self._asked - self._back
        return between

    def count_request(self) -> None:
        """Count a batch that was asked for; beyond the last one, a loader goes on asking as it delivers."""
        self._asked += 1
        if self._loader is not None and self._lead:
            self._failed = max(self._failed, self._loader.failed() - 1)

    @property
    def in_step(self) -> bool:
        """Whether the model may have been trained on a batch whose loss has not come back."""
        if not self._open or not self._asked:
            return False
        if self._loader is not None:
            return self.held > 0
        out = self._asked - self._back
        # Fewer than usual: the last batches are trained on by someone who does not go on asking.
        return out != self._between if self._back else out > 0

    @property
    def open(self) -> int:
        """Number of batches whose loss is due."""
        return len(self._open)

    @property
    def open_batches(self) -> tuple[Batch, ...]:
        """What was handed out and not reported, oldest first; to look at: their weights may be read unnoticed."""
        return tuple(unnoticed(ticket.batch) for ticket in self._open.values())

    @property
    def oldest(self) -> Ticket | None:
        """The ticket that is reported next, or None."""
        return next(iter(self._open.values()), None)

    def importance_weights(self, position: int) -> NDArray[np.float32] | None:
        """Return the weights of an open batch, by its place from the oldest; None for ones."""
        ticket = next(itertools.islice(self._open.values(), position, None))
        return None if ticket.weights is None else ticket.batch.weights

    def new_id(self) -> int:
        """Return a number that no ticket of this run has had."""
        self._next_id += 1
        return self._next_id - 1

    def allow(self, batches: int) -> None:
        """Let at least so many batches be out, in every pass."""
        self._lookahead = max(self._lookahead, batches)

    @property
    def _patience(self) -> int:
        """How many batches the loop may hold without a report."""
        return self._lookahead if self._loader is None else max(self._lookahead, self._loader.ahead + 1)

    @property
    def held(self) -> int:
        """Open batches that the loop has got. What a loader only holds ready does not count."""
        if self._loader is None:
            return len(self._open)
        return len(self._open) - max(self._issued - self._loader.delivered(), 0)

    @property
    def current(self) -> Ticket | None:
        """The batch that the loop got last, None where all that it got is reported."""
        held = self.held
        return next(itertools.islice(self._open.values(), held - 1, None)) if held > 0 else None

    @property
    def has_room(self) -> bool:
        """Whether one more batch may be handed out."""
        if not self._open and not self._stale:
            return True
        return not self._stale and len(self._open) < self._patience + self._lead and self.held < self._patience

    def check_room(self) -> None:
        """Raise unless one more batch may be handed out."""
        if self.has_room:
            return
        if self._stale:
            raise ProtocolError(
                "the state was restored while a loader held batches of the run before: leave the loop, and begin a "
                "new one over the loader"
            )
        first = next(iter(self._open.values())).batch
        raise ProtocolError(
            f"the loss of step {first.step} (epoch {first.epoch}, batch id {first.id}) has not been reported: call "
            f"update_with_loss(loss) before asking for the next batch, or create the scheduler with lookahead=n "
            f"to hold n batches at once (lookahead={self._patience}), in a loader R8BatchSampler with ahead=n - 1; "
            f"{_LEFT_OUT}"
        )

    def left_out(self, reported: int) -> str | None:
        """Say which batches a loader has drawn to an epoch's end and nobody reported, once; else None.

        Args:
            reported: Batches of the epoch that were.

        Raises:
            ProtocolError: None was: the loop does not report.
        """
        if self._loader is None or not self._loader.lead or not self._open:
            return None
        first = next(iter(self._open.values())).batch
        count = len(self._open)
        left = f"epoch {first.epoch} ends and {count} of its batches are not reported, from step {first.step} on"
        if reported == 0:
            raise ProtocolError(f"{left}: call update_with_loss(loss) for each batch, inside the loop over the loader")
        said, self._said = self._said, True
        return None if said else f"{left}: they do not count; {_LEFT_OUT}"

    def start_pass(self, loader: Loader | None) -> None:
        """Begin a loop over the batches: what is open is handed out again, first and in order."""
        self._waiting.extendleft(reversed(self._open.values()))
        self._open.clear()
        self._loader, self._issued, self._stale = loader, 0, False
        self._lead = 0 if loader is None else loader.lead
        self._failed = self._skipped = 0
        if loader is not None:
            loader.delivered()  # counts from here
        self.leave()

    def issue(self, ticket: Ticket) -> Batch:
        """Hand a ticket out."""
        self._open[ticket.batch.id] = ticket
        self._issued += 1
        if self._outdated:
            self._outdated.discard(ticket.batch.id)
        return ticket.batch

    def next_ready(self, step: int) -> Ticket | None:
        """Return the ticket that was made ready for this step; None where another one comes next."""
        if not self.ready:
            return None
        batch = self.ready[-1].batch
        if self._waiting or batch.step != step or batch.id != self._next_id:
            self.ready.clear()
            return None
        return self.ready[-1]

    def take_ready(self) -> Ticket:
        """Take the ticket that `next_ready` has returned."""
        self._next_id += 1
        return self.ready.pop()

    def hand_out(self, ticket: Ticket) -> Batch:
        """Do for a batch that is asked for all of `between_steps`, `count_request` and `issue`."""
        if self._news:
            self.between_steps()
        if self._lead:
            self.count_request()
        else:
            self._asked += 1
        return self.issue(ticket)

    @property
    def next_id(self) -> int:
        """The number that the next new ticket will have."""
        return self._next_id

    def reissue(self) -> Ticket | None:
        """Return the next batch that was drawn but never reported, or None."""
        return self._waiting.popleft() if self._waiting else None

    def drop_all(self) -> list[Ticket]:
        """Forget all tickets, open and waiting, and return them."""
        self._stale = len(self._open) > max(self.held, 0)
        dropped = [*self._open.values(), *self._waiting]
        self.ready.clear()
        self._open.clear()
        self._waiting.clear()
        self._calm.clear()
        self._repeated.clear()
        return dropped

    def find(self, batch: Batch | None) -> Ticket:
        """Return the open ticket of a batch; of the oldest one when None.

        Raises:
            ProtocolError: There is no such open ticket.
            TypeError: Not a batch of the scheduler.
        """
        if batch is None:
            if not self._open:
                raise ProtocolError(
                    "no batch is open: call update_with_loss once for each batch of batch_iterator(), inside its loop"
                )
            first = next(iter(self._open.values()))
            if (
                len(self._open) > self._lookahead and (held := self.held) > self._patience
            ):  # near an epoch's end: the loader asks for no further batch
                raise ProtocolError(
                    f"{held} batches came to the loop since step {first.batch.step} (epoch {first.batch.epoch}, batch "
                    f"id {first.batch.id}), whose loss has not been reported: this one would reach its samples; "
                    f"{_LEFT_OUT}"
                )
            return first
        if not isinstance(batch, Batch):
            raise TypeError(f"batch must be a Batch from batch_iterator() or None, got {type(batch).__name__}")
        if batch.id not in self._open:
            raise ProtocolError(
                f"batch id {batch.id} (step {batch.step}) is not open (open ids: {list(self._open) or 'none'}): report "
                "each batch once, inside the loop that handed it out"
            )
        ticket = self._open[batch.id]
        if batch is not ticket.batch and not np.array_equal(batch.indices, ticket.batch.indices):
            raise ProtocolError(
                f"batch id {batch.id} (step {batch.step}) is not open: it is another scheduler's, report it to that one"
            )
        return ticket

    def next_report(self, batch: Batch | None) -> Ticket | None:
        """Return the ticket of a batch, as `find` and `check_failed` do; None where it was out at a rollback."""
        if len(self._open) == 1 and self._lead == 0:
            (ticket,) = self._open.values()
            if batch is not None and batch is not ticket.batch:
                ticket = self.find(batch)
        else:
            ticket = self.find(batch)
            if batch is None:
                self.check_failed(skipped=False)
        return None if self._outdated else ticket

    def check_failed(self, *, skipped: bool) -> None:
        """Raise where a loss is reported while a batch that the loader failed at is not: it would get this loss.

        Args:
            skipped: A step is reported that was skipped, and so all batches that did not come until now.
        """
        if self._loader is None or self._lead == 0:
            return
        if skipped:
            self._skipped = max(self._skipped, self._loader.failed())
        elif self._failed > self._skipped:
            first, count = next(iter(self._open.values())).batch, self._failed - self._skipped
            raise ProtocolError(
                f"{count} of the batches from step {first.step} (epoch {first.epoch}) on could not be loaded, and "
                f"this loss would reach their samples: where the loader's error is caught, {_LEFT_OUT}"
            )

    def outdate(self) -> None:
        """Mark the open tickets: the model was restored, they may have been trained on the one that is gone."""
        self.ready.clear()  # their rates and samples are those of a run in which nothing happened
        # What a loader only holds ready, the newest ones, was trained on nothing yet.
        self._outdated = set(list(self._open)[: max(self.held, 0)])

    def close(self, ticket: Ticket) -> bool:
        """Remove a reported ticket; return whether it was out when the model was restored."""
        del self._open[ticket.batch.id]
        self._back, self._news = self._back + 1, True
        return ticket.batch.id in self._outdated

    def remember(self, step: int, ticket: Ticket, loss: float) -> None:
        """Keep a ticket whose loss was calm, so that it can be replayed in this epoch."""
        self._calm.append((step, ticket, loss))

    def replay(self, from_step: int) -> tuple[int, float]:
        """Let the tickets remembered since a step come again, next and in order; each does so once.

        A batch that damages the model in a way that only later losses show would else bring the damage back for ever.

        Returns:
            Their number, and the sum of their losses.
        """
        since = [(ticket, loss) for step, ticket, loss in self._calm if step >= from_step]
        for _ in since:
            self._calm.pop()
        again = [(ticket, loss) for ticket, loss in since if ticket.batch.id not in self._repeated]
        self._repeated.update(ticket.batch.id for ticket, _ in again)
        self._waiting.extendleft(ticket for ticket, _ in reversed(again))
        return len(again), sum(loss for _, loss in again)

    def state_dict(self) -> dict[str, Any]:
        """Return all unreported batches, in order; they are issued again after a restore."""
        tickets = [*self._open.values(), *self._waiting]
        return {
            "next_id": self._next_id,
            "unreported": [
                {
                    "id": t.batch.id,
                    "cursor": t.cursor,
                    "batches": t.batches,
                    "indices": t.indices,
                    "weights": t.weights,
                    "repeated": t.batch.id in self._repeated,
                }
                for t in tickets
            ],
        }

    def load_state_dict(self, state: dict[str, Any], epoch: int, batches: int) -> None:
        """Restore what `state_dict` returned; `batches` are those of the epoch, for states that do not say."""
        self.drop_all()
        self._next_id = int(state["next_id"])
        for item in state["unreported"]:
            indices = np.array(item["indices"], np.int64)
            weights = None if item["weights"] is None else np.array(item["weights"], np.float32)
            # Only the id counts: step and learning rate are set when it is issued again.
            blank = Batch(indices, 0.0, np.ones(0, np.float32), int(item["id"]), 0, epoch)
            planned = int(item.get("batches", batches))
            self._waiting.append(Ticket(blank, indices, weights, int(item["cursor"]), planned, 0.0, 0.0))
            if item.get("repeated"):
                self._repeated.add(blank.id)
