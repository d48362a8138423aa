"""The benchmarks run, and count what they say they count."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scaling
from benchmarks.random_model import write_random_model
from engine.narrow_linear import compiled
from tests.conftest import ROOT

WEIGHT = 2 if compiled(torch.bfloat16) else 4
"""Bytes of one that is bfloat16 and computes in float32, on the CPU."""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("benchmarks") / "model"
    write_random_model(
        model, layers=1, hidden_size=64, intermediate_size=128, heads=4, kv_heads=2, vocab_size=400
    )
    return model


def run(module: str, flags: str) -> dict[str, Any]:
    """The result of a benchmark: the last line of its output."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *flags.split()],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_comparison_runs_on_a_small_model(small_model: Path) -> None:
    work = "--clients 1 3 --repetitions 1 --output-tokens 6 --prompt-words 4 --threads 1"
    result = run("serving", f"--model {small_model} {work}")
    assert [(m["server"], m["clients"]) for m in result["measurements"]] == [
        ("tutorial", 1),
        ("tutorial", 3),
        ("ours", 1),
        ("ours", 3),
    ]
    assert set(result["ratios"]) == {"1", "3"}
    assert all(m["tokens_per_s"] > 0 for m in result["measurements"])


def test_our_server_is_asked_as_its_peers_are(small_model: Path) -> None:
    work = "--clients 1 2 --rounds 2 --output-tokens 6 --prompt-words 4 --threads 1"
    result = run("peers", f"--servers ours --model {small_model} {work}")
    assert [(m["server"], m["clients"]) for m in result["measurements"]] == [("ours", 1), ("ours", 2)]
    assert all(m["tokens_per_s"] > 0 and m["ttft_p50"] > 0 for m in result["measurements"])


def test_the_measure_of_guesses_runs_on_a_small_model() -> None:
    shape = "--layers 1 --hidden-size 512 --vocab-size 400 --period 20 --output-tokens 30"
    result = run("speculation", f"{shape} --speculate 3 --probability 0.999 0.6 --repetitions 2")
    surest, unsure = result["rows"]
    assert surest["tokens_per_step"] > 2
    assert 1 < unsure["tokens_per_step"] < surest["tokens_per_step"]
    assert unsure["right_of_drafts"] < surest["right_of_drafts"] <= 1


def test_the_roofline_runs_on_a_small_model() -> None:
    shape = "--device cpu --dtype float32 --layers 1 --hidden-size 512 --vocab-size 2048"
    cells = "--batch 1 2 --context 16 32 --steps 2 --prefill 32 64 --max-batch-tokens 48"
    work = "--clients 2 --batching-clients 3 --prompt-tokens 12 --output-tokens 4 --batching-output-tokens 5"
    result = run("decode", f"{shape} {cells} {work} --probe-mib 16 --matmul 256")
    weights = WEIGHT * 512 * (2 * 512 + 2 * 128 + 3 * 1792 + 2048) + 4 * 3 * 512
    assert result["weights"] == weights
    kv_bytes = 2 * 128 * 4
    assert [(row["batch"], row["context"], row["bytes"]) for row in result["decode"]] == [
        (batch, context, weights + batch * context * kv_bytes) for context in (16, 32) for batch in (1, 2)
    ]
    assert [row["tokens"] for row in result["prefill"]] == [32, 64]
    assert set(result["work"]) == {"generate", "continuous_batching", "engine_2", "engine_3"}
    assert result["ratios"].keys() == {"generate", "continuous_batching"}
    fastest = max(result["decode"], key=lambda row: row["tokens_per_s"])
    assert result["http"]["clients"] == fastest["batch"]
    assert result["http"]["step_ms"] == pytest.approx(1000 * fastest["step_s"], abs=1e-4)
    assert 0 < result["http"]["share"] < 1.5


def test_what_int8_changes_is_measured_on_a_small_model() -> None:
    shape = "--device cpu --dtype float32 --layers 1 --hidden-size 512 --vocab-size 2048"
    result = run("quantization", f"{shape} --dialogs 3 --batch 1 2 --context 16 --steps 2 --prefill 32")
    assert [(row["weights"], row["with"]) for row in result["agreement"]] == [
        ("int8", "bfloat16"),
        ("int8", "float32"),
        ("bfloat16", "float32"),
    ]
    assert all(0.9 < row["same_next_token"] <= 1 and row["mean_kl"] > 0 for row in result["agreement"])
    matrices = 512 * (2 * 512 + 2 * 128 + 3 * 1792 + 2048)
    rows, norms = 3 * 512 + 2 * 128 + 2 * 1792 + 2048, 3 * 512
    assert result["speed"]["none"]["read"] == WEIGHT * matrices + 4 * norms
    assert result["speed"]["int8"]["read"] == matrices + 4 * (rows + norms)
    assert all([row["batch"] for row in speed["decode"]] == [1, 2] for speed in result["speed"].values())


def test_streams_at_a_gpus_rates_are_counted_whole() -> None:
    [rates] = run("http_rates", "--clients 3 --step-ms 20 --output-tokens 30")["rates"]
    assert rates["clients"] == 3
    assert 0 < rates["tokens_per_s"] <= 1.05 * 3 / 0.020
    assert 1 <= rates["tokens_per_event"] < 30


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
    result = run("scaling", f"{file} --users 30 --seconds 600")
    tokens_per_s = {(row["replicas"], row["clients"]): row["tokens_per_s"] for row in result["bursts"]}
    assert scaling.burst(options, cost, 2, one, 32).clock.now == pytest.approx(16 * 16 / tokens_per_s[1, 16])
    by_load, by_session = result["conversations"]
    assert by_session["cached"] > by_load["cached"]
    assert by_session["ttft_p50"] < by_load["ttft_p50"]
