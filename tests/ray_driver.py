"""Runs examples/ray_train.py and kills one of its workers at given steps; started by test_integration_examples.py.

ray_driver.py STEPS FOLDER ...: STEPS like 13,77; at the first, the second worker dies, at the second, the first one,
and so on. At every fourth, the newest checkpoint's folder goes with it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray
import ray_train


def main() -> None:
    steps = [int(step) for step in sys.argv.pop(1).split(",") if step]
    folder = Path(sys.argv.pop(1)).resolve()
    healthy = ray_train.train_on_a_worker

    def train_and_die() -> None:
        import os
        import shutil
        import signal

        update = ray_train.R8Scheduler.update_with_loss

        def dying(scheduler: Any, *args: Any, **options: Any) -> Any:
            result = update(scheduler, *args, **options)
            for number, step in enumerate(steps):
                died = folder / f"died-{step}"
                if scheduler.global_step == step and int(os.environ["RANK"]) == (number + 1) % 2 and not died.exists():
                    died.touch()
                    if number % 4 == 3:
                        shutil.rmtree(max(folder.glob("storage/r8/checkpoint_2*")))
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        ray_train.R8Scheduler.update_with_loss = dying
        healthy()

    sys.argv += ["--storage", str(folder / "storage")]
    ray.init(include_dashboard=False, object_store_memory=100 << 20)  # small: Ray starts a dozen processes as it is
    ray_train.main(train_and_die)


if __name__ == "__main__":
    main()
