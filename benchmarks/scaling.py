"""Simulates replicas of the engine behind a router, to plan how many a number of users needs.

    python -m benchmarks.serving --url http://127.0.0.1:6006 | tail -n 1 > one.json     one replica, measured
    python -m benchmarks.scaling one.json --replicas 2                       what two would do of the same
    python -m benchmarks.scaling one.json --replicas 2 --measured two.json   ... and how far that is from two
    python -m benchmarks.scaling one.json --replicas 4 --users 40            four with users in conversation

It is a simulation of discrete events: requests that come, steps that end. A step takes a time of its own,
one more for each sequence that decodes and one for each token of a prompt. These three are fitted to the
bursts that were measured with one replica: all their requests come at once, so that their steps are known.
"""

import argparse
import heapq
import itertools
import json
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving import percentile


@dataclass
class Request:
    """A prompt on its way to its answer. Times are in seconds."""

    prompt_tokens: int
    output_tokens: int
    came: float
    session: int
    done: Callable[["Request"], None]
    to_prefill: int = 0
    to_decode: int = 0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(frozen=True)
class StepCost:
    """What a step takes, in seconds: it is linear in what is computed."""

    step: float
    decode: float
    prefill: float

    def __call__(self, decodes: int, prefills: int) -> float:
        return self.step + decodes * self.decode + prefills * self.prefill


@dataclass
class Clock:
    """Now, and what will happen."""

    now: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), event))

    def run(self, seconds: float = float("inf")) -> None:
        """Lets things happen until nothing more will, or until that time has passed."""
        while self._events and self._events[0][0] <= seconds:
            self.now, _, event = heapq.heappop(self._events)
            event()


