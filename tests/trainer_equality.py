"""One training by R8 and by the plain class on the same batches; run by torchrun, on several processes.

python -m tests.trainer_equality ACCUMULATION NAME...
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from learnit_r8 import R8Scheduler
from tests.trainer_cases import BATCH, CASES, Case

RATE = 0.05


class Reports:
    """Stands between trainer and scheduler: notes every batch and what was reported for it."""

    def __init__(self, scheduler: R8Scheduler) -> None:
        self.batches: list[list[int]] = []
        self.losses: list[list[float]] = []
        self._scheduler, self._update = scheduler, scheduler.update_with_loss
        scheduler.update_with_loss = self  # type: ignore[method-assign, assignment]

    def __call__(self, loss: Any, batch: Any = None, *, skipped: bool = False) -> Any:
        self.batches.append(self._scheduler.open_batches[0].indices.tolist())
        self.losses.append(loss.reshape(-1).tolist())
        return self._update(loss, batch, skipped=skipped)


class Notices(list[str]):
    """A sink that keeps what a run says."""

    def record(self, event: Any) -> None:
        if type(event).__name__ == "Notice":
            self.append(event.message)


def mixed(case: Case, folder: Path, scheduler: R8Scheduler, **options: Any) -> Any:
    """Return a case's trainer that the scheduler drives."""
    from learnit_r8.integrations.huggingface import R8Mixin

    both = type("Both", (R8Mixin, case.trainer()), {})
    always = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    args = case.args()(str(folder), **always | case.options | options)
    return both(case.model(), args=args, train_dataset=case.rows(), scheduler=scheduler, **case.extra())


def on_batches(cls: type, epochs: list[list[list[int]]]) -> type:
    """Return a trainer class that draws the given batches, with a loader that nothing has prepared."""

    class Replayed(cls):  # type: ignore[misc, valid-type]
        def get_train_dataloader(self) -> Any:
            waiting = iter(epochs)

            class Sampler:
                def __iter__(self) -> Iterator[list[int]]:
                    return iter(next(waiting))

                def __len__(self) -> int:
                    return len(epochs[0])

            data, collate = self.train_dataset, self.data_collator
            if type(data).__module__.startswith("datasets."):
                data = self._remove_unused_columns(data, description="training")
            else:
                collate = self._get_collator_with_removed_columns(collate, description="training")
            return torch.utils.data.DataLoader(data, batch_sampler=Sampler(), collate_fn=collate)

    Replayed.__name__ = cls.__name__
    return Replayed


def trained(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().float().reshape(-1) for p in model.parameters() if p.requires_grad])


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry and "train_runtime" not in entry]


def compare(case: Case, accumulation: int, folder: Path) -> dict[str, Any]:
    """Train twice, at least ten optimizer steps; return how far apart losses and weights are, and what was said."""
    from learnit_r8.integrations.distributed import rank_arguments
    from learnit_r8.integrations.huggingface import R8Mixin

    cls, size = case.trainer(), None

    class Ours(R8Mixin, cls):  # type: ignore[misc, valid-type]
        pass

    def args(**options: Any) -> Any:
        options = case.options | options | {"gradient_accumulation_steps": accumulation}
        return case.args()(
            str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no",
            optim="sgd", max_grad_norm=1.0, **options,
        )  # fmt: skip

    def theirs(epochs: Any, count: int) -> Any:
        batch = BATCH // ranks["world_size"]
        given = args(learning_rate=RATE, lr_scheduler_type="constant", num_train_epochs=count,
                     per_device_train_batch_size=batch)  # fmt: skip
        return on_batches(cls, epochs)(case.model(), args=given, train_dataset=case.rows(), **case.extra())

    args()  # begins the process group
    ranks = rank_arguments()
    if "packing" in case.options:  # how many rows there are is known once they are packed
        size = len(theirs([[]], 1).train_dataset)
    rows = case.rows()
    count = 1 if accumulation == 1 else 4
    if size is not None:
        count *= 2
    scheduler = R8Scheduler(
        size or len(rows), BATCH, num_epochs=count, initial_lr=RATE, scheduler_mode="constant", warmup_proportion=0.0,
        strategy="uniform", checkpoint_dir=None, ui="off", **ranks,
    )  # fmt: skip
    reports = Reports(scheduler)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = Ours(case.model(), args=args(), train_dataset=rows, scheduler=scheduler, **case.extra())
        before = trained(ours.model).clone()
        ours.train()
    each = len(reports.batches) // count
    plain = theirs([reports.batches[i : i + each] for i in range(0, len(reports.batches), each)], count)
    plain.train()
    mine, other = logged(ours, "loss"), logged(plain, "loss")
    return {
        "steps": ours.state.global_step,
        "weights": float((trained(ours.model) - trained(plain.model)).abs().max()),
        "moved": float((trained(plain.model) - before).abs().max()),
        "losses": max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(mine, other, strict=True)),
        "rates": logged(ours, "learning_rate") == logged(plain, "learning_rate"),
        "epochs": logged(ours, "epoch") == logged(plain, "epoch"),
        "per_sample": all(len(a) == len(b) for a, b in zip(reports.losses, reports.batches, strict=True)),
        "said": [str(one.message) for one in said if "note_sample_losses" in str(one.message)],
    }


def main() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[2:]:
            try:
                found = compare(CASES[name], int(sys.argv[1]), Path(folder))
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            if torch.distributed.is_initialized():
                everyone: list[Any] = [None] * torch.distributed.get_world_size()
                torch.distributed.all_gather_object(everyone, found)
                found = next((one for one in everyone if "error" in one), found)
                found["ranks"] = len(everyone)
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                print(json.dumps({"name": name, **found}), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
