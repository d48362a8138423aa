import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import torch

from engine.engine import check
from engine.weights import find_model
from serving.settings import DEMO_MODEL, Settings
from tests.conftest import LIMIT, ROOT, Server, until
from tests.models import make_model


def api(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "api.py", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_defaults_are_the_tutorials() -> None:
    settings = Settings.from_command_line([])
    assert (settings.host, settings.port) == ("0.0.0.0", 6006)


def test_a_flag_wins_over_its_variable_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_PORT", "7001")
    monkeypatch.setenv("LLAMA_MODEL", "demo")
    settings = Settings.from_command_line(["--port", "7002", "--log-content"])
    assert (settings.port, settings.model, settings.log_content) == (7002, "demo", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, they can be compiled for it")
def test_a_gpu_that_kernels_cant_be_compiled_for_is_told_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"apt install gcc python3-dev\); --device cpu"):
        check(DEMO_MODEL, "auto")
    check(DEMO_MODEL, "cpu")


def test_help_names_every_setting_and_its_meaning() -> None:
    shown = " ".join(api("--help").stdout.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert " ".join((field.description or "missing").split()) in shown


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--port", "99999"], {}, "--port"),
        (["--prot", "1"], {}, "--prot"),
        (["--device", "tpu"], {}, "--device"),
        (["--quantization", "int4"], {}, "--quantization"),
        ([], {"LLAMA_QUANTIZATION": "8"}, "--quantization"),
        (["--gpu-memory-utilization", "nan"], {}, "--gpu-memory-utilization"),
        (["--max-queue", "0"], {}, "--max-queue"),
        (["--port"], {}, "--port"),
        (["extra"], {}, "extra"),
        ([], {"LLAMA_PORT": "abc"}, "--port"),
        (["--api-key"], {}, "--api-key"),
        (["--api-key", "--log-content"], {}, "--api-key"),
        (["--api-key="], {}, "--api-key"),
        (["--api-key", ""], {}, "--api-key"),
        ([], {"LLAMA_API_KEY": " ,"}, "--api-key"),
        (["--models-folder", "/nowhere"], {}, "/nowhere"),
        (["--models-folder", "/dev/null"], {}, "/dev/null"),
        (["--model", "demo", "--max-model-len", "2049"], {}, "--max-model-len 2049"),
        (["--model", "demo", "--kv-cache-tokens", "15"], {}, "--kv-cache-tokens 15"),
        (["--model", "demo", "--host", "host.invalid"], {}, "--host host.invalid"),
        (["--model", "demo", "--host", "x" * 64], {}, "--host xxx"),
    ],
)
def test_a_wrong_option_is_named_in_one_line_and_ends_with_2(
    arguments: list[str], environment: dict[str, str], named: str
) -> None:
    result = api(*arguments, **environment)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert named in result.stderr


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_port_that_is_busy_is_told_before_anything_is_loaded(family: int, host: str) -> None:
    with socket.create_server((host, 0), family=family) as other:
        port = str(other.getsockname()[1])
        result = api("--model", "demo", "--device", "cpu", "--host", host, "--port", port)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert f"--port {port}" in result.stderr
    assert "in use" in result.stderr


def test_a_cache_larger_than_the_memory_is_told_without_a_traceback() -> None:
    result = api("--model", "demo", "--device", "cpu", "--port", "0", "--kv-cache-tokens", str(10**11))
    assert result.returncode not in (0, -signal.SIGKILL)
    assert len(re.findall("--kv-cache-tokens 100000000000: .* GB are free", result.stderr)) == 1
    assert "Traceback" not in result.stderr


def test_the_port_is_taken_at_once_and_opened_when_the_model_is_loaded(tmp_path: Path) -> None:
    """Two may have one that do not listen: if the other is the first to, the server ends, and says so."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()

    def is_taken() -> bool:
        with socket.socket() as probe:
            try:
                probe.bind(address)
            except OSError:
                return True
        return False

    with (tmp_path / "log").open("w+") as log:
        command = [sys.executable, "api.py", "--model", "demo", "--device", "cpu"]
        process = subprocess.Popen(
            [*command, "--host", address[0], "--port", str(address[1])], cwd=ROOT, stderr=log, stdout=log
        )
        try:
            until(lambda: is_taken() or process.poll() is not None)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, timeout=LIMIT)
            with socket.create_server(address):  # with SO_REUSEADDR
                code = process.wait(LIMIT)
        finally:
            process.kill()
            process.wait()
    text = (tmp_path / "log").read_text()
    assert (code, "Traceback" in text) == (1, False), text
    assert f"--port {address[1]}" in text


def test_what_can_not_be_served_is_found_in_a_moment_and_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^/nowhere can't be served: /nowhere: no such folder$"):
        check(Path("/nowhere"), "cpu")
    with pytest.raises(
        ValueError, match=r"^.*Complete it with: python model_download\.py --models-folder /no$"
    ):
        check(find_model(Path("/no")), "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^.*cuda.*$"):
            check(DEMO_MODEL, "cuda")
    make_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"^.*bytes, expected [\d,]+$"):  # and no advice to download another
        check(tmp_path, "cpu")
    weights.write_bytes(whole)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|start_header_id|>", "<|im_start|>"))
    with pytest.raises(ValueError, match=r"^.*not Llama-3's.*$"):
        check(tmp_path, "cpu")


def test_a_model_that_is_no_llama_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "mistral"'))
    result = api("--model", str(tmp_path))
    assert result.returncode == 2
    assert "model_type is 'mistral'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_public_address_and_a_misspelled_variable_are_warned_about(server: Server, tmp_path: Path) -> None:
    assert "asks for no key" not in server.log
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "api.py", "--model", "demo", "--device", "cpu"],
            cwd=ROOT, env=os.environ | {"LLAMA_PORT": "0", "LLAMA_API_KEYS": "secret"},
            stderr=log, stdout=log,
        )  # fmt: skip
        try:
            while "Uvicorn running on http://0.0.0.0:" not in (text := (tmp_path / "log").read_text()):
                assert process.poll() is None, text
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(LIMIT)
    assert "asks for no key" in text
    assert text.count(" WARNING LLAMA_API_KEYS is no setting") == text.count(" WARNING LLAMA_") == 1
    assert "secret" not in text


def test_uvicorn_serves_it_too(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "api:app", "--port", "0"],
            cwd=ROOT, env=os.environ | {"LLAMA_MODEL": "demo", "LLAMA_DEVICE": "cpu"}, stderr=log, stdout=log,
        )  # fmt: skip
        try:
            while "Uvicorn running on" not in (text := (tmp_path / "log").read_text()):
                assert process.poll() is None, text
                time.sleep(0.05)
            url = text.split("Uvicorn running on ")[1].split()[0]
            assert requests.post(url, json={"prompt": "你好"}, timeout=60).json()["status"] == 200
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT) is not None
