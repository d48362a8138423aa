"""The READMEs' commands, run: their outputs are what stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serving.settings import Settings
from tests.conftest import ROOT, Server

READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]


def blocks(language: str) -> list[tuple[str, str]]:
    """The code blocks of a language in both READMEs, each with the file's name."""
    fence = re.compile(rf"^ *```{language}\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
    return [(path.name, block) for path in READMES for block in fence.findall(path.read_text("utf-8"))]


def run(command: list[str], server: Server) -> str:
    """Runs a command that means the port 6006 against our server, and returns its output."""
    script = f"""
import runpy, sys, client
client.get_completion.__kwdefaults__["url"] = client.stream_completion.__kwdefaults__["url"] = {server.url!r}
client.DEFAULT_URL = {server.url!r}
"""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [part.replace("http://127.0.0.1:6006", server.url) for part in command]
    if command[0] == "python":
        command = [sys.executable, "-c", script + command[1]]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def comparable(output: str) -> str:
    """Without times; a stream as the one piece it adds up to, since its cuts are a matter of timing."""
    output = re.sub(r'"time":"[^"]*"', '"time":""', output).strip()
    if not output.startswith("data: "):
        return output
    *pieces, done = [event.removeprefix("data: ") for event in output.split("\n\n")]
    text = "".join(json.loads(piece)["response"] for piece in pieces)
    return "\n".join([json.dumps(json.loads(pieces[-1]) | {"response": text}), done])


@pytest.mark.parametrize(("file", "block"), blocks("console"))
def test_the_outputs_in_the_readme_are_real(server: Server, file: str, block: str) -> None:
    command, _, output = block.removeprefix("$ ").partition("\n")
    command = command.replace("python client.py", f"{sys.executable} client.py --url {server.url}")
    printed = run(["bash", "-c", command], server)
    assert comparable(printed) == comparable(output)


@pytest.mark.parametrize(("file", "block"), blocks("python"))
def test_the_python_in_the_readme_runs(server: Server, file: str, block: str) -> None:
    assert run(["python", block], server)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_readme_begins_with_the_two_commands(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "pip install -r requirements.txt && python api.py --model demo\n" in text
    assert "pip install -r requirements-dev.txt && pytest\n" in text


def test_the_readme_names_every_setting_its_default_and_its_meaning() -> None:
    text = READMES[0].read_text("utf-8")
    for name, field in Settings.model_fields.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `--{name.replace('_', '-')}` |"))
        assert (field.description or "missing") in row
        if field.default_factory is None:
            assert f"| {field.default} |" in row.replace("`", "").replace("|  |", "| |").replace(
                "| empty |", "|  |"
            )


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = READMES[0].read_text("utf-8").split("## The tree")[1]
    for folder in ("serving", "engine"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name == "__init__.py" or re.search(rf"^    {path.name} ", tree, re.MULTILINE), path
    for path in ROOT.glob("*.py"):
        assert re.search(rf"^{path.name} ", tree, re.MULTILINE)
