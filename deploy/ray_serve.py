"""The app of api.py on several GPUs and machines, by Ray Serve. docs/scaling.md tells how far it goes.

python deploy/ray_serve.py --model demo --replicas 2    on a cluster of its own, on this machine
python deploy/ray_serve.py --ray-address auto           on one that runs, and goes on when this has ended
serve deploy deploy/ray_serve.yaml                      the same, from a file
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from serving.settings import Settings, hide_key

if __name__ == "__main__":
    hide_key()
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.failover.middlewares",
        "RAY_COLOR_PREFIX": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }

import logging
import random
import signal
import socket
import threading
import time

import ray
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.metrics import Gauge
from ray.serve.request_router import PendingRequest, RunningReplica

from serving.server import raise_file_limit

_NAME = "llama"
_ENGINE_DECIDES = 65_536
"""Requests that Ray hands to a replica at once. The engine's own queue is shorter: who is too many gets its 429."""

_WARNINGS_ONLY = {"log_level": "WARNING", "enable_access_log": False}
"""Of Ray's own lines: each request has one of the app's."""


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
    """Requests with the same X-Session-ID go to the same replica; others to the less busy of any two."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or pending_request.metadata.session_id:
            return ranks
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


def build(settings: ClusterSettings) -> serve.Application:
    """The application, for a cluster that the process is connected to."""
    most = max(settings.replicas, settings.max_replicas)
    scale: dict[str, object] = {"num_replicas": settings.replicas}
    if most > settings.replicas:
        autoscaling = {"target_ongoing_requests": settings.target_requests}
        scale = {"autoscaling_config": autoscaling | {"min_replicas": settings.replicas, "max_replicas": most}}
    available = ray.cluster_resources()
    if settings.device != "cpu" and "GPU" in available:
        share = {"num_gpus": 1.0}
    else:
        share = {"num_cpus": settings.threads or max(1, available["CPU"] // most)}
    return Llama.options(
        **scale,
        ray_actor_options=share,
        max_ongoing_requests=_ENGINE_DECIDES,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settings.drain_timeout,
        logging_config=_WARNINGS_ONLY,
        request_router_config={"request_router_class": SessionRouter},
    ).bind(settings)


def free_port(settings: Settings) -> int:
    """The port to listen on.

    Raises:
        OSError: if it can't be had.
    """
    if settings.ray_address:
        return settings.port
    with socket.create_server((settings.host, settings.port)) as listener:
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    settings = ClusterSettings.from_command_line()
    raise_file_limit()
    if settings.ray_address:
        ray.init(address=settings.ray_address)
    else:
        ray.init(address="local", include_dashboard=False)
    serve.start(
        http_options={"host": settings.host, "port": free_port(settings)}, logging_config=_WARNINGS_ONLY
    )
    serve.run(build(settings), name=_NAME)
    print("RUN", ray.get_runtime_context().gcs_address, flush=True)
    if settings.ray_address:
        return
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    serve.delete(_NAME, _blocking=False)
    while _NAME in serve.status().applications:
        time.sleep(0.1)
    ray.shutdown()


if __name__ == "__main__":
    # By its name, under which the cluster's processes can import it too.
    from deploy.ray_serve import main as run

    run()
