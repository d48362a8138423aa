"""/metrics: its figures are those of the requests that were sent."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak import in_use, read_metrics
from tests.conftest import LONG, ROOT, Server, occupied, posted, read_events, until


class Figures(dict[str, float]):
    """A scrape: samples by name, those with a label by name and its value, as `llama_x_total stop`."""

    @classmethod
    def of(cls, url: str) -> "Figures":
        response = requests.get(f"{url}/metrics", timeout=30)
        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        families = text_string_to_metric_families(response.text)
        return cls({
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in families for sample in family.samples
        })  # fmt: skip

    def since(self, before: "Figures") -> dict[str, float]:
        """Which of the counters have changed, and by how much. No gauges, times or buckets."""
        return {
            name.removeprefix("llama_"): value - before[name]
            for name, value in self.items()
            if re.match(r"llama_\w+(_total|_count|_tokens_sum)( |$)", name) and value != before[name]
        }


def eventually(changes: Callable[[], dict[str, float]], expected: dict[str, float]) -> None:
    """A stream is counted when its last byte is sent: a reader may be quicker."""
    deadline = time.monotonic() + 20
    while not expected.items() <= changes().items():
        assert time.monotonic() < deadline, (changes(), expected)
        time.sleep(0.05)


def test_tokens_lengths_and_finish_reasons_are_those_of_the_answers(tiny_server: Server) -> None:
    before = Figures.of(tiny_server.url)
    cut = tiny_server.post(prompt="x", temperature=0, max_tokens=9).json()
    stopped = tiny_server.post(prompt="x", temperature=0, max_tokens=9, stop=cut["response"][3]).json()
    assert (cut["finish_reason"], stopped["finish_reason"]) == ("length", "stop")
    prompts = cut["usage"]["prompt_tokens"] + stopped["usage"]["prompt_tokens"]
    answers = cut["usage"]["completion_tokens"] + stopped["usage"]["completion_tokens"]
    changes = Figures.of(tiny_server.url).since(before)
    pieces = changes.pop("inter_token_latency_seconds_count")
    assert 2 <= pieces <= answers - 2
    changes.pop("prefix_cache_hits_total", None)
    assert changes == {
        "request_finished_total length": 1,
        "request_finished_total stop": 1,
        "prompt_tokens_total": prompts,
        "generation_tokens_total": answers,
        "request_prompt_tokens_sum": prompts,
        "request_generation_tokens_sum": answers,
        "prefix_cache_queries_total": prompts,
        "time_to_first_token_seconds_count": 2,
        "e2e_request_latency_seconds_count": 2,
        "request_prompt_tokens_count": 2,
        "request_generation_tokens_count": 2,
    }


def test_times_lie_within_those_that_the_client_saw(tiny_server: Server) -> None:
    before, begun = Figures.of(tiny_server.url), time.monotonic()
    tiny_server.post(prompt="x", max_tokens=100)
    seen, after = time.monotonic() - begun, Figures.of(tiny_server.url)
    took = {
        name: after[f"llama_{name}_seconds_sum"] - before[f"llama_{name}_seconds_sum"]
        for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
    }
    assert 0 < took["time_to_first_token"] < took["e2e_request_latency"] < seen
    assert took["time_to_first_token"] + took["inter_token_latency"] <= took["e2e_request_latency"]
    buckets = [
        value for name, value in after.items() if name.startswith("llama_e2e_request_latency_seconds_b")
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == after["llama_e2e_request_latency_seconds_count"]


def test_several_answers_are_one_request_and_their_prompt_is_counted_once(tiny_server: Server) -> None:
    before = Figures.of(tiny_server.url)
    body = {"model": "tiny", "prompt": "x" * 20, "n": 3, "max_tokens": 5, "ignore_eos": True}
    usage = requests.post(f"{tiny_server.url}/v1/completions", json=body, timeout=60).json()["usage"]
    expected = {
        "request_finished_total length": 1,
        "prompt_tokens_total": usage["prompt_tokens"],
        "generation_tokens_total": 15,
        "e2e_request_latency_seconds_count": 1,
    }
    assert expected.items() <= Figures.of(tiny_server.url).since(before).items()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_is_seen_while_it_is_there_and_counted_as_aborted(
    slow_server: Server, streaming: bool
) -> None:
    lines = slow_server.log.count("finish_reason=aborted")
    before = Figures.of(slow_server.url)
    with posted(slow_server, **LONG | {"stream": streaming}):
        # Long answers are counted while they are made, and what is counted is not counted again.
        until(lambda: "generation_tokens_total" in Figures.of(slow_server.url).since(before))
        now = Figures.of(slow_server.url)
        assert 0 < now["llama_kv_cache_usage_perc"] < 1
        assert (now["llama_num_requests_running"], now["llama_num_requests_waiting"]) == (1, 0)
    eventually(lambda: Figures.of(slow_server.url).since(before), {"request_finished_total aborted": 1})
    after = Figures.of(slow_server.url)
    until(lambda: slow_server.log.count("finish_reason=aborted") > lines)
    told = re.findall(r"completion_tokens=(\d+) \S+ \S+ finish_reason=aborted", slow_server.log)
    assert after.since(before)["generation_tokens_total"] == int(told[-1]) < 8000
    assert "e2e_request_latency_seconds_count" not in after.since(before)
    until(lambda: in_use(read_metrics(slow_server.url)) == 0)


def test_a_prompt_that_comes_again_is_found_in_the_cache(tiny_server: Server) -> None:
    tiny_server.post(prompt="y" * 100, max_tokens=1)
    before = Figures.of(tiny_server.url)
    length = tiny_server.post(prompt="y" * 100, max_tokens=1).json()["usage"]["prompt_tokens"]
    changes = Figures.of(tiny_server.url).since(before)
    assert changes["prefix_cache_queries_total"] == length
    assert changes["prefix_cache_hits_total"] == (length - 1) // 16 * 16


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/", b"{", "invalid"),
        ("/", b'{"promt": "a"}', "invalid"),
        ("/v1/completions", b"{}", "invalid"),
        ("/", b'{"prompt": "%b"}' % (b"x" * 600), "too_long"),
        ("/", b'{"prompt": "%b"}' % (b"x" * 200_000), "too_large"),
        ("/nowhere", b"", "not_found"),
    ],
)
def test_a_refusal_is_counted_once_by_its_reason(
    tiny_server: Server, path: str, body: bytes, reason: str
) -> None:
    before = Figures.of(tiny_server.url)
    assert requests.post(tiny_server.url + path, data=body, timeout=30).status_code >= 400
    assert Figures.of(tiny_server.url).since(before) == {f"request_errors_total {reason}": 1}


def test_as_many_refusals_of_a_full_queue_are_counted_as_there_were(slow_server: Server) -> None:
    before = Figures.of(slow_server.url)
    with ThreadPoolExecutor(30) as pool:
        with occupied(slow_server, 4):
            jobs = [pool.submit(slow_server.post, prompt=f"{n}", max_tokens=3) for n in range(30)]
            until(lambda: sum(job.done() for job in jobs) == 26)
        statuses = [job.result().status_code for job in jobs]
    assert (statuses.count(200), statuses.count(429)) == (4, 26)
    changes = Figures.of(slow_server.url).since(before)
    assert changes["request_errors_total queue_full"] == 26
    assert changes["request_finished_total length"] == 4


def test_openmetrics_is_there_for_those_who_ask_for_it(tiny_server: Server) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    response = requests.get(f"{tiny_server.url}/metrics", headers=accept, timeout=30)
    assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in openmetrics.text_string_to_metric_families(response.text)}
    assert {"llama_up", "llama_generation_tokens", "process_resident_memory_bytes"} <= names


# The real app and engine, whose device is lost at the tenth step, where the process does not end by that.
DEAD = """
import sys, uvicorn, api
from engine.model_runner import ModelRunner
from serving.settings import Settings

