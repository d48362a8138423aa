"""The app of api.py on several GPUs and machines, by Ray Serve. docs/scaling.md tells how far it goes.

python deploy/ray_serve.py --model demo --replicas 2    on a cluster of its own, on this machine
python deploy/ray_serve.py --ray-address auto           on one that runs, and keeps it when this has ended
serve deploy deploy/ray_serve.yaml                      the same from a file
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from serving.settings import Settings, hide_key

if __name__ == "__main__":
    hide_key()
    # Before Ray is imported, which reads some of it; its processes take it over.
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    for name, value in {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.failover.middlewares",
        "RAY_AUTH_MODE": "token",  # who reaches a port of Ray's could run code otherwise
        "RAY_COLOR_PREFIX": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(name, value)

import logging
import random
import signal
import socket
import threading
import time
from collections import Counter
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.metrics import Gauge
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from serving.server import raise_file_limit

log = logging.getLogger("llama")

_NAME = "llama"
_PROGRAM = "ray_serve.py"

_MAX_ONGOING_REQUESTS = 65_536
"""More than an engine takes: one too many gets the engine's 429, and does not wait in front of it, untold."""

_FOR_A_REPLICA = 30.0
"""Seconds that a request may wait for one, if none is there, on top of those that its answer may take."""

_WARNINGS_ONLY = {"log_level": "WARNING", "enable_access_log": False}
"""Of Ray's own lines: the app writes one about each request."""


class ClusterSettings(Settings):
    """Those of api.py, and how many replicas of it there are, and where."""

    replicas: int = Field(1, ge=1)
    """replicas, each on a GPU of its own or, on the CPU, on its share of the cores"""
    max_replicas: int = Field(0, ge=0)
    """replicas that there may be when there is much to do; 0: never more than --replicas"""
    target_requests: int = Field(32, ge=1)
    """requests in flight on each replica: with more there will be more replicas, with fewer fewer"""
    ray_address: str = ""
    """address of a Ray cluster, or "auto"; empty: one of its own on this machine, which ends with it"""


@serve.deployment
@serve.ingress()
class Llama:
    """A replica: the app of api.py and its engine, in a process of their own."""

    app: FastAPI

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._gauges: dict[str, Gauge] = {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        from api import build_app  # with torch, which the proxies do without

        return build_app(self._settings)

    def check_health(self) -> None:
        """Called by Ray every few seconds: a replica whose engine has failed is replaced.

        Raises:
            DrainingError, EngineDeadError: if the engine takes no requests.
        """
        self.app.state.engine.check_health()
        self._export_metrics()

    def _export_metrics(self) -> None:
        """Hands the figures of /metrics to Ray, where those of every replica are found, under its name."""
        for family in self.app.state.metrics.registry.collect():
            for sample in family.samples:
                if sample.name not in self._gauges:
                    keys = tuple(sample.labels)
                    self._gauges[sample.name] = Gauge(sample.name, family.documentation, keys)
                self._gauges[sample.name].set(sample.value, sample.labels)


class SessionRouter(ConsistentHashRouter):
    """Requests with the same X-Session-ID go to the same replica; others to the less busy of any two.

    Busy counts what the proxy has sent it: Ray's own figures lag behind a burst, and send it all one way.
    """

    def initialize_state(self, **options: Any) -> None:
        super().initialize_state(**options)
        self._in_flight: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or pending_request.metadata.session_id:
            return ranks
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        return [[replica] for replica in sorted(two, key=lambda one: self._in_flight[one.replica_id])]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._in_flight[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._in_flight[replica_id] -= 1


def build(settings: ClusterSettings) -> serve.Application:
    """The application, for the cluster that this process is connected to."""
    most = max(settings.replicas, settings.max_replicas)
    scale: dict[str, object] = {"num_replicas": settings.replicas}
    if most > settings.replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": most,
                "target_ongoing_requests": settings.target_requests,
            }
        }
    there_is = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if settings.device != "cpu" and "GPU" in there_is:
        share = {"num_gpus": 1.0}
    else:
        share = {"num_cpus": settings.threads or max(1.0, there_is["CPU"] // most)}
    return Llama.options(  # type: ignore[attr-defined, no-any-return]
        **scale,
        ray_actor_options=share,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout,
        graceful_shutdown_wait_loop_s=0.2,
        request_router_config={"request_router_class": SessionRouter},
        logging_config=_WARNINGS_ONLY,
    ).bind(settings)


def http_options(settings: ClusterSettings) -> dict[str, object]:
    """Of Ray's proxies."""
    timeout = settings.request_timeout + _FOR_A_REPLICA if settings.request_timeout else None
    return {"host": settings.host, "port": settings.port, "request_timeout_s": timeout}


def serve_on_cluster(settings: ClusterSettings) -> None:
    """Puts the app, or a new version of it, on a cluster that runs."""
    ray.init(address=settings.ray_address, log_to_driver=False)
    serve.start(http_options=http_options(settings), logging_config=_WARNINGS_ONLY)
    serve.run(build(settings), name=_NAME)


def serve_here(settings: ClusterSettings) -> None:
    """Serves on a cluster of its own until a signal comes and those in flight are finished.

    Raises:
        OSError: if the port can't be had.
    """
    with socket.create_server((settings.host, settings.port)) as listener:
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
    raise_file_limit()
    # A replica without a core of its own is slow, but one that waited for it would never come.
    cores = max(settings.replicas, settings.max_replicas) * max(settings.threads, 1)
    ray.init(address="local", include_dashboard=False, num_cpus=max(cores, os.cpu_count() or 1))
    serve.start(http_options=http_options(settings), logging_config=_WARNINGS_ONLY)
    serve.run(build(settings), name=_NAME)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    log.info(
        "%d replicas serve on http://%s:%d; Ray's address is %s",
        settings.replicas, settings.host, settings.port, ray.get_runtime_context().gcs_address,
    )  # fmt: skip
    stopped.wait()
    log.info("finishing what is in flight")
    serve.delete(_NAME, _blocking=False)
    while _NAME in serve.status().applications:
        time.sleep(0.1)
    ray.shutdown()


def main() -> None:
    settings = ClusterSettings.from_command_line(program=_PROGRAM)
    if settings.ray_address:  # where the weights are each node's own matter
        serve_on_cluster(settings)
        return
    from engine.engine import check
    from serving import logs

    try:
        check(
            settings.model_path,
            settings.device,
            max_model_len=settings.max_model_len,
            kv_cache_tokens=settings.kv_cache_tokens,
        )
    except ValueError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2)
    logs.configure(settings.log_format)
    try:
        serve_here(settings)
    except (OSError, RuntimeError) as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    # By its name, under which the cluster's processes can import it too.
    from deploy.ray_serve import main as run

    run()
