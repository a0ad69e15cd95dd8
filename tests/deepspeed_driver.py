"""One rank of a training under DeepSpeed, on CPUs: torchrun deepspeed_driver.py FOLDER.

Needs DS_ACCELERATOR=cpu; every rank writes down what it found; started by test_integration_deepspeed.py.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
import deepspeed  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from learnit_r8 import R8Scheduler  # noqa: E402
from learnit_r8.errors import ConfigError  # noqa: E402
from learnit_r8.integrations.distributed import collective, rank_arguments  # noqa: E402
from learnit_r8.integrations.torch import capture_state, follow_lr  # noqa: E402
from tests.sharded_driver import BATCH, SAMPLES, X, Y, network  # noqa: E402

RANK = int(os.environ["RANK"])
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH // 2,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 10**9,
}


def engine_for(stage: int) -> tuple[nn.Module, Any, Any]:
    net = network().float()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0)
    config = CONFIG | {"zero_optimization": {"stage": stage}}
    engine, optimizer, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    return net, engine, optimizer


def whole(net: nn.Module) -> list[float]:
    parameters = list(net.parameters())
    if not hasattr(parameters[0], "ds_id"):
        return [value for parameter in parameters for value in parameter.detach().flatten().tolist()]
    with deepspeed.zero.GatheredParameters(parameters):
        return [value for parameter in parameters for value in parameter.detach().flatten().tolist()]


def train(folder: Path, stage: int, *, nan: tuple[int, ...] = (), stop_at: int = -1, resume: bool = False) -> dict:
    """The loop of docs/several-gpus.md with an engine; its own functions write and read checkpoints, on all ranks."""
    net, engine, optimizer = engine_for(stage)
    options = {"save_callback": collective(lambda path: engine.save_checkpoint(path)), "ui": "off"} | rank_arguments()
    options |= {"load_callback": lambda path: engine.load_checkpoint(path)}
    if resume:
        scheduler = R8Scheduler.resume_from_checkpoint(folder, **options)
    else:
        goals = {"num_epochs": 3, "initial_lr": 1e-2, "checkpoint_dir": folder, "checkpoint_every": 10}
        scheduler = R8Scheduler(SAMPLES, BATCH, **goals, **options)
    follow_lr(scheduler, optimizer)
    rolled_back, losses, rates, told = [], [], [], torch.zeros(SAMPLES)
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            ids = torch.from_numpy(batch.indices)
            each = nn.functional.cross_entropy(engine(X[ids].float()), Y[ids], reduction="none")
            if batch.step in nan and RANK:
                each = each * float("nan")
            engine.backward(each.mean())
            engine.step()
            rates.append({group["lr"] for group in optimizer.param_groups} == {batch.lr})
            result = scheduler.update_with_loss(each)
            losses.append(result.loss)
            told[ids] += each.detach()
            if result.rolled_back:
                rolled_back.append((batch.step, scheduler._safety.restored_step))
            if scheduler.global_step == stop_at:
                scheduler.save_checkpoint()
                return {"losses": losses}
    torch.distributed.all_reduce(told)
    apart = abs(scheduler.catalog.mean_loss * scheduler.catalog.uses - told.numpy()).max()
    rest = {"rolled_back": rolled_back, "rates": all(rates), "apart": float(apart)}
    return {"weights": whole(net), "losses": losses, **rest}


def refused(*given: Any) -> bool:
    try:
        capture_state(*given)
    except ConfigError as error:
        return "DeepSpeed's states cannot be copied" in str(error)
    return False


def captures(stage: int) -> dict:
    """Whatever part of it is given: no copy of a part of a state."""
    net, engine, optimizer = engine_for(stage)
    inner = optimizer.optimizer
    given = {"engine": (engine,), "both": (net, optimizer), "net": (net,), "inner": (net, inner)}
    return {name: refused(*parts) for name, parts in given.items()}


def accelerated(stage: int) -> dict:
    """Accelerate's plugin: what it prepares gives no backup, and that is said before the first step."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=1))
    accelerator.state.deepspeed_plugin.deepspeed_config.update(CONFIG)
    net = network().float()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    scheduler = R8Scheduler(SAMPLES, BATCH, num_epochs=1, checkpoint_dir=None, ui="off", **rank_arguments())
    scheduler.attach_model(lambda: capture_state(net, optimizer, copy=False), lambda state: None)
    try:
        next(scheduler.batch_iterator())
    except ConfigError as error:
        said = str(error)
    return {"said": said, "optimizer": refused(None, optimizer), "model": refused(model)}


def trainer(folder: Path, stage: int, *, resume: int = 0, **more: Any) -> dict:
    """R8Trainer: no backups, and that is said; its checkpoints are whole."""
    import transformers
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    from learnit_r8.integrations.huggingface import R8Trainer

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED  # else it reckons with one process

    transformers.utils.logging.set_verbosity_error()
    config = CONFIG | {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"} | more
    args = transformers.TrainingArguments(
        str(folder), report_to=[], disable_tqdm=True, save_steps=10, deepspeed=config,
        accelerator_config={"use_configured_state": True},
    )  # fmt: skip
    told: list[str] = []
    scheduler = R8Scheduler(96, 8, num_epochs=2, initial_lr=1e-2, checkpoint_dir=None, ui="off", **rank_arguments())
    scheduler.tell = told.append
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **size))
    ids = torch.randint(0, 20, (96, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": int(row[0] > 9)} for row in ids]
    run = R8Trainer(model, args, train_dataset=rows, scheduler=scheduler)
    run.log = lambda *_args, **_options: None
    rates: list[bool] = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            optimizer = run.model_wrapped.optimizer
            rates.append({group["lr"] for group in optimizer.param_groups} == {scheduler.open_batches[0].lr})

    run.add_callback(Watch())
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    losses = scheduler.catalog.mean_loss.tolist()
    return {"weights": whole(model), "losses": losses, "told": told, "rates": rates}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        head = train(folder / f"half-{stage}", stage, stop_at=25)["losses"]
        tail = train(folder / f"half-{stage}", stage, resume=True)
        found[f"plain{stage}"] = {
            "whole": train(folder / f"whole-{stage}", stage),
            "resumed": tail | {"losses": head + tail["losses"]},
            "faults": train(folder / f"faults-{stage}", stage, nan=(33, 34)),
            "refused": captures(stage),
        }
    found |= {f"accelerate{stage}": accelerated(stage) for stage in (2, 3)}
    own = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}
    for stage, resume in itertools.product((2, 3), (0, 10)):
        found[f"trainer{stage}-{resume}"] = trainer(folder / f"trainer-{stage}", stage, resume=resume, **own)
    try:
        trainer(folder, 2, scheduler={"type": "WarmupLR", "params": {}}, **own)
    except ConfigError as error:
        found["error"] = str(error)
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo of torch 2.13 aborts now and then in its destructors, with or without this library


if __name__ == "__main__":
    main()
