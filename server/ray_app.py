"""easel on Ray Serve: one replica a GPU, on one or many machines, behind doors that find a session's replica.

The only file that knows Ray; needs the extra `cluster`. `configs/ray-serve.yaml` names `build`, which reads the same
settings as `easel serve`; addresses, numbers of replicas and restarts are Ray's business. Each replica is a model with
the app of a single server. Invariant: without a key nothing is served unless the settings say so, for whom Ray lets
reach its proxies cannot be seen from here.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.types import ASGIApp, Message, Scope

from server import logs
from server.app import create_app
from server.config import SECTIONS, Settings, SettingsError, load_settings
from server.door import REFUSED, ReplicaGone, Report, create_door, run
from server.launch import app_settings, build_bridge, chat_service, model_names
from server.sessions import Wish, rank, response_tag

logger = logging.getLogger(__name__)

_SLOTS = 4  # the engine's own number where the settings leave it open
_PLAIN_REQUESTS = 64  # that may be answered beside those that run or wait for a slot: models, tokens, responses
_AT_A_DOOR = 2000  # requests; what is too much for the replicas, they refuse themselves
_REPORT_SECONDS = 5.0
_NOT_HERE = {
    "host": "is Ray's to set, under http_options",
    "port": "is Ray's to set, under http_options",
    "api_key": "would be on Ray's dashboard; set EASEL_API_KEY where Ray is started, or api_key_file",
}


def build(args: dict[str, Any]) -> serve.Application:
    """The application. `args` are settings by name, and `config` a TOML file of them. Raises SettingsError."""
    told = dict(args)
    file = told.pop("config", None)
    known = {name for section in SECTIONS.values() for name in section.model_fields}
    for name in told:
        if name in _NOT_HERE or name not in known:
            raise SettingsError(f"args: {name} {_NOT_HERE.get(name, 'is no setting')}")
    settings = load_settings(told, Path(file) if file else None)
    if not settings.server.keys() and not settings.server.insecure:
        raise SettingsError(
            "an API key is wanted, for who reaches Ray's proxies cannot be seen from here: set EASEL_API_KEY where Ray "
            "is started, or api_key_file; or insecure: true to serve anybody who reaches them"
        )
    seats = settings.engine.slots or _SLOTS
    replicas = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": 1, "num_gpus": _gpus(settings.engine.device)},
        max_ongoing_requests=seats + settings.engine.max_waiting + _PLAIN_REQUESTS,
        graceful_shutdown_timeout_s=settings.server.drain,
        health_check_period_s=2,
        request_router_config=RequestRouterConfig(
            request_router_class=SessionRouter, request_router_kwargs={"seats": seats}
        ),
    )(Replica)
    door = serve.deployment(
        name="Door",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_AT_A_DOOR,
        graceful_shutdown_timeout_s=settings.server.drain,
    )(serve.ingress()(Door))
    return door.bind(replicas.bind(settings), settings)


def _gpus(device: str) -> int:
    """GPUs of one replica."""
    if device.startswith("cuda:"):
        raise SettingsError(
            f"device: {device} names one GPU of a machine, but Ray gives each replica its own: say cuda"
        )
    return int(device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0))


class SessionRouter(RequestRouter):
    """Ranks the replicas by a request's Wish, which is the first argument of `choose_replica`."""

    def initialize_state(self, seats: int = _SLOTS) -> None:
        """What `request_router_kwargs` say: the requests a replica serves at once."""
        self._seats = seats

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in the order in which they are to be tried."""
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        by_id = {each.replica_id.unique_id: each for each in candidate_replicas}
        # How much each has to do, of all doors together, is known for some seconds after a request was sent there.
        loads = {name: self.replica_queue_len_cache.get(each.replica_id) or 0 for name, each in by_id.items()}
        return [[by_id[name]] for name in rank(list(by_id), pending_request.args[0], loads, self._seats)]


class Replica:
    """One model and its app."""

    def __init__(self, settings: Settings) -> None:
        logs.set_up(settings.server.log_format, content=settings.server.log_content)
        self._id = serve.get_replica_context().replica_id.unique_id
        told = app_settings(settings.server, settings.server.keys(), response_tag=response_tag(self._id))
        self._bridge = build_bridge(settings)
        service = chat_service(self._bridge, model_names(settings))
        self._name = service.model_names[0]
        self._app = create_app(service, told)
        self._bridge.start()

    def __del__(self) -> None:
        bridge = getattr(self, "_bridge", None)  # not there if the model could not be loaded
        if bridge is not None:
            bridge.close(0, wait_seconds=_REPORT_SECONDS)

    def check_health(self) -> None:
        """Ray ends the replica, and starts another, when this raises."""
        if not self._bridge.ready:
            raise RuntimeError(f"the engine stopped: {self._bridge.failure}")

    async def report(self) -> Report:
        """What it is at."""
        bridge = self._bridge
        stats = {"model": self._name, "ready": bridge.ready} | bridge.metrics.document()
        return Report(replica=self._id, ready=bridge.ready, stats=stats, exposition=bridge.metrics.exposition())

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """The app's messages, as they come."""
        if not self._bridge.ready:
            yield REFUSED
            return
        async with aclosing(run(self._app, scope, body)) as messages:
            async for message in messages:
                yield message


class Door:
    """What Ray's proxies pass requests to."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        logs.set_up(settings.server.log_format, content=settings.server.log_content)
        self._replicas, self._settings = replicas, settings

    def __serve_build_asgi_app__(self) -> ASGIApp:
        told = app_settings(self._settings.server, self._settings.server.keys())
        return create_door(_RayReplicas(self._replicas), told)


class _RayReplicas:
    """The way to the replicas: a deployment's handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(method_name="answer", stream=True)

    @asynccontextmanager
    async def choose(self, wish: Wish) -> AsyncIterator[_RayChosen]:
        async with self._handle.choose_replica(wish) as selection:
            yield _RayChosen(self._handle, selection)

    async def reports(self) -> Sequence[Report]:
        try:
            answers = await self._handle.broadcast("report").results_async(
                timeout_s=_REPORT_SECONDS, return_exceptions=True
            )
        except TimeoutError:
            logger.warning("not all replicas reported within %g seconds", _REPORT_SECONDS)
            return []
        return [answer for answer in answers if isinstance(answer, Report)]


class _RayChosen:
    """A place at one replica."""

    def __init__(self, handle: DeploymentHandle, selection: Any) -> None:
        self._handle, self._selection = handle, selection

    @property
    def replica(self) -> str:
        return str(self._selection.replica_id)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        messages = self._handle.dispatch(self._selection, scope, body)
        try:
            async for message in messages:
                yield message
        except (RayError, RayServeException) as error:
            raise ReplicaGone(f"{self.replica}: {type(error).__name__}") from error
        finally:
            messages.cancel()
