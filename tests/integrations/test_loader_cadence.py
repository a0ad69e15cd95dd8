"""Checkpoints fall due by reported steps, however far a loader runs ahead and however many batches share a step."""

import warnings

import pytest

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from learnit_r8 import R8Scheduler, events  # noqa: E402
from learnit_r8.integrations.torch import R8BatchSampler  # noqa: E402


def saved_steps(folder, workers, prefetch, accumulation, every=3, samples=160, batch=16, epochs=2):
    """Return the steps that were saved, and how many updates the model of each had had."""
    heard, updates = [], torch.zeros(())

    class Ear:
        def record(self, event):
            if isinstance(event, events.CheckpointSaved):
                heard.append(event.step)

    scheduler = R8Scheduler(
        samples, batch, num_epochs=epochs, ui="off", checkpoint_dir=folder, checkpoint_every=every, sinks=[Ear()],
        keep_checkpoints=100, save_callback=lambda path: torch.save(updates, path),
    )  # fmt: skip
    options = {"num_workers": workers, "prefetch_factor": prefetch} if workers else {}
    sampler = R8BatchSampler(scheduler, ahead=accumulation - 1)
    loader = DataLoader(TensorDataset(torch.arange(samples)), batch_sampler=sampler, **options)
    with scheduler:
        for _ in scheduler.epoch_iterator():
            collected = []
            for number, (ids,) in enumerate(loader):
                collected.append(ids.float())
                if len(collected) == accumulation or number + 1 == samples // batch:
                    updates += len(collected)
                    for losses in collected:
                        scheduler.update_with_loss(losses)
                    collected.clear()
    whole = {step: int(torch.load(folder / f"step-{step:09d}" / "model")) for step in heard}
    return heard, whole, scheduler.global_step


QUICK = [(0, 1), (2, 1), (2, 4), (4, 2)]
SLOW = [(workers, prefetch) for workers in (2, 4, 8) for prefetch in (1, 2, 4) if (workers, prefetch) not in QUICK]
SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in SLOW]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("workers", "prefetch"), QUICK + SLOW)
def test_no_due_checkpoint_is_missing_and_none_is_torn(workers, prefetch, accumulation, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch counts the machine's cores
        heard, whole, total = saved_steps(tmp_path, workers, prefetch, accumulation)
    for turn in range(3, total + 1, 3):  # saved at its turn, or at the end of the optimizer step that it falls into
        assert any(turn <= step < turn + accumulation for step in heard), (turn, heard)
    assert whole == {step: step for step in heard}
