"""`PromptScheduler` in verl: prompts get rollouts where their groups are likely to teach.

    data.dataloader_num_workers=0
    data.sampler.class_path=pkg://learnit_r8.integrations.verl
    data.sampler.class_name=PromptSampler
    +data.sampler.reward_range=[-1,1]

verl tells prompts apart by the `extra_info.index` of their rows. Its checkpoints of the loader hold the sampler's
state. verl saves before it reports a step, so the groups of that step are lost to a run that is resumed there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
from verl.experimental.dataset.sampler import AbstractCurriculumSampler

from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.prompts import PromptScheduler

__all__ = ["PromptSampler"]


class PromptSampler(AbstractCurriculumSampler):  # type: ignore[misc]
    """Draws the prompts of verl's trainers; an epoch is as many draws as there are prompts.

    Args:
        data_source: verl's data set.
        data_config: Its `data` section. `sampler.reward_range` (0 to 1), `sampler.group_size` (that of the first
            group) and `sampler.fade` are those of `PromptScheduler`, and `seed` its seed.

    Raises:
        ConfigError: Rows without an `extra_info.index` of their own, or an argument out of range.
    """

    def __init__(self, data_source: Any, data_config: Any) -> None:
        options = dict(data_config.get("sampler") or {})
        chosen = {name: options[name] for name in ("group_size", "fade") if name in options}
        if "reward_range" in options:
            chosen["reward_range"] = tuple(options["reward_range"])
        self._sized = "group_size" in options
        self._size = int(data_config.get("gen_batch_size") or data_config["train_batch_size"])
        self._keys = _keys_of(data_source)
        self._places = {key: place for place, key in enumerate(self._keys)}
        if len(self._places) < len(self._keys):
            raise ConfigError(["each row needs an extra_info['index'] of its own, by which verl tells prompts apart"])
        self.prompts = PromptScheduler(self._keys, seed=int(data_config.get("seed") or 0), **chosen)
        """What is known of the prompts: `pass_rate(index)`, `metrics_dict()`."""
        self._ahead: list[Hashable] = []  # of the batch that was drawn, what was not handed out yet, last first
        self._given = 0  # of this epoch

    def __len__(self) -> int:
        """Return the draws of an epoch, in whole batches: the loader would throw away what is over."""
        return len(self._keys) - len(self._keys) % self._size or len(self._keys)

    def __iter__(self) -> Iterator[int]:
        """Return places of prompts in the data set; an epoch that a checkpoint was saved in goes on."""
        while self._given < len(self):
            if not self._ahead:
                self._ahead = self.prompts.draw(self._size)[::-1]
            self._given += 1
            yield self._places[self._ahead.pop()]
        self._given = 0

    def update(self, batch: Any) -> None:
        """Learn from a step's rewards, the sums of their tokens' scores; groups that were filtered out may be missing.

        Raises:
            ProtocolError: Rows that do not say which prompt they are of.
            ValueError: A reward is out of range.
        """
        of_rows = batch.non_tensor_batch
        if not {"uid", "index"} <= set(of_rows):
            raise ProtocolError(f"the rows of a batch must have 'uid' and 'index', they have {sorted(of_rows)}")
        rewards = batch.batch["token_level_scores"].sum(-1).float().cpu().numpy()
        _, firsts, groups = np.unique(of_rows["uid"], return_index=True, return_inverse=True)
        for group, first in enumerate(firsts):
            of_group = rewards[groups == group]
            if not self._sized:
                self.prompts.group_size, self._sized = max(len(of_group), 2), True
            self.prompts.update(of_rows["index"][first], of_group)

    def state_dict(self) -> dict[str, Any]:
        """Return what torchdata's loader saves with a checkpoint."""
        return {"prompts": self.prompts.state_dict(), "ahead": list(self._ahead), "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.prompts.load_state_dict(state["prompts"])
        self._ahead, self._given, self._sized = list(state["ahead"]), int(state["given"]), True


def _keys_of(data_source: Any) -> list[Hashable]:
    """Return the `index` that verl's data set gives each of its rows."""
    frame = getattr(data_source, "dataframe", None)
    if frame is None:  # a data set of one's own, which is to number its rows
        return list(range(len(data_source)))
    infos = frame["extra_info"] if "extra_info" in frame.column_names else [None] * len(data_source)
    return [(info or {}).get("index", 0) for info in infos]
