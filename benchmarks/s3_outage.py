"""An S3 server on the loopback whose connections break at random moments, and what is found afterwards.

    python -m benchmarks.s3_outage [--outages 50]

The server (moto) keeps its objects in memory, so it is the way to it that is killed: a relay that drops every
connection in the middle of what it carries, and takes new ones a moment later.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_fs import example_state, model_writer, same
from learnit_r8.checkpoint.remote import Remote
from learnit_r8.checkpoint.remote_store import RemoteStore
from learnit_r8.errors import CheckpointError

SIZE = 40_000


class Outage:
    """A relay in front of a server; `cut` drops all its connections."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._refuses = False
        self.cuts = 0
        port = self._listener.getsockname()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",
        }
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._refuses:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._server))
                self._open |= {client, server}
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 14):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)

    def cut(self, seconds: float) -> None:
        """Drop what is open, and refuse what comes for a while."""
        self._refuses = True
        self.cuts += 1
        for end in tuple(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self._refuses = False

    def close(self) -> None:
        self._listener.close()


@contextmanager
def s3_server(folder: Path) -> Iterator[Outage]:
    """Start the server with an empty bucket named `bucket`, and give the relay in front of it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with open(folder / "server.log", "w") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", "/bucket")
        assert connection.getresponse().status == 200
        connection.close()
        outage = Outage(port)
        yield outage
        outage.close()
    finally:
        server.kill()
        server.wait()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one outage did.

    Attributes:
        survived: The newest whole checkpoint is one that was saved, to the bit, and none is lost whose save returned.
        failed: The save that was struck reported a failure.
        detail: Why it did not survive.
    """

    survived: bool
    failed: bool
    detail: str = ""


def judge(outage: Outage, seed: int) -> Outcome:
    """Save three checkpoints, break the connection during the third, and look at what is there."""
    rng = random.Random(seed)
    url = f"s3://bucket/outage-{seed}"
    store = RemoteStore(Remote(url), keep=2)
    began = time.monotonic()
    for step in (10, 20):
        store.save(step, example_state(step, SIZE), model_writer(step, SIZE))
    usual = (time.monotonic() - began) / 2
    timer = threading.Timer(rng.uniform(0.0, 1.2) * usual, outage.cut, (rng.choice((0.05, 0.5, 2.0)),))
    timer.start()
    committed, failed = 20, False
    try:
        store.save(30, example_state(30, SIZE), model_writer(30, SIZE))
        committed = 30
    except CheckpointError:
        failed = True
    timer.join()
    reader = RemoteStore(Remote(url))  # what it has copied here goes with it
    found = reader.newest()
    if found is None or found.step < committed:
        return Outcome(False, failed, f"seed {seed}: found {found and found.step}, {committed} was saved")
    weights = (found.model_path / "weights.bin").read_bytes()
    model_writer(found.step, SIZE)(found.path / "again")
    if weights != (found.path / "again" / "weights.bin").read_bytes():
        return Outcome(False, failed, f"seed {seed}: the model of step {found.step} is another one")
    if not same(found.state, example_state(found.step, SIZE)):
        return Outcome(False, failed, f"seed {seed}: the state of step {found.step} is another one")
    try:
        store.save(40, example_state(40, SIZE))
    except CheckpointError as error:
        return Outcome(False, failed, f"seed {seed}: the next save failed: {error}")
    after = RemoteStore(Remote(url)).newest()
    return Outcome(after is not None and after.step == 40, failed, f"seed {seed}: {after and after.step} after 40")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outages", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as outage:
        os.environ |= outage.environment
        outcomes = [judge(outage, seed) for seed in range(arguments.outages)]
    bad = [outcome.detail for outcome in outcomes if not outcome.survived]
    struck = sum(outcome.failed for outcome in outcomes)
    print(f"{len(outcomes)} outages: {struck} saves failed and said so, {len(bad)} wrong or lost", *bad, sep="\n")


if __name__ == "__main__":
    main()
