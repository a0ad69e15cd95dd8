"""Batches are tickets: a loss is matched to the batch that caused it, however late it comes."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnit_r8.errors import ProtocolError
from learnit_r8.types import Batch, Indices

REPLAYED = 4096
"""Batches that can be replayed after a rollback, at most."""


class Ticket(NamedTuple):
    """An issued batch and what the scheduler keeps of it.

    Attributes:
        batch: What the user got; on several ranks it holds this rank's slice.
        indices: The whole global batch, int64, our own copy: users may write into theirs.
        weights: Importance weights of the global batch, or None for ones.
        cursor: Number of the batch within its epoch.
        issued_at: Monotonic seconds.
        draw_seconds: Time that choosing the samples took.
        order: Places of the global batch in the order in which the ranks take them; None: as they are.
    """

    batch: Batch
    indices: Indices
    weights: NDArray[np.float32] | None
    cursor: int
    issued_at: float
    draw_seconds: float
    order: Indices | None = None


class TicketDesk:
    """Open tickets in the order of issue, and drawn batches that wait to be issued again.

    Args:
        lookahead: How many tickets may be open at once.
    """

    def __init__(self, lookahead: int) -> None:
        self.lookahead = lookahead
        self.prefetched = 0  # of these, how many a loader holds that the model has not seen
        self._next_id = 0
        self._open: dict[int, Ticket] = {}
        self._waiting: deque[Ticket] = deque()
        self._outdated: set[int] = set()
        self._calm: deque[tuple[int, Ticket, float]] = deque(maxlen=REPLAYED)  # step, ticket, mean loss

    @property
    def open(self) -> int:
        """Number of batches whose loss is due."""
        return len(self._open)

    @property
    def open_batches(self) -> tuple[Batch, ...]:
        """What was handed out and not reported, oldest first."""
        return tuple(ticket.batch for ticket in self._open.values())

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

    def check_room(self) -> None:
        """Raise unless one more batch may be handed out."""
        if len(self._open) < self.lookahead:
            return
        first = next(iter(self._open.values())).batch
        raise ProtocolError(
            f"the loss of step {first.step} (epoch {first.epoch}, batch id {first.id}) has not been reported: call "
            f"update_with_loss(loss) before asking for the next batch, or create the scheduler with lookahead=n "
            f"to hold n batches at once (lookahead={self.lookahead})"
        )

    def issue(self, ticket: Ticket) -> Batch:
        """Hand a ticket out."""
        self._open[ticket.batch.id] = ticket
        self._outdated.discard(ticket.batch.id)
        return ticket.batch

    def reissue(self) -> Ticket | None:
        """Return the next batch that was drawn but never reported, or None."""
        return self._waiting.popleft() if self._waiting else None

    def take_back(self) -> None:
        """Un-issue all open tickets: they will be handed out again, in order."""
        self._waiting.extendleft(reversed(self._open.values()))
        self._open.clear()

    def drop_all(self) -> list[Ticket]:
        """Forget all tickets, open and waiting, and return them."""
        dropped = [*self._open.values(), *self._waiting]
        self._open.clear()
        self._waiting.clear()
        self._calm.clear()
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
            return next(iter(self._open.values()))
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

    def outdate(self) -> None:
        """Mark the open tickets: the model was restored, they may have been trained on the one that is gone."""
        # What a loader had only prefetched, the newest ones, was trained on nothing yet.
        self._outdated = set(list(self._open)[: max(self.lookahead - 1 - self.prefetched, 0)])

    def close(self, ticket: Ticket) -> bool:
        """Remove a reported ticket; return whether it was out when the model was restored."""
        del self._open[ticket.batch.id]
        return ticket.batch.id in self._outdated

    def remember(self, step: int, ticket: Ticket, loss: float) -> None:
        """Keep a ticket whose loss was calm, so that it can be replayed in this epoch."""
        self._calm.append((step, ticket, loss))

    def replay(self, from_step: int) -> tuple[int, float]:
        """Let the tickets remembered since a step come again, next and in order.

        Returns:
            Their number, and the sum of their losses.
        """
        again = [(ticket, loss) for step, ticket, loss in self._calm if step >= from_step]
        for _ in again:
            self._calm.pop()
        self._waiting.extendleft(ticket for ticket, _ in reversed(again))
        return len(again), sum(loss for _, loss in again)

    def state_dict(self) -> dict[str, Any]:
        """Return all unreported batches, in order; they are issued again after a restore."""
        tickets = [*self._open.values(), *self._waiting]
        return {
            "next_id": self._next_id,
            "unreported": [
                {"id": t.batch.id, "cursor": t.cursor, "indices": t.indices, "weights": t.weights} for t in tickets
            ],
        }

    def load_state_dict(self, state: dict[str, Any], epoch: int) -> None:
        """Restore what `state_dict` returned."""
        self.drop_all()
        self._next_id = int(state["next_id"])
        for item in state["unreported"]:
            indices = np.array(item["indices"], np.int64)
            weights = None if item["weights"] is None else np.array(item["weights"], np.float32)
            # Only the id counts: step and learning rate are set when it is issued again.
            blank = Batch(indices, 0.0, np.ones(0, np.float32), int(item["id"]), 0, epoch)
            self._waiting.append(Ticket(blank, indices, weights, int(item["cursor"]), 0.0, 0.0))