class Replica:
    """The engine's scheduler: running sequences first, then chunks of prompts, up to a budget of tokens."""

    def __init__(self, clock: Clock, cost: StepCost, max_batch_tokens: int, kv_cache_tokens: int) -> None:
        self._clock, self._cost = clock, cost
        self._max_batch_tokens, self._kv_cache_tokens = max_batch_tokens, kv_cache_tokens
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._cached: OrderedDict[int, int] = OrderedDict()
        self._is_busy = False
        self.steps = self.decodes = self.prefills = self.hits = 0

    @property
    def in_flight(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> None:
        known = min(self._cached.pop(request.session, 0), request.prompt_tokens - 1)
        self.hits += known
        request.to_prefill, request.to_decode = request.prompt_tokens - known, request.output_tokens
        self._waiting.append(request)
        if not self._is_busy:
            # Those that come at the same moment are all there when the step begins.
            self._is_busy = True
            self._clock.after(0.0, self._begin_step)

    def _begin_step(self) -> None:
        budget = self._max_batch_tokens
        decoding = self._running[:budget]
        budget -= len(decoding)
        prefills = 0
        prefilled = []
        while self._waiting and budget:
            chunk = min(budget, self._waiting[0].to_prefill)
            self._waiting[0].to_prefill -= chunk
            budget -= chunk
            prefills += chunk
            if self._waiting[0].to_prefill == 0:
                prefilled.append(self._waiting.popleft())
        seconds = self._cost(len(decoding), prefills)
        self._clock.after(seconds, lambda: self._end_step(decoding, prefilled, prefills))

    def _end_step(self, decoding: list[Request], prefilled: list[Request], prefills: int) -> None:
        self.steps += 1
        self.decodes += len(decoding)
        self.prefills += prefills
        for request in prefilled:
            request.first_token = self._clock.now
        self._running += prefilled
        for request in decoding + prefilled:
            request.to_decode -= 1
            if request.to_decode == 0:
                self._running.remove(request)
                self._finish(request)
        self._is_busy = bool(self._running or self._waiting)
        if self._is_busy:
            self._begin_step()

    def _finish(self, request: Request) -> None:
        request.finished = self._clock.now
        self._cached[request.session] = request.prompt_tokens + request.output_tokens
        while sum(self._cached.values()) > self._kv_cache_tokens:
            self._cached.popitem(last=False)
        request.done(request)


class Fleet:
    """Replicas, and who gets a request: by "load" the less busy of any two, by "session" always the same."""

    def __init__(self, args: argparse.Namespace, cost: StepCost, replicas: int, routing: str) -> None:
        self.clock = Clock()
        self.replicas = [
            Replica(self.clock, cost, args.max_batch_tokens, args.kv_cache_tokens) for _ in range(replicas)
        ]
        self.answers: list[Request] = []
        self._by_session = routing == "session"
        self._chance = random.Random(0)

    def send(
        self, prompt_tokens: int, output_tokens: int, session: int, then: Callable[[], None] | None = None
    ) -> None:
        def done(request: Request) -> None:
            self.answers.append(request)
            if then:
                then()

        two = self._chance.sample(self.replicas, min(2, len(self.replicas)))
        replica = min(two, key=lambda replica: replica.in_flight)
        if self._by_session:
            replica = self.replicas[random.Random(session).randrange(len(self.replicas))]
        replica.add(Request(prompt_tokens, output_tokens, self.clock.now, session, done))

    def total(self, name: str) -> int:
        """Of all replicas: "steps", "decodes", "prefills" or "hits"."""
        return sum(getattr(replica, name) for replica in self.replicas)


def burst(
    args: argparse.Namespace,
    cost: StepCost,
    replicas: int,
    one: dict[str, Any],
    clients: int,
    until: float = float("inf"),
) -> Fleet:
    """One request from each client, all at the same moment, as `benchmarks.serving` has sent them."""
    fleet = Fleet(args, cost, replicas, "load")
    for session in range(clients):
        fleet.send(round(one["measurements"][0]["prompt_tokens"]), one["output_tokens"], session)
    fleet.clock.run(until)
    return fleet


def calibrate(args: argparse.Namespace, one: dict[str, Any]) -> StepCost:
    """The step's three times, by least squares over the bursts of one replica.

    Fitted is when the last prompt was prefilled, and when the last answer was finished: sums of steps, whose
    number and tokens a burst fixes, whatever each of them takes.
    """
    rows, seconds = [], []
    for m in one["measurements"]:
        steps = burst(args, StepCost(1, 0, 0), 1, one, m["clients"])
        last_prompt = max(request.first_token for request in steps.answers)
        for until, measured in (
            (last_prompt, m["all_prefilled"]),
            (float("inf"), m["clients"] * one["output_tokens"] / m["tokens_per_s"]),
        ):
            fleet = burst(args, StepCost(1, 0, 0), 1, one, m["clients"], until)
            # Over what was measured: a tenth too much counts the same for a short burst as for a long one.
            rows.append([fleet.total(name) / measured for name in ("steps", "decodes", "prefills")])
            seconds.append(1.0)
    step, decode, prefill = np.linalg.lstsq(np.array(rows), np.array(seconds), rcond=None)[0]
    return StepCost(float(step), float(decode), float(prefill))


def compare(args: argparse.Namespace, cost: StepCost, one: dict[str, Any]) -> list[dict[str, Any]]:
    """The bursts that were measured, of one replica and of `args.replicas`, and what the simulation says."""
    measured = [(1, m) for m in one["measurements"]]
    if args.measured:
        measured += [(args.replicas, m) for m in json.loads(args.measured.read_text())["measurements"]]
    else:
        measured += [(args.replicas, {"clients": m["clients"]}) for m in one["measurements"]]
    rows = []
    for replicas, m in measured:
        fleet = burst(args, cost, replicas, one, m["clients"])
        tokens = m["clients"] * one["output_tokens"]
        rows.append({
            "replicas": replicas,
            "clients": m["clients"],
            "tokens_per_s": tokens / fleet.clock.now,
            "measured_tokens_per_s": m.get("tokens_per_s"),
            "ttft_p50": percentile([request.first_token for request in fleet.answers], 50),
            "measured_ttft_p50": m.get("ttft_p50"),
        })  # fmt: skip
    return rows


def converse(args: argparse.Namespace, cost: StepCost, routing: str) -> dict[str, Any]:
    """Users who read, ask and wait for the answer, each with a history that grows and then begins anew."""
    fleet = Fleet(args, cost, args.replicas, routing)
    chance = random.Random(1)
    sessions = itertools.count()

    def user() -> None:
        session, history = next(sessions), 0
        turns = iter(range(args.turns))

        def ask() -> None:
            nonlocal session, history, turns
            if next(turns, None) is None:
                session, history, turns = next(sessions), 0, iter(range(1, args.turns))
            prompt = history + args.question_tokens
            history = prompt + args.answer_tokens
            fleet.send(prompt, args.answer_tokens, session, think)

        def think() -> None:
            fleet.clock.after(chance.expovariate(1 / args.think_seconds), ask)

        think()

    for _ in range(args.users):
        user()
    fleet.clock.run(args.seconds)
    ttfts = [request.first_token - request.came for request in fleet.answers]
    per_token = [
        (request.finished - request.first_token) / max(request.output_tokens - 1, 1)
        for request in fleet.answers
    ]
    return {
        "routing": routing,
        "replicas": args.replicas,
        "users": args.users,
        "tokens_per_s": len(fleet.answers) * args.answer_tokens / args.seconds,
        "ttft_p50": percentile(ttfts, 50),
        "ttft_p99": percentile(ttfts, 99),
        "tpot_p50": percentile(per_token, 50),
        "cached": fleet.total("hits") / max(fleet.total("hits") + fleet.total("prefills"), 1),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints what is in the rows, times in milliseconds."""
    print("  ".join(rows[0]))
    for row in rows:
        cells = []
        for name, value in row.items():
            if isinstance(value, float):
                value = f"{1000 * value:.0f} ms" if "tft" in name or "tpot" in name else f"{value:.2f}"
            cells.append(str("-" if value is None else value).rjust(len(name)))
        print("  ".join(cells))


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("one", type=Path, help="what benchmarks.serving has printed last, of one replica")
    parser.add_argument("--replicas", type=int, default=2, help="default: 2")
    parser.add_argument("--measured", type=Path, help="the same of so many replicas")
    parser.add_argument("--max-batch-tokens", type=int, default=64, help="of the server (default: 64)")
    parser.add_argument("--kv-cache-tokens", type=int, default=131_072, help="of a replica (default: 131072)")
    parser.add_argument("--users", type=int, default=0, help="in conversation; 0: none (default)")
    parser.add_argument("--turns", type=int, default=8, help="of a conversation (default: 8)")
    parser.add_argument("--question-tokens", type=int, default=50, help="default: 50")
    parser.add_argument("--answer-tokens", type=int, default=100, help="default: 100")
    parser.add_argument("--think-seconds", type=float, default=20.0, help="mean of a user (default: 20)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of that, simulated (default: 3600)")
    return parser.parse_args()


def main() -> None:
    """Runs the command line."""
    args = parse_args()
    one = json.loads(args.one.read_text())
    cost = calibrate(args, one)
    print(
        f"a step takes {1000 * cost.step:.2f} ms, {1000 * cost.decode:.2f} ms for each sequence that decodes"
        f" and {1000 * cost.prefill:.2f} ms for each token of a prompt"
    )
    rows = compare(args, cost, one)
    print_table(rows)
    conversations = [converse(args, cost, routing) for routing in ("load", "session") if args.users]
    if conversations:
        print_table(conversations)
    print(json.dumps({"cost": vars(cost), "bursts": rows, "conversations": conversations}))


if __name__ == "__main__":
    main()
