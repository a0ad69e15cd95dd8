"""One of two ranks whose host asks before each optimizer step: python gate_driver.py FOLDER (trainer|lightning)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from learnit_r8 import events
from learnit_r8.integrations.distributed import rank_arguments
from tests.integrations import test_gate_in_hosts as hosts


def main(folder: str, kind: str) -> None:
    made = {}

    def scheduler():
        made["scheduler"], made["ears"] = hosts.scheduler_for(
            clip="auto", batch_size=8, num_epochs=6, **rank_arguments()
        )
        return made["scheduler"]

    if kind == "trainer":
        torch.distributed.init_process_group("gloo")
        trainer, optimizer, model = hosts.in_trainer(folder, scheduler(), hosts.TWO_BAD, 2, check=True)
    else:
        trainer, optimizer, model = hosts.in_lightning(
            folder, scheduler, hosts.TWO_BAD, 2, check=True, devices=2, strategy="ddp"
        )
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ["RANK"])
    skipped = [event.step for event in made["ears"].of(events.LossReported) if event.verdict == "skipped"]
    found = {
        "steps": len(optimizer.got), "global_step": made["scheduler"].global_step, "skipped": skipped,
        "weights": weights.tolist(), "highest": max(optimizer.got),
        "host": trainer.state.global_step if kind == "trainer" else trainer.global_step,
    }  # fmt: skip
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
