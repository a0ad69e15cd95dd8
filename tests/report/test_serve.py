"""`r8 serve` over real HTTP, and in a real Chromium while runs go on."""

from __future__ import annotations

import gzip
import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from learnit_r8 import events as e
from learnit_r8.report.serve import Server
from learnit_r8.run.events_file import JsonlSink
from learnit_r8.run.table import LogReader, read_table
from tests.browser_driver import CHROMIUM, DRIVER, Browser


def write(folder, steps, started=False, **more):
    """Append steps to a run's log."""
    sink = JsonlSink(folder / "events.jsonl")
    if started:
        sink.record(
            e.RunStarted(
                time=0.0,
                step=0,
                run=folder.name,
                config={"num_epochs": 3},
                steps_per_epoch=1000,
                total_steps=3000,
                resumed=False,
                version="1",
                pid=1,
                elapsed=0.0,
            )
        )
    for step in steps:
        loss = float("nan") if step == 7 else 2.0 / (1 + step / 50)
        sink.record(
            e.LossReported(
                time=1.0 + step / 10,
                step=step,
                epoch=step // 1000,
                loss=loss,
                expected_loss=1.0,
                lr=0.1,
                verdict="ok",
                score=0.0,
                size=8,
                step_seconds=0.1,
                r8_seconds=0.001,
            )
        )
    for name, value in more.items():
        sink.record(e.MetricLogged(time=2.0 + max(steps), step=max(steps), name=name, value=value))
    sink.close()


@contextmanager
def serving(*folders, **options):
    with Server(folders, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(url, **headers):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        data = answer.read()
        return answer.status, gzip.decompress(data) if answer.headers["Content-Encoding"] == "gzip" else data


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first"
    write(folder, range(400), started=True, val_loss=0.5)
    return folder


def test_what_is_new_is_sent_once(run):
    with serving(run) as server:
        assert b"Course of training" in get(server.url)[1]
        status, data = get(server.url + "news?known=", **{"Accept-Encoding": "gzip"})
        first = json.loads(data)
        assert status == 200
        assert "Loss" in first["titles"]
        assert "400" in first["html"]["overview"]
        assert get(f"{server.url}news?known={first['version']}") == (204, b"")
        write(run, range(400, 900))
        second = json.loads(get(f"{server.url}news?known={first['version']}")[1])
        assert second["version"] > first["version"]
        assert max(second["sources"]["chart0.0"]["last"]) == 899
        assert second["sources"].keys() == first["sources"].keys()


def test_a_growing_log_is_read_as_a_whole_one_is(run):
    reader = LogReader(run / "events.jsonl")
    for first in range(400, 2000, 400):
        with (run / "events.jsonl").open("a") as file:
            file.write('{"event":"Block","Lo')  # a line of which only a part is there yet
        reader.poll()
        text = (run / "events.jsonl").read_text()
        (run / "events.jsonl").write_text(text[: text.rindex("\n") + 1])
        write(run, range(first, first + 400))
        table, whole = reader.poll(), read_table(run / "events.jsonl")
        assert len(table) == len(whole) == first + 400
        assert all((table.columns[name] == whole.columns[name]).all() for name in ("step", "time", "lr"))
        assert len(table.others) == len(whole.others)


def test_a_run_that_has_not_begun_is_waited_for(tmp_path):
    folder = tmp_path / "late"
    write(folder, [], started=True)
    with serving(folder) as server:
        assert b"Waiting for the first" in get(server.url)[1]
        write(folder, range(10))
        assert b"Course of training" in get(server.url)[1]


def test_elsewhere_a_token_is_needed_and_here_the_own_name(run):
    with serving(run, host="0.0.0.0") as server:
        base = f"http://127.0.0.1:{server.server_address[1]}/"
        assert len(server.token) > 15
        for address in (base, base + "news", base + "?token=wrong"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                get(address)
        assert get(f"{base}?token={server.token}")[0] == 200
    with serving(run) as server, pytest.raises(urllib.error.HTTPError, match="403"):
        get(server.url, Host="evil.example")
    with serving(run) as server, pytest.raises(urllib.error.HTTPError, match="404"):
        get(server.url + "../../etc/passwd")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1400, False)])
def test_a_browser_follows_the_run_without_an_error(run, tmp_path, width, dark):
    other = tmp_path / "second"
    write(other, range(300), started=True, val_loss=0.4)
    with serving(run, other) as server:
        browser = Browser()
        try:
            browser.show(server.url, width=width, dark=dark)
            last = "return Math.max(...Bokeh.documents[0].get_model_by_name('chart0.0').data.last)"
            browser.until(last + " === 399")
            write(run, range(400, 1000))
            browser.until(last + " === 999")
            browser.until("return document.getElementById('overview').textContent.includes('1 000')")
            write(run, range(1000, 1010), accuracy=0.7)  # a number that the page has no chart of yet
            browser.until("return [...document.querySelectorAll('.chart')].some((c) => c.dataset.title === 'accuracy')")
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
            assert [entry for entry in browser.log("browser") if entry["level"] == "SEVERE"] == []
            browser.picture(tmp_path / "page.png")
            assert all(address.startswith((server.url, "data:", "blob:")) for address in browser.requests())
        finally:
            browser.close()
