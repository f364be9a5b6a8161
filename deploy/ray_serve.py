"""The server as a deployment of Ray Serve: replicas on the machines of a cluster.

    pip install 'ray[serve]', and '.[serve]' or '.[serve,cuda]' on every machine
    ray start --head
    GLM2_API_KEY=... serve run deploy.ray_serve:build --address auto replicas=2 gpus=1 model=FOLDER

Other arguments are flags of `python -m infer.serve`: slots=32 is `--slots 32`. Ray has its own
address and port.
"""

from typing import Any

from ray import serve

from glm2_jax.cli import arguments
from glm2_jax.cli.parser import from_flags
from infer.serve.options import Settings, parser


@serve.deployment(max_ongoing_requests=1024, graceful_shutdown_timeout_s=630)
@serve.ingress()
class Replica:
    """One model on one device, with the queue and the slots of `infer.serve`."""

    def __init__(self, flags: list[str]):
        settings = from_flags(Settings, parser().parse_args(flags))
        arguments.choose_platform(settings.choice.device)
        from infer.serve.app import build as build_app  # late: this imports jax
        from infer.serve.run import open_service
        from infer.serve.security import find_access

        access = find_access(settings.address)
        service = open_service(settings)
        self._worker = service.worker
        self._app = build_app(service, access, settings.address.cors_origin or ())
        self._worker.start()

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def check_health(self) -> None:
        """Raise an error if the device's thread has ended: Ray then replaces the replica."""
        if not self._worker.status.alive:
            raise RuntimeError("the worker has stopped")

    def __del__(self) -> None:
        self._worker.stop()


def build(args: dict[str, str]) -> serve.Application:
    """Return the application that `serve run` and the configuration files of Ray Serve start."""
    flags = dict(args)
    replicas, gpus = int(flags.pop("replicas", "1")), float(flags.pop("gpus", "0"))
    deployment = Replica.options(num_replicas=replicas, ray_actor_options={"num_gpus": gpus})
    return deployment.bind([word for name in flags for word in (f"--{name}", flags[name])])
