"""``qwedge serve``: a bundle over HTTP and MQTT."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.commands import options
from edge.commands.front_door import FrontDoor
from edge.commands.leaving import Leaving
from edge.commands.ready import Endpoints, ready_text
from edge.commands.trial import Start, starting
from edge.config import Settings
from edge.errors import ConfigError, QwedgeError, UnavailableError
from edge.lifecycle import Notifier
from edge.log_buffer import LogBuffer
from edge.settings.folders import broker_folder, evaluations_folder, journal_folder
from edge.settings.mqtt import MqttSettings

if TYPE_CHECKING:  # these bring onnxruntime and the web framework, which `qwedge --help` does without
    from edge.commands.mqtt_panel import BridgePanel
    from edge.evaluation.background import BackgroundEvaluations
    from edge.http.server import HttpServer
    from edge.journal import Journal
    from edge.management import Management
    from edge.service import Loaded, Service
    from edge.store import Installed

log = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    *,
    bundle: options.Bundle = None,
    trust: options.Trust = None,
    host: Annotated[str | None, typer.Option("--host", metavar="H", help="Address [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help="TCP port [default: 8080]; 0: any.")] = None,
    broker: Annotated[
        str | None,
        typer.Option("--broker", metavar="B", help="none, embedded or mqtt://HOST:PORT [default: none]."),
    ] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", metavar="N", help="Requests worked on at once [default: 8].")
    ] = None,
    context: options.Context = None,
    threads: options.Threads = None,
    warm: Annotated[
        Path | None,
        typer.Option("--warm", metavar="FILE", help="Prompts to read before serving: text, or JSON Lines."),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", metavar="L", help="debug, info, warning or error [default: info].")
    ] = None,
    config: options.Config = None,
) -> None:
    """Serve a bundle over HTTP and MQTT: the one of --bundle, or the one that is active in the model store.

    Prints one ready line with the addresses, and examples to copy. SIGINT (Ctrl-C) or SIGTERM lets running requests
    finish first; a second one does not.

    --warm reads a system prompt, or several prompts as JSON Lines ({"messages": [...]}), before the ready line: what
    begins with one of them is answered sooner.
    """

    def read_settings() -> Settings:
        return options.settings(
            config,
            model__bundle=bundle,
            model__trust=trust,
            server__host=host,
            server__port=port,
            mqtt__broker=broker,
            engine__slots=slots,
            engine__context=context,
            engine__threads=threads,
            log__level=log_level,
        )

    chosen = read_settings()
    options.log_to_stderr(chosen.log)
    leaving = Leaving()
    run_server(chosen, leaving, warm, read_settings)
    if leaving.begins_anew:
        log.info("beginning anew")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - the command that we are


def run_server(
    settings: Settings, leaving: Leaving, warm: Path | None = None, read_settings: Callable[[], object] = lambda: None
) -> None:
    """Serve until a signal or an operator ends it.

    Args:
        settings: what to serve and how.
        leaving: tells when to end, and afterwards whether to begin anew.
        warm: prompts to read first (``edge.commands.warm``).
        read_settings: raises a ConfigError where the settings, read anew, cannot be used.

    Raises:
        QwedgeError: what is needed to start cannot be had: the port, the bundle, memory, prompts that can be read.
    """
    if warm is not None and settings.engine.prefix_cache_mb == 0:
        raise ConfigError("--warm needs memory to keep prompts in", hint="set engine.prefix_cache_mb above 0")
    start = _starter(warm)
    with starting(settings) as served, ExitStack() as stack:
        # The port first: that it is taken should show before seconds go into the model.
        door = FrontDoor.open(settings, stack)
        logs = stack.enter_context(_kept_log())
        served.begin()
        settings, start = served.settings, _starter(None) if served.problem else start
        notifier = stack.enter_context(closing(Notifier(os.environ)))
        notifier.status("loading the model")
        service = served.load(imports=("edge.http.app", "edge.http.server"))
        from edge.http.app import create_app
        from edge.http.routes.device import DeviceSources
        from edge.http.server import HttpServer

        stack.callback(service.stop)
        start(service)
        served.watch(service, leaving.begin_anew)
        journal = _make_journal(settings.mqtt)
        stack.callback(journal.close)
        management = _make_management(settings, served, service, leaving, read_settings)
        stack.callback(management.close)
        panel = _start_mqtt(settings.mqtt, service, journal, management, stack, problem=served.problem)
        audit, metrics = door.audit(stack), service.metrics
        app = create_app(
            service,
            door.server,
            problem=lambda: journal.problem or (audit.problem if audit is not None else None) or served.problem,
            device=DeviceSources(logs, panel, metrics.temperature_c, metrics.power_w, metrics.energy_j),
            evaluations=lambda: _evaluations(service),
            access=door.access(),
            audit=audit,
            journal=journal,
            upstreams=door.upstreams(),
            management=management,
        )
        broker = None if panel is None else panel.address
        server = HttpServer(app, door.sock, door.tls, door.announcer(lambda: service.model.manifest.name))
        notifier.watch(lambda: not service.stats().stalled)
        endpoints = Endpoints.of(settings, server.address, broker)

        def greet() -> None:
            print(ready_text(settings, endpoints, service), flush=True)
            served.ready()
            notifier.ready(f"{service.model.manifest.name} at {endpoints.http}")

        def leave() -> None:
            (notifier.reloading if leaving.begins_anew else notifier.stopping)()
            served.leaving()

        leaving.on_hangup = partial(_reload, management)
        asyncio.run(
            _serve_http(server, service, leaving=leaving, greet=greet, leave=leave, drain_s=settings.server.drain_s)
        )
    log.info("stopped")


def _evaluations(service: Service) -> BackgroundEvaluations:
    """What runs suites for the page; it takes a tenth of a second to import, which a start need not wait for."""
    from edge.evaluation.background import BackgroundEvaluations

    return BackgroundEvaluations(service, evaluations_folder(os.environ))


@contextmanager
def _kept_log() -> Iterator[LogBuffer]:
    """The newest lines of the log, for the page, until the block ends."""
    logs = LogBuffer()
    logging.getLogger().addHandler(logs)
    try:
        yield logs
    finally:
        logging.getLogger().removeHandler(logs)


def _starter(warm: Path | None) -> Callable[[Service], None]:
    """What starts a service: with the prompts of a file, which are read and checked now, or just so."""
    if warm is None:
        return lambda service: service.start()
    from edge.commands.warm import prepare_prompts, read_prompts, warm_up

    prompts = read_prompts(warm)

    def start(service: Service) -> None:
        requests = prepare_prompts(service.model, prompts)
        service.start()
        warm_up(service, requests, options.note)

    return start


def _make_journal(settings: MqttSettings) -> Journal:
    """The journal of requests; not open yet."""
    from edge.journal import Journal, Limits

    folder = journal_folder(settings, os.environ)
    return Journal() if folder is None else Journal(folder, Limits(bytes=settings.journal_mb << 20))


def _make_management(
    settings: Settings, served: Start, service: Service, leaving: Leaving, read_settings: Callable[[], object]
) -> Management:
    """What operators can do to the server."""
    from edge.bundle import read_manifest
    from edge.loader import load_bundle
    from edge.management import Management

    def load_installed(installed: Installed) -> Loaded:
        loaded = load_bundle(installed.path, read_manifest(installed.path), settings)
        served.switched(installed)
        return loaded

    management = Management(
        service,
        served.store,
        load_installed,
        check_settings=read_settings,
        restart=leaving.begin_anew,
        drain_s=settings.server.drain_s,
    )
    if served.installed is not None:
        management.serving(served.installed)
    return management


def _reload(management: Management) -> None:
    """What SIGHUP does; where the settings cannot be used the log says so, and the server goes on."""
    try:
        management.begin("reload")
    except QwedgeError as error:
        log.error("the settings are not reloaded: %s", error)  # noqa: TRY400 - the user's error, not a fault of ours


def _start_mqtt(
    settings: MqttSettings,
    service: Service,
    journal: Journal,
    management: Management,
    stack: ExitStack,
    *,
    problem: str | None,
) -> BridgePanel | None:
    """Start broker and bridge as configured and have ``stack`` stop them; None where there is no MQTT."""
    if settings.broker == "none":
        return None
    from edge.commands.mqtt_panel import BridgePanel
    from edge.mqtt import MqttBridge

    address = settings.address
    if address is None:
        from edge.mqtt.broker_setup import as_owner, make_broker

        broker = make_broker(settings, broker_folder(settings, os.environ))
        try:
            broker.start()
        except UnavailableError as error:
            log.warning("HTTP alone, without MQTT: %s (hint: %s)", error.message, error.hint)
            return None
        stack.callback(broker.stop)
        address, settings = broker.address, as_owner(settings, broker)
    bridge = MqttBridge(service, settings, address, journal, management, problem=problem)
    bridge.start()
    stack.callback(bridge.stop)
    return BridgePanel(bridge, settings, address)


async def _serve_http(
    server: HttpServer,
    service: Service,
    *,
    leaving: Leaving,
    greet: Callable[[], None],
    leave: Callable[[], None],
    drain_s: float,
) -> None:
    """Answer HTTP until it is time to leave, then drain."""
    asked = leaving.listen()
    serving = asyncio.create_task(server.serve())
    greet()  # who reads it may send a signal at once
    await asyncio.wait({serving, asyncio.create_task(asked.wait())}, return_when=asyncio.FIRST_COMPLETED)
    leave()
    log.info("stopping; running requests have %g s (Ctrl-C again: at once)", drain_s)
    await asyncio.to_thread(service.stop, drain_s)
    server.shutdown()
    await serving
