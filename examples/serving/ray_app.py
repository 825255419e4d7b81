"""The server of tools/serve.py as replicas under Ray Serve, on one machine or a cluster. See docs/serving.md.

pip install -r requirements-ray.txt
python examples/serving/ray_app.py --model mor-export --min-replicas 2 --max-replicas 4
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers

import argparse
import signal
import sys
import threading

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig

from mor_megatron.command import add_server, exit_status
from mor_megatron.serving.http.app import build_app
from mor_megatron.serving.http.build import engine_options, load_engine, server_options


def build_deployment(args: argparse.Namespace, resources: dict[str, float]) -> serve.Application:
    """Replicas of the server.

    Args:
        resources: of the cluster. If it has GPUs, each replica has one to itself, unless it shall run on CPUs.
    Raises:
        ValueError: a setting is out of range.
    """
    options, lanes = server_options(args), engine_options(args).lanes
    has_gpu = args.device != "cpu" and resources.get("GPU", 0) > 0

    def build():  # in the process of a replica
        return build_app(load_engine(args), options)

    @serve.deployment(
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": int(has_gpu)},
        # A request beyond the lanes of its replica waits: that is when another replica helps.
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.min_replicas, max_replicas=args.max_replicas, target_ongoing_requests=lanes
        ),
        # The application itself refuses what exceeds lanes and max_waiting, in the form of OpenAI's errors.
        max_ongoing_requests=2 * (lanes + options.max_waiting),
        # Of two replicas drawn at random, the one with fewer open requests.
        request_router_config=RequestRouterConfig(
            request_router_class="ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"
        ),
        health_check_period_s=1,  # one with a failed engine answers at once, so the router would prefer it
        graceful_shutdown_timeout_s=options.shutdown_timeout,
    )
    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            """Called by Ray, which replaces the replica after three failures."""
            if not self.app.state.service.worker.is_alive:
                raise RuntimeError("the engine has failed")

    return Replica.bind()


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; on a cluster that was running before, until `serve shutdown`.

    Raises:
        ValueError: a setting is out of range.
    """
    options = server_options(args)
    if options.port == 0:
        raise ValueError("port=0 is not for replicas, which share an address: name a free one")
    is_local = args.address == "local"
    ray.init(args.address, include_dashboard=False if is_local else None)
    serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host=options.host, port=options.port))
    serve.run(build_deployment(args, ray.cluster_resources()))
    print(f"serving {options.name} at http://{options.host}:{options.port}", flush=True)
    if is_local:
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        stopped.wait()
        serve.delete("default")  # lets open requests end; `shutdown` alone would not
        serve.shutdown()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line: that of tools/serve.py, and more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server(parser)
    replicas = parser.add_argument_group("replicas")
    replicas.add_argument("--address", default="local", help="of a Ray cluster, or `auto`; default: start one here")
    replicas.add_argument("--min-replicas", type=int, default=1)
    replicas.add_argument("--max-replicas", type=int, default=1)
    replicas.add_argument("--cpus-per-replica", type=float, default=1, help="cores, and threads of a replica")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse()
    sys.exit(exit_status(lambda: run(args)))
