"""The benchmarks run, and count what they say they count."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
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


def test_the_simulation_finds_the_step_that_made_a_measurement_and_two_replicas_do_twice_as_much(
    tmp_path: Path,
) -> None:
    options = argparse.Namespace(max_batch_tokens=64, kv_cache_tokens=10_000, replicas=2, users=0)
    cost = scaling.StepCost(step=0.02, decode=0.003, prefill=0.001)
    one: dict[str, Any] = {"output_tokens": 16, "measurements": []}
    for clients in (1, 4, 16):
        one["measurements"].append({"clients": clients, "prompt_tokens": 70})
        fleet = scaling.burst(options, cost, 1, one, clients)
        assert fleet.total("prefills") == 70 * clients
        assert fleet.total("decodes") == 15 * clients
        one["measurements"][-1] |= {
            "tokens_per_s": clients * 16 / fleet.clock.now,
            "all_prefilled": max(request.first_token for request in fleet.answers),
        }
    found = scaling.calibrate(options, one)
    assert vars(found) == pytest.approx(vars(cost))
    file = tmp_path / "one.json"
    file.write_text(json.dumps(one))
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", str(file), "--users", "30", "--seconds", "600"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    result = json.loads(output.splitlines()[-1])
    tokens_per_s = {(row["replicas"], row["clients"]): row["tokens_per_s"] for row in result["bursts"]}
    assert scaling.burst(options, cost, 2, one, 32).clock.now == pytest.approx(16 * 16 / tokens_per_s[1, 16])
    by_load, by_session = result["conversations"]
    assert by_session["cached"] > by_load["cached"]
    assert by_session["ttft_p50"] < by_load["ttft_p50"]
