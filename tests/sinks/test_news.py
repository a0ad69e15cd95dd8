"""News reach a real server over HTTP, joined where they come together, and a dead server never reaches training."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8 import events as e
from learnit_r8.errors import ConfigError
from learnit_r8.sinks.news import TRIES, NewsSink

# Apprise loads all of its services, among them some that use what Python 3.13 removes.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@contextmanager
def server(status=200):
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{http.server_port}", heard
        finally:
            http.shutdown()
            thread.join()


def train(*sinks, nan_at=None, fail=False):
    state = {"w": np.zeros(2)}
    with R8Scheduler(
        40, 8, num_epochs=4, checkpoint_dir=None, ui="off", sinks=sinks, state_callback=lambda: state,
        load_callback=state.update,
    ) as scheduler:  # fmt: skip
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                values = np.linspace(1.0, 1.1, len(batch.indices)).astype(np.float32)
                if batch.step == nan_at:
                    values[0] = np.nan
                    state["w"] = state["w"] * np.nan
                if fail and batch.step == 15:
                    raise ValueError("boom")
                scheduler.update_with_loss(values)


def test_a_rollback_and_the_end_reach_a_server_in_one_message():
    with server() as (address, heard):
        train(NewsSink(f"json://{address}/"), nan_at=12)
    assert len(heard) == 1
    assert "rolled back from step 12" in heard[0]["message"]
    assert "finished at step 20" in heard[0]["title"]
    assert heard[0]["type"] == "warning"


def test_ntfy_is_spoken_and_an_error_is_a_failure():
    with server() as (address, heard), pytest.raises(ValueError, match="boom"):
        train(NewsSink(f"ntfy://{address}/topic"), fail=True)
    assert len(heard) == 1
    assert heard[0]["topic"] == "topic"
    assert "error at step 15" in heard[0]["title"] + heard[0]["message"]


def test_a_run_without_news_sends_its_end_only():
    with server() as (address, heard):
        train(NewsSink(f"json://{address}/"))
    assert [message["type"] for message in heard] == ["success"]


def test_a_flood_is_one_message_and_counted():
    with server() as (address, heard):
        sink = NewsSink(f"json://{address}/", seconds=0.2)
        for n in range(500):
            sink.record(
                e.RolledBack(
                    time=float(n), step=n, to_step=n - 1, source="ram", lr_multiplier=0.5, hold_steps=10, seconds=0.1
                )
            )
        sink.close()
    assert 1 <= len(heard) <= 2
    assert sum(message["message"].count("\n") for message in heard) < 45
    assert "more" in heard[0]["message"]


def test_other_ranks_say_nothing():
    with server() as (address, heard):
        one = R8Scheduler(
            8, 4, num_epochs=1, ui="off", checkpoint_dir=None, sinks=[NewsSink(f"json://{address}/")], rank=1,
            world_size=2, all_gather=lambda array: np.concatenate([array, array]),
        )  # fmt: skip
        for _ in one.epoch_iterator():
            for batch in one.batch_iterator():
                one.update_with_loss(np.ones(len(batch.indices)))
        one.close()
    assert heard == []


def test_a_server_that_refuses_ends_the_sink_not_the_run():
    with server(status=500) as (address, heard):
        sink = NewsSink(f"json://{address}/", interval=0.0, seconds=0.0)
        sink.record(e.RunEnded(time=1.0, step=20, reason="finished", seconds=1.0))
        deadline = time.monotonic() + 20
        while sink._error is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ConnectionError, match="not delivered"):
            sink.record(e.RunEnded(time=1.0, step=20, reason="finished", seconds=1.0))
        train(sink)
    assert len(heard) == TRIES


def test_a_server_that_refuses_costs_the_others_nothing_and_they_hear_of_it():
    with server() as (good, heard), server(status=500) as (bad, refused):
        sink = NewsSink(f"json://{bad}/", f"json://{good}/", interval=0.0, seconds=0.0)
        for number in range(3):
            sink.record(e.Notice(time=1.0, step=number, message=f"news {number}", level="warning"))
            deadline = time.monotonic() + 20
            while len(refused) < TRIES and time.monotonic() < deadline:
                time.sleep(0.01)
        with pytest.raises(ConnectionError, match="5 messages in a row were not delivered to json://"):
            sink.close()
    told = "\n".join(message["message"] for message in heard)
    assert [told.count(f"news {number}") for number in range(3)] == [1, 1, 1], "none twice"
    assert told.count("were not delivered to json://") == 1
    assert len(refused) == TRIES


@pytest.mark.parametrize(
    ("urls", "options", "said"),
    [
        ((), {}, "one address"),
        (("nonsense",), {}, "does not understand"),
        (("json://x",), {"interval": -1}, "interval"),
    ],
)
def test_bad_addresses_and_times_are_refused(urls, options, said):
    with pytest.raises(ConfigError, match=said):
        NewsSink(*urls, **options)


def test_a_password_is_not_repeated():
    with pytest.raises(ConfigError) as caught:
        NewsSink("notascheme://user:hunter2@example.org")
    assert "hunter2" not in str(caught.value)
