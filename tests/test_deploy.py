"""What is in deploy/ agrees with the server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.settings import Settings
from tests.conftest import ROOT

UNIT = (ROOT / "deploy" / "llama-api.service").read_text()


def test_systemd_waits_for_longer_than_answers_may_take_to_finish() -> None:
    [drain], [stop] = (
        re.findall(r"LLAMA_DRAIN_TIMEOUT=(\d+)", UNIT),
        re.findall(r"TimeoutStopSec=(\d+)", UNIT),
    )
    assert int(drain) == Settings.model_fields["drain_timeout"].default
    assert int(stop) >= int(drain) + 15


def test_every_variable_of_the_unit_is_a_setting() -> None:
    variables = re.findall(r"LLAMA_(\w+)=", UNIT)
    assert variables
    assert {name.lower() for name in variables} <= set(Settings.model_fields)


def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("systemd is not here")
    unit = tmp_path / "llama-api.service"
    unit.write_text(UNIT.replace("/opt/llama-api/.venv/bin/python", sys.executable))
    result = subprocess.run(
        [analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_every_argument_of_rays_file_is_a_setting() -> None:
    [arguments] = re.findall(
        r"^    args:.*\n((?:      .*\n)+)", (ROOT / "deploy" / "ray_serve.yaml").read_text(), re.M
    )
    names = set(re.findall(r"^ +(\w+):", arguments, re.M))
    assert {"model", "models_folder", "replicas"} & names
    assert names <= set(Settings.model_fields) | {"replicas", "max_replicas", "target_requests"}
