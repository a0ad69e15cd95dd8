"""Training under Accelerate and in the Hugging Face Trainer, on one process or on each of several.

torchrun accelerate_driver.py FOLDER [fsdp]: every rank writes down what it found; started by
test_integration_accelerate.py. With "fsdp", Accelerate's plugin shards the model (FSDP2).
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from learnit_r8 import R8Scheduler  # noqa: E402
from learnit_r8.integrations.distributed import rank_arguments  # noqa: E402
from learnit_r8.integrations.torch import (  # noqa: E402
    R8BatchSampler,
    TensorState,
    capture_state,
    follow_lr,
    restore_state,
)
from tests.backup_watch import BackupWatch, fingerprint, never, random_steps  # noqa: E402

SAMPLES, BATCH = 96, 8
RANK = int(os.environ.get("RANK", "0"))
SHARDED = sys.argv[2:] == ["fsdp"]


def scheduler_for(**options: Any) -> R8Scheduler:
    options = {"num_epochs": 3, "initial_lr": 0.02, "checkpoint_dir": None, "ui": "off"} | options
    return R8Scheduler(SAMPLES, BATCH, **options, **rank_arguments())


def factor(watch: BackupWatch) -> float:
    """Return NaN where the last rank meets a fault; the others have sound losses."""
    value = watch.factor()
    return value if int(os.environ.get("WORLD_SIZE", "1")) - 1 == RANK else 1.0


def data() -> TensorDataset:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(SAMPLES, 4)).astype(np.float32))
    return TensorDataset(torch.arange(SAMPLES), x, (x[:, 0] > 0).long())


def hexed(module: torch.nn.Module) -> list[str]:
    """Return all weights, whole."""
    state = module.state_dict().values()
    return [part.hex() for part in fingerprint([w.full_tensor() if hasattr(w, "full_tensor") else w for w in state])]


def let_cpus_shard() -> None:
    """Accelerate shards only on what it takes for GPUs; all that it then does, CPUs and gloo can do."""
    from accelerate.state import DistributedType, PartialState

    PartialState(cpu=True)
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}


def accelerated(folder: Path, *, stop_at: int = -1, resume: bool = False, faults: Any = never, **options: Any) -> dict:
    """Train a small network under Accelerate, with two micro-batches an optimizer step."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
    if SHARDED:
        let_cpus_shard()
        wrap = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 10, "cpu_ram_efficient_loading": False}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **wrap) if SHARDED else None
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    watch = BackupWatch(faults, scheduler_for, **options)
    scheduler = watch.scheduler
    torch.manual_seed(9 if resume else 0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))
    model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters()))
    accelerator.register_for_checkpointing(TensorState(scheduler))
    scheduler.attach_model(
        lambda: capture_state(network, optimizer, copy=False), lambda state: restore_state(state, network, optimizer)
    )
    follow_lr(scheduler, optimizer)
    sampler = R8BatchSampler(scheduler, ahead=1)
    loader = DataLoader(data(), batch_sampler=sampler, num_workers=1, generator=torch.Generator())
    if resume:
        accelerator.load_state(str(folder))
    seen, held, told = [], [], np.zeros(SAMPLES)
    for _ in scheduler.epoch_iterator():
        for numbers, x, y in loader:
            seen.append(numbers.tolist())
            with accelerator.accumulate(model):
                losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none") * factor(watch)
                accelerator.backward(losses.mean())
                optimizer.step()
                optimizer.zero_grad()
            held.append(losses.detach())
            told[numbers] += losses.detach().numpy()
            if accelerator.sync_gradients:
                for part in held:
                    scheduler.update_with_loss(part)
                held.clear()
            if scheduler.global_step == stop_at:
                accelerator.save_state(str(folder))
                return {"seen": seen, "weights": hexed(network)}
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(told := torch.from_numpy(told))
    apart = np.abs(scheduler.catalog.mean_loss * scheduler.catalog.uses - np.asarray(told)).max()
    return {"seen": seen, "weights": hexed(network), "losses_apart": float(apart), **watch.findings()}


def resumed(folder: Path) -> dict:
    """Return whether a run that Accelerate saved and loaded is the uninterrupted one."""
    whole = accelerated(folder)
    head = accelerated(folder, stop_at=18)
    tail = accelerated(folder, resume=True)
    return whole | {
        "same_ids": head["seen"] + tail["seen"] == whole["seen"],
        "same_weights": tail["weights"] == whole["weights"],
    }


def trainer(folder: Path, *, faults: Any = never, hidden_at: int = -1, resume: int = 0, **options: Any) -> dict:
    """Train with R8Trainer; NaN comes on one rank, or, hidden, into its part of a weight that no loss depends on."""
    import transformers

    from learnit_r8.integrations.huggingface import R8Trainer

    transformers.utils.logging.set_verbosity_error()
    shards = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}} if SHARDED else {}
    args = transformers.TrainingArguments(
        str(folder / "trainer"), use_cpu=True, report_to=[], disable_tqdm=True, save_steps=20, logging_steps=1000,
        save_strategy="no" if faults is not never else "steps", **shards,
    )  # fmt: skip
    if SHARDED:
        let_cpus_shard()
    watch = BackupWatch(faults, scheduler_for, **options)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **size))
    if hidden_at >= 0:
        model.spare = torch.nn.Parameter(torch.ones(8))
    ids = np.random.default_rng(0).integers(0, 20, (SAMPLES, 6))
    rows = [{"input_ids": torch.from_numpy(row), "labels": int(row[0] > 9)} for row in ids]
    run = R8Trainer(model, args, train_dataset=rows, scheduler=watch.scheduler)
    run.log = lambda *_args, **_options: None

    def poison(_module: Any, _args: Any, outputs: Any) -> Any:
        if not model.training:
            return outputs
        by = factor(watch)
        return type(outputs)(loss=outputs.loss * by, logits=outputs.logits * by)

    class Hide(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == hidden_at and RANK:
                model.spare.detach().to_local().fill_(float("nan"))
            model.eval()  # which leaves the outermost weights of FSDP2 whole
            with torch.no_grad():
                model(rows[0]["input_ids"][None])
            model.train()

    model.register_forward_hook(poison)
    run.add_callback(Hide())
    run.train(resume_from_checkpoint=str(folder / f"trainer/checkpoint-{resume}") if resume else None)
    losses, kind = watch.scheduler.catalog.mean_loss.tolist(), type(model.classifier.weight).__name__
    return {"weights": hexed(model), "losses": losses, "kind": kind, **watch.findings()}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = {
        "resumed": resumed(folder / "resumed"),
        "faults": accelerated(folder, faults=random_steps(1), num_epochs=17),
        "trainer": trainer(folder / "faults", faults=random_steps(3), num_epochs=17),
        "whole": trainer(folder),
        "second": trainer(folder, resume=20),
    }
    if SHARDED:
        found["hidden"] = trainer(folder / "hidden", hidden_at=20)
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo of torch 2.13 aborts now and then in its destructors, with or without this library


if __name__ == "__main__":
    main()
