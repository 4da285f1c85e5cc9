"""How programs are started here: scheduler and launcher, container, and the rendezvous port."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Mapping

import psutil

from orchard_infra.cli import output
from orchard_infra.cli.doctor.base import Level, Setup, Verdict, short_command
from orchard_infra.errors import ConfigurationError
from orchard_infra.launch import Launch
from orchard_infra.system import processes

_TORCHRUN_PORT = 29500  # the default of torchrun and of most launch scripts


def check_launch(setup: Setup) -> Verdict:
    try:
        launch = Launch.from_environ(setup.environ)
    except ConfigurationError as error:
        return Level.PROBLEM, str(error), None
    reason = launch.reason_not_to_kill()
    rank = "" if launch.rank is None else f", rank {launch.rank} of {launch.world_size or '?'}"
    if reason is None:
        return Level.OK, "no scheduler, no launcher: ghosts are stopped where a run allows it"
    return Level.OK, f"{reason}{rank}: no process is ever killed here, whatever a run allows"


def check_container(setup: Setup) -> Verdict:
    if sys.platform != "linux":
        return Level.OK, "no Linux: no pid namespaces"
    if processes.pid_namespace() == 0:
        return (
            Level.PROBLEM,
            "/proc shows the processes of another pid namespace: a run cannot identify processes",
            "Mount /proc anew, as unshare --mount-proc and every container runtime do",
        )
    kind = _container_kind(setup.environ)
    told = [f"in a container ({kind})" if kind else "in no known kind of container"]
    if processes.pid_namespace() != output.FIRST_PID_NAMESPACE:
        told.append("in a pid namespace of its own: runs outside are not seen, and not touched")
    else:
        told.append("in the first pid namespace")
    if os.getpid() == 1:
        return (
            Level.WARNING,
            f"this process is the first one (PID 1), {', '.join(told)}",
            "Start programs with orchard-infra run, or the container with --init: PID 1 must reap",
        )
    return Level.OK, ", ".join(told)


def check_master_port(setup: Setup) -> Verdict:
    given = setup.environ.get("MASTER_PORT")
    host = setup.environ.get("MASTER_ADDR", "")
    try:
        port = int(given) if given else _TORCHRUN_PORT
    except ValueError:
        port = -1
    if not 0 <= port < 65536:
        return Level.PROBLEM, f"MASTER_PORT={given!r} is no port", "Set a number below 65536"
    name = f"MASTER_PORT={port}" if given else f"MASTER_PORT is not set; torchrun's {port}"
    if given and not _is_here(host):
        return Level.OK, f"{name} is one of {host}"
    with socket.socket() as probe:
        # As torch's store does: a connection that is still closing is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return Level.OK, f"{name} is free"
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return Level.WARNING, f"{name} cannot be used: {error.strerror}", "Set another one"
    owner = _listener(port)
    if owner is None:
        who = "a process that cannot be seen from here"
    else:
        who = f"pid {owner} ({short_command(owner, 60)})"
    return (
        Level.WARNING,
        f"{name} is taken by {who}",
        "Unless that is your own job: torchrun --standalone, or another MASTER_PORT",
    )


def _container_kind(environ: Mapping[str, str]) -> str | None:
    for variable, kind in (("APPTAINER_NAME", "Apptainer"), ("SINGULARITY_NAME", "Singularity")):
        if environ.get(variable):
            return kind
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return "Kubernetes"
    if os.path.exists("/.dockerenv"):
        return "Docker"
    if os.path.exists("/run/.containerenv"):
        return "Podman"
    return (processes.read_environ(1) or {}).get("container") or environ.get("container") or None


def _is_here(host: str) -> bool:
    return host in ("", "localhost", "127.0.0.1", "::1", processes.host_name())


def _listener(port: int) -> int | None:
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    for connection in connections:
        laddr = connection.laddr
        if connection.status == psutil.CONN_LISTEN and laddr and laddr.port == port:
            return connection.pid
    return None
