"""Runs examples/ray_train.py and kills one of its workers, once; started by test_integration_examples.py.

ray_driver.py STEP --folder FOLDER ...: the second worker dies after so many steps, never if that is negative.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray_train


def main() -> None:
    step = int(sys.argv.pop(1))
    healthy = ray_train.train_on_a_worker

    def train_and_die(config: dict[str, Any]) -> None:
        import os
        import signal

        died = Path(config["folder"] + "-died")
        update = ray_train.R8Scheduler.update_with_loss

        def dying(scheduler: Any, *args: Any, **options: Any) -> Any:
            result = update(scheduler, *args, **options)
            if scheduler.global_step == step and os.environ["RANK"] == "1" and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        ray_train.R8Scheduler.update_with_loss = dying
        healthy(config)

    ray_train.train_on_a_worker = train_and_die
    ray_train.main()


if __name__ == "__main__":
    main()
