"""The benchmarks run, and count what they say they count."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.random_model import write_random_model
from tests.conftest import ROOT


def test_the_comparison_runs_on_a_small_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_random_model(
        model, layers=1, hidden_size=64, intermediate_size=128, heads=4, kv_heads=2, vocab_size=400
    )
    command = "--clients 1 3 --repetitions 1 --output-tokens 6 --prompt-words 4 --threads 1"
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", "--model", str(model), *command.split()],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
    ).stdout  # fmt: skip
    result = json.loads(output.splitlines()[-1])
    assert [(m["server"], m["clients"]) for m in result["measurements"]] == [
        ("tutorial", 1),
        ("tutorial", 3),
        ("ours", 1),
        ("ours", 3),
    ]
    assert set(result["ratios"]) == {"1", "3"}
    assert all(m["tokens_per_s"] > 0 for m in result["measurements"])
