"""verl's curriculum sampler. verl itself is not needed: here are its interface, and a loop that calls it as verl does.

verl's trainer (2026-01) makes the sampler with `data_source=` and `data_config=`, checks that it is an
`AbstractSampler`, gives it to torchdata's loader without workers and with `drop_last=True`, repeats each row once a
completion under a `uid` of its own, may reorder them and leave groups out, saves the loader's state within a step, and
calls `update(batch=)` at the end of it.
"""

from __future__ import annotations

import abc
import sys
import types
import uuid

import numpy as np
import pytest

torch = pytest.importorskip("torch")
stateful = pytest.importorskip("torchdata.stateful_dataloader")

from learnit_r8.errors import ConfigError, ProtocolError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital'")  # torchdata 0.11 with torch 2.13
RATES = np.repeat([0.0, 0.5, 1.0], [20, 10, 20])
INDEX = [1000 + 7 * k for k in range(50)]  # verl filters rows, so an index is not a place


class Sampler(torch.utils.data.Sampler, abc.ABC):
    @abc.abstractmethod
    def __init__(self, data_source, data_config): ...


class Curriculum(Sampler):
    @abc.abstractmethod
    def update(self, batch): ...


@pytest.fixture
def verl(monkeypatch):
    names = ["verl", "verl.experimental", "verl.experimental.dataset", "verl.experimental.dataset.sampler"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].AbstractCurriculumSampler = Curriculum
    monkeypatch.delitem(sys.modules, "learnit_r8.integrations.verl", raising=False)
    import learnit_r8.integrations.verl as adapter

    yield adapter
    del sys.modules["learnit_r8.integrations.verl"]


class Frame(dict):
    column_names = property(list)


class Data(torch.utils.data.Dataset):
    def __init__(self, infos=None):
        self.dataframe = Frame(extra_info=infos or [{"index": index} for index in INDEX])

    def __len__(self):
        return len(self.dataframe["extra_info"])

    def __getitem__(self, place):
        return {"place": place, "index": self.dataframe["extra_info"][place]["index"]}


def train(adapter, *, epochs=8, state=None, save_at=-1, lost=(), **sampler):
    """Do as verl's trainer; return the places of each batch, the state of one step, and the sampler."""
    config = {"train_batch_size": 8, "seed": 3, "sampler": {"class_path": "pkg://...", **sampler}}
    chosen = adapter.PromptSampler(data_source=Data(), data_config=config)
    assert isinstance(chosen, Sampler)
    loader = stateful.StatefulDataLoader(
        Data(), batch_size=8, num_workers=0, drop_last=True, sampler=chosen, collate_fn=list
    )
    assert len(loader) == 6
    if state is not None:
        loader.load_state_dict(state)
    drawn, step, saved = [], 0 if state is None else save_at + 1, None
    while step < epochs * len(loader):
        for rows in loader:
            rng = np.random.default_rng(step)
            drawn.append([row["place"] for row in rows])
            uids = np.array([str(uuid.uuid4()) for _ in rows], object).repeat(4)
            places = np.repeat(drawn[-1], 4)
            scores = torch.zeros(len(places), 5)
            scores[:, 2] = torch.from_numpy((rng.random(len(places)) < RATES[places]).astype(np.float32))
            order = rng.permutation(len(places))[: len(places) if step not in lost else 0]
            if step == save_at:
                saved = loader.state_dict()
            if len(order):
                of_rows = {"uid": uids[order], "index": np.array(INDEX, object)[places[order]]}
                chosen.update(
                    batch=types.SimpleNamespace(batch={"token_level_scores": scores[order]}, non_tensor_batch=of_rows)
                )
            step += 1
    return drawn, saved, chosen


def test_prompts_whose_groups_are_mixed_come_more_often(verl):
    drawn, _, sampler = train(verl, epochs=10)
    assert {len(batch) for batch in drawn} == {8}
    assert all(len(set(batch)) == 8 for batch in drawn)
    late = np.concatenate(drawn[30:])
    assert np.isin(late, np.arange(20, 30)).mean() > 1.4 * 0.2
    numbers = sampler.prompts.metrics_dict()
    assert numbers["groups"] == 60 * 8
    assert sampler.prompts.group_size == 4
    assert sampler.prompts.pass_rate(INDEX[49]) > 0.8


def test_a_run_goes_on_amid_an_epoch_without_the_groups_of_the_step_that_was_saved(verl):
    whole, saved, _ = train(verl, save_at=9, lost={9})
    again, _, _ = train(verl, save_at=9, state=saved)
    assert again == whole[10:]


def test_what_it_cannot_work_with_is_refused(verl):
    config = {"train_batch_size": 8, "sampler": {}}
    with pytest.raises(ConfigError, match="extra_info"):
        verl.PromptSampler(Data([{"index": 0}, None]), config)
    with pytest.raises(ConfigError, match="group_size"):
        verl.PromptSampler(Data(), config | {"sampler": {"group_size": 1}})
    sampler = verl.PromptSampler(Data(), config | {"sampler": {"reward_range": [-1, 0]}})
    batch = types.SimpleNamespace(batch={"token_level_scores": torch.ones(2, 1)}, non_tensor_batch={"uid": [0, 0]})
    with pytest.raises(ProtocolError, match="'uid' and 'index'"):
        sampler.update(batch)
    batch.non_tensor_batch["index"] = [INDEX[0]] * 2
    with pytest.raises(ValueError, match="reward_range"):
        sampler.update(batch)
