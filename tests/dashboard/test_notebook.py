"""The notebook display in a real Jupyter kernel: one display that is updated in place, then the summary."""

from __future__ import annotations

import os
import queue

import pytest

pytest.importorskip("ipykernel", reason="needs ipykernel, of the test extra")
from jupyter_client.manager import start_new_kernel

RUN = """
import time
from learnit_r8.dashboard import open_dashboard
from learnit_r8.dashboard.demo import DemoRun
dashboard = open_dashboard(log_dir="run")
print("display", dashboard.name)
began = time.time()
for _, event in DemoRun(epochs=2, start=began):
    dashboard.record(event)
    time.sleep(0.003)
dashboard.close()
print("fault", repr(dashboard.fault))
"""


def messages(client, code, timeout=60):
    """Run code in the kernel and return what it published, in order."""
    request, found = client.execute(code), []
    while True:
        try:
            message = client.get_iopub_msg(timeout=timeout)
        except queue.Empty:
            pytest.fail(f"the kernel fell silent after {found}")
        if message["parent_header"].get("msg_id") != request:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "status" and content["execution_state"] == "idle":
            return found
        found.append((kind, content))


@pytest.fixture
def kernel(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in {"PYTEST_CURRENT_TEST", "CI", "R8_UI"}}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), env.get("PYTHONPATH", "")]))
    manager, client = start_new_kernel(cwd=str(tmp_path), env=env)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_one_display_is_updated_in_place_and_the_summary_follows(kernel):
    published = messages(kernel, RUN)
    assert [content for kind, content in published if kind == "error"] == []
    shown = [content for kind, content in published if kind == "display_data"]
    updates = [content for kind, content in published if kind == "update_display_data"]
    assert len(shown) == 1
    assert len(updates) >= 2
    assert {update["transient"]["display_id"] for update in updates} == {shown[0]["transient"]["display_id"]}
    frames = [update["data"]["text/plain"] for update in updates]
    assert len(set(frames)) > 1
    assert "TOTAL" in frames[-1]
    assert "<pre" in updates[-1]["data"]["text/html"]
    printed = "".join(content["text"] for kind, content in published if kind == "stream")
    assert "display notebook" in printed
    assert "reached" in printed, "the summary"
    assert printed.rstrip().endswith("fault ''")
    assert "100.0%" in frames[-1], "the last picture is that of the end"
    assert "\x1b" not in printed + "".join(frames)
