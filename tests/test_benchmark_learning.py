"""The learning benchmark runs, its tasks are what they say, and its figures are computed rightly."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks import harness, learning
from benchmarks.tasks import SEEN, TUNED, UNSEEN, make_task


@pytest.mark.parametrize("name", [*TUNED, *SEEN, *UNSEEN])
def test_a_task_has_the_share_of_wrong_labels_that_its_name_says(name):
    task = make_task(name, 0)
    share = float(name.partition(" ")[2].rstrip("%") or 0) / 100
    assert task.wrong.mean() == pytest.approx(share, abs=1 / len(task.targets))
    assert task.groups is None or np.array_equal(task.groups, task.targets)


@pytest.mark.parametrize("name", ["digits", "friedman", "characters"])
def test_a_model_learns_and_its_gradient_is_that_of_its_losses(name):
    task = make_task(name, 0)
    model = task.model(0)
    ids, weights = np.arange(4), np.array([0.5, 1.5, 1.0, 2.0])
    model.values = model.values.astype(np.float64)
    model.parts = _views(model)
    before = model.values.copy()
    model.train(ids, 0.0, weights)
    gradient = model.gradient.copy()
    rng = np.random.default_rng(0)
    direction = rng.normal(size=len(before))

    def weighted(step: float) -> float:
        model.values[:] = before + step * direction
        return float((model.train(ids, 0.0, weights) * weights).mean())

    slope = (weighted(1e-5) - weighted(-1e-5)) / 2e-5
    scale = 2.0 if name == "friedman" else 1.0  # the squared error's derivative is taken without its factor
    assert scale * float(gradient @ direction) == pytest.approx(slope, rel=2e-2)


def _views(model):
    ends = np.cumsum([0] + [part.size for part in model.parts])
    return [model.values[a:b].reshape(p.shape) for a, b, p in zip(ends[:-1], ends[1:], model.parts, strict=True)]


def test_a_tiny_run_has_a_table_and_figures(monkeypatch):
    monkeypatch.setattr(learning, "BATCH", 128)
    arms = learning.all_arms()
    figures = learning.measure(["cancer"], [arms["uniform"], arms["infobatch"]], 2, processes=1)["cancer"]
    assert figures["uniform"]["against matched uniform"][0] == 0
    assert figures["infobatch"]["gradients"] < 1
    assert "| cancer |" in learning.gains_table({"cancer": figures}, "against matched uniform")


def test_runs_that_were_kept_are_not_repeated_and_missing_ones_are(monkeypatch, tmp_path):
    monkeypatch.setattr(learning, "BATCH", 128)
    arms, trained = learning.all_arms(), []
    real = learning.train
    monkeypatch.setattr(learning, "train", lambda task, arm, *rest: trained.append(arm.name) or real(task, arm, *rest))
    wanted = [arms["uniform"], arms["quadrant"]]
    first = learning.measure(["cancer"], wanted[:1], 1, processes=1, keep=tmp_path / "runs")
    both = learning.measure(["cancer"], wanted, 2, processes=1, keep=tmp_path / "runs")
    assert trained == ["uniform", "quadrant", "uniform", "quadrant"]
    assert both["cancer"]["uniform"]["scores"][:1] == first["cancer"]["uniform"]["scores"]
    assert learning.measure(["cancer"], wanted, 2, processes=1, keep=tmp_path / "runs") == both
    assert len(trained) == 4


def test_an_interval_is_that_of_students_t():
    mean, half = learning.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.30265 / 3**0.5, rel=1e-4)


def test_gains_are_points_of_accuracy_or_per_cent_of_loss():
    assert learning.gains([0.9], [0.8], loss=False) == pytest.approx([10])
    assert learning.gains([0.9, 0.9], [1.0, 1.0], loss=True) == pytest.approx([10, 10])


def test_the_samples_to_a_score_are_where_the_mean_curve_first_reaches_it():
    curves = [[(10, 0.1), (20, 0.5), (30, 0.9)], [(12, 0.1), (24, 0.7), (36, 0.5)]]
    assert learning.samples_to(curves, 0.6, loss=False) == 22
    assert np.isnan(learning.samples_to(curves, 0.95, loss=False))


def test_results_are_strict_json(tmp_path, monkeypatch):
    out = tmp_path / "learning.json"
    monkeypatch.setattr(learning, "measure", lambda *args: _made_up())
    monkeypatch.setattr(sys, "argv", ["learning.py", "--json", str(out)])
    with pytest.raises(SystemExit) as ended:
        harness.main(learning.run, learning.table, learning.__doc__)
    assert ended.value.code == 0
    saved = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert saved["versions"]["numpy"] == np.__version__
    assert saved["results"]["tasks"]["digits"]["auto"]["to uniform's score"] is None


def _made_up():
    run = {"score": 0.5, "gradients": 10, "curve": [(10, 0.5)], "decisions": []}
    worse = {**run, "score": 0.4, "curve": [(10, 0.4)]}
    return {"digits": learning.summarise({"uniform": [run, run], "auto": [worse, worse]}, loss=False)}