run, steps = ModelRunner.finish, iter(range(1000))
def lost(self):
    raise RuntimeError("the device is lost")
def dying(self, batch, *ahead):
    if next(steps) < 10:
        return run(self, batch, *ahead)
    lost(self)
async def stay(engine):
    pass
ModelRunner.finish, ModelRunner.check_device, api.exit_with = dying, lost, stay
settings = Settings.from_command_line(["--model", sys.argv[1], "--device", "cpu", "--host", "127.0.0.1"])
uvicorn.run(api.build_app(settings), host="127.0.0.1", port=0)
"""


def test_it_tells_of_an_engine_that_is_dead(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        command = [sys.executable, "-c", DEAD, str(tiny_model)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        while not (match := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        url = match[1]
        assert Figures.of(url)["llama_up"] == 1
        statuses = [requests.post(url, json={"prompt": "x"}, timeout=60).status_code for _ in range(3)]
        assert statuses == [503] * 3
        assert requests.get(f"{url}/health", timeout=30).status_code == 503
        figures = Figures.of(url)
        assert figures["llama_up"] == 0
        assert figures["llama_request_finished_total error"] == 1
        assert figures["llama_request_errors_total engine_dead"] == 3
    finally:
        process.kill()
        process.wait()


def test_every_figure_of_the_dashboard_is_there(tiny_server: Server) -> None:
    text = requests.get(f"{tiny_server.url}/metrics", timeout=30).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    labels = {sample.name: set(sample.labels) | {"instance"} for sample in samples}
    dashboard: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for query in [*queries, dashboard["templating"]["list"][1]["definition"]]:
        names = re.findall(r"llama_\w+", query)
        assert names
        assert set(names) <= set(labels), query
        for label in re.findall(r"by \((\w+)\)|(\w+)=~|\{\{(\w+)\}\}", query):
            assert all("".join(label) in labels[name] for name in names), query


def test_the_dashboard_is_what_grafana_reads() -> None:
    dashboard: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(dashboard)
    source, instance = dashboard["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": f"${{{source['name']}}}"}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(f'{{instance=~"${instance["name"]}"}}' in target["expr"] for target in panel["targets"])
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_guesses_are_counted_and_change_no_answer(
    start_server: Callable[..., Server], tiny_model: Path, tiny_server: Server
) -> None:
    guessing = start_server(tiny_model, "--speculate", "4")
    bodies: list[dict[str, object]] = [
        {"prompt": "x", "temperature": 0, "repetition_penalty": 1, "max_tokens": 80},
        {"prompt": "x" * 40, "seed": 1, "temperature": 0.1, "repetition_penalty": 1, "max_tokens": 80},
    ]
    for body in bodies:
        plain = tiny_server.post(**body).json()
        guessed = guessing.post(**body).json()
        *streamed, done = read_events(guessing.post(stream=True, **body))
        assert done == "[DONE]"
        assert guessed["usage"] == plain["usage"]
        assert "".join(event["response"] for event in streamed) == guessed["response"] == plain["response"]
    figures = Figures.of(guessing.url)
    drafts = figures["llama_spec_decode_num_draft_tokens_total"]
    assert 0 < figures["llama_spec_decode_num_accepted_tokens_total"] <= drafts
    assert Figures.of(tiny_server.url)["llama_spec_decode_num_draft_tokens_total"] == 0
