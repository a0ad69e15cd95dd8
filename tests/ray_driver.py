"""Runs examples/ray_train.py and kills one of its workers at given steps; started by test_integration_examples.py.

ray_driver.py STEPS FOLDER ...: STEPS like 13,77; at the first, the second worker dies, at the second, the first one,
and so on. At every second of which two checkpoints are there, the newest one's folder goes with it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray_train


def main() -> None:
    steps = [int(step) for step in sys.argv.pop(1).split(",") if step]
    folder = Path(sys.argv.pop(1)).resolve()
    healthy = ray_train.train_on_a_worker

    def train_and_die() -> None:
        import os
        import shutil
        import signal
        import time

        update = ray_train.R8Scheduler.update_with_loss

        def dying(scheduler: Any, *args: Any, **options: Any) -> Any:
            result = update(scheduler, *args, **options)
            for number, step in enumerate(steps):
                died = folder / f"died-{step}"
                if scheduler.global_step == step and int(os.environ["RANK"]) == (number + 1) % 2 and not died.exists():
                    died.touch()
                    kept = sorted(folder.glob("storage/r8/checkpoint_2*"))
                    if number % 2 and len(kept) > 1:
                        known = kept[-1].parent / "checkpoint_manager_snapshot.json"
                        while kept[-1].name not in known.read_text():  # else nobody would look for it
                            time.sleep(0.1)
                        shutil.rmtree(kept[-1])
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        ray_train.R8Scheduler.update_with_loss = dying
        healthy()

    sys.argv += ["--storage", str(folder / "storage")]
    ray_train.main(train_and_die)


if __name__ == "__main__":
    main()
