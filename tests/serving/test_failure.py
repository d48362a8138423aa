"""An engine that dies: everybody waiting is told, and the process ends as failed."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests

from tests.conftest import ROOT

# The real app and engine, whose device is lost at the hundredth step.
DYING = """
import sys, uvicorn, api
from engine.model_runner import ModelRunner
from serving.settings import Settings

run, steps = ModelRunner.run, iter(range(1000))
def lost(self):
    raise RuntimeError("the device is lost")
def dying(self, batch):
    if next(steps) < 100:
        return run(self, batch)
    lost(self)
ModelRunner.run, ModelRunner.check_device = dying, lost
settings = Settings.from_command_line(["--model", sys.argv[1], "--device", "cpu", "--host", "127.0.0.1"])
uvicorn.run(api.build_app(settings), host="127.0.0.1", port=0)
"""


@pytest.mark.parametrize("streaming", [True, False])
def test_a_lost_device_ends_the_process_and_every_request(
    tiny_model: Path, tmp_path: Path, streaming: bool
) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", DYING, str(tiny_model)], cwd=ROOT, stdout=output, stderr=output
        )
    try:
        while not (match := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
        url, told = match[1], []

        def ask() -> None:
            body = {"prompt": "x", "max_tokens": 400, "stream": streaming}
            told.append(requests.post(url, json=body, timeout=60))

        clients = [threading.Thread(target=ask) for _ in range(5)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert process.wait(60) != 0
    finally:
        process.kill()
    if streaming:
        assert all('"status":503' in response.text.splitlines()[-2] for response in told)
    else:
        assert [response.status_code for response in told] == [503] * 5
        assert all(response.headers["Retry-After"] for response in told)
    assert all("device is lost" not in response.text for response in told)
