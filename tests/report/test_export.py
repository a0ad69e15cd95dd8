"""`r8 export`: all samples out of a checkpoint, and what stands beside a suspect in the report."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8.cli import main
from learnit_r8.report.page import page
from learnit_r8.report.run_data import load_run

N = 40


@pytest.fixture
def saved(tmp_path):
    def make(**options):
        run = R8Scheduler(
            N, 8, num_epochs=2, checkpoint_dir=tmp_path / "saved", log_dir=tmp_path / "log", ui="off", **options
        )
        for _ in run.epoch_iterator():
            for batch in run.batch_iterator():
                losses = (0.1 + batch.indices / 7).astype(np.float32)
                losses[batch.indices == 3] = np.nan
                run.update_with_loss(losses)
        run.exclude([11])
        run.save_checkpoint()
        run.close()
        return run

    return make


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_sample_is_a_row_of_what_the_catalog_knows(saved, tmp_path, capsys):
    run = saved(groups=np.arange(N) % 3)
    assert main(["export", str(tmp_path / "saved"), "-o", str(tmp_path / "samples.csv")]) == 0
    assert f"{N} samples" in capsys.readouterr().out
    rows = read(tmp_path / "samples.csv")
    assert [int(row["id"]) for row in rows] == list(range(N))
    assert [int(row["group"]) for row in rows] == (np.arange(N) % 3).tolist()
    assert [int(row["uses"]) for row in rows] == run.catalog.uses.tolist()
    assert rows[3]["mean_loss"] == ""
    others = [k for k in range(N) if k != 3]
    for name in ("mean_loss", "expected_loss", "variability", "correctness"):
        read_back = np.array([rows[k][name] for k in others], np.float32)
        assert np.array_equal(read_back, getattr(run.catalog, name)[others])
    assert [k for k in range(N) if rows[k]["left_out"] == "True"] == sorted(run.catalog.left_out.tolist()) == [3, 11]


def test_parquet_holds_the_same_with_its_types(saved, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run = saved()
    assert main(["export", str(tmp_path / "saved"), "--format", "parquet", "-o", str(tmp_path / "x.parquet")]) == 0
    table = parquet.read_table(tmp_path / "x.parquet")
    assert np.array_equal(table["uses"].to_numpy(), run.catalog.uses)
    assert str(table.schema.field("mean_loss").type) == "float"


def test_cleanlabs_issues_are_the_guards_flags_and_the_probability_of_the_label(saved, tmp_path, capsys):
    run = saved()
    assert main(["export", str(tmp_path / "saved"), "--format", "cleanlab", "-o", str(tmp_path / "x.csv")]) == 0
    rows = read(tmp_path / "x.csv")
    assert list(rows[0]) == ["id", "is_label_issue", "label_quality"]
    quality = np.array([row["label_quality"] or "nan" for row in rows], np.float64)
    expected = np.where(run.catalog.uses > 0, np.exp(-run.catalog.mean_loss.astype(float)), np.nan)
    np.testing.assert_allclose(quality, expected, rtol=1e-6)
    assert [row["is_label_issue"] == "True" for row in rows] == run.noise_guard.flagged.tolist()


def test_what_cannot_be_exported_is_said_in_one_sentence(saved, tmp_path, capsys):
    saved(noise_guard="off")
    assert main(["export", str(tmp_path / "saved"), "--format", "cleanlab", "-o", str(tmp_path / "x.csv")]) == 2
    assert "noise_guard='report'" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "log"), "-o", str(tmp_path / "x.csv")]) == 2
    assert "checkpoint" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "saved"), "-o", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def test_a_text_or_a_picture_stands_beside_each_suspect(saved, tmp_path):
    saved()

    def describe(sample):
        if sample == 39:
            return np.eye(8)
        if sample == 38:
            return np.zeros((4, 4, 3), np.uint8)
        if sample == 37:
            raise KeyError("no such file")
        return f"<b>sample {sample}</b>"

    html = page([load_run(tmp_path / "log")], describe=describe)
    assert html.count('<img src="data:image/png;base64,') == 2
    assert "&lt;b&gt;sample 36&lt;/b&gt;" in html
    assert "describe(37) failed: KeyError" in html
    assert "what it is" not in page([load_run(tmp_path / "log")])


def test_the_report_takes_a_function_by_its_name(saved, tmp_path, monkeypatch, capsys):
    saved()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_to_show.py").write_text("def show(sample):\n    return f'this is {sample}'\n", encoding="utf-8")
    assert main(["report", "log", "--describe", "mine_to_show:show"]) == 0
    assert "this is 39" in (tmp_path / "report.html").read_text(encoding="utf-8")
    sys.modules.pop("mine_to_show")
    assert main(["report", "log", "--describe", "mine_to_show:gone"]) == 2
    assert "MODULE:FUNCTION" in capsys.readouterr().err
    sys.modules.pop("mine_to_show")
