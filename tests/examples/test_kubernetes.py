"""The Kubernetes manifest is valid, and what it starts behaves as PID 1 of a container.

There is no Kubernetes here. The manifest is held against the models of lightkube, which are made
from the schema that Kubernetes publishes, and its command is run in a pid namespace of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import psutil
import pytest

from support import needs_namespaces, require_module, run_command, wait_until

MANIFEST = Path(__file__).parents[2] / "examples" / "kubernetes" / "job.yaml"

TRAIN = """
    import os, subprocess, time
    from orchard_infra import InfrastructureManager, SignalStop, managed_environment

    manager = InfrastructureManager(stopper=SignalStop(mode="flag"))
    with managed_environment("digits", manager=manager) as env:
        print("training", flush=True)
        # An orphan that ends: nobody but the first process can reap it.
        orphan = subprocess.check_output(["sh", "-c", "sleep 0.1 > /dev/null & echo $!"])
        while os.path.exists(f"/proc/{int(orphan)}"):
            time.sleep(0.01)
        print("reaped", flush=True)
        while not env.stop_requested:
            time.sleep(0.01)
        print("saved", flush=True)
    raise SystemExit(143)
"""


@pytest.fixture
def job() -> dict[str, Any]:
    require_module("yaml")
    import yaml

    (found,) = yaml.safe_load_all(MANIFEST.read_text("utf-8"))
    assert isinstance(found, dict)
    return found


def faults(value: Any, kind: Any, where: str = "") -> list[str]:
    """Where a value is not what a model says: unknown and missing fields, and wrong types."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union:
        kinds = [one for one in arguments if value is None or one is not type(None)]
        return min((faults(value, one, where) for one in kinds), key=len)
    if origin is list and isinstance(value, list):
        of = arguments[0]
        return [fault for i, one in enumerate(value) for fault in faults(one, of, f"{where}[{i}]")]
    if origin is dict and isinstance(value, dict):
        of = arguments[1]
        return [fault for key, one in value.items() for fault in faults(one, of, f"{where}.{key}")]
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        module = vars(__import__(kind.__module__, fromlist=["_"]))
        hints = typing.get_type_hints(kind, module)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        found = [f"{where}.{name} is unknown" for name in value if name not in fields]
        found += [
            f"{where}.{name} is missing"
            for name, field in fields.items()
            if name not in value and field.default is field.default_factory is dataclasses.MISSING
        ]
        for name in value:
            if name in fields:
                found += faults(value[name], hints[name], f"{where}.{name}")
        return found
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and value is True):
        return []
    return [f"{where} is {value!r}, no {kind}"]


@pytest.fixture
def job_model(monkeypatch: pytest.MonkeyPatch) -> type:
    """The model of a Job, without the client of which these models are a part."""
    require_module("lightkube")
    schema = types.ModuleType("lightkube.core.schema")
    vars(schema).update(dataclass=dataclasses.dataclass, field=dataclasses.field, DictMixin=object)
    monkeypatch.setitem(sys.modules, "lightkube.core", types.ModuleType("lightkube.core"))
    monkeypatch.setitem(sys.modules, "lightkube.core.schema", schema)
    module = importlib.import_module("lightkube.models.batch_v1")
    found: type = module.Job
    return found


def test_the_manifest_is_a_job_by_the_published_schema(job, job_model):
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert faults(job, job_model) == []


def test_what_is_wrong_in_a_manifest_is_found(job, job_model):
    pod = job["spec"]["template"]["spec"]
    pod["terminationGracePeriod"] = 120
    pod["containers"][0]["command"] = "orchard-infra run"
    del pod["containers"][0]["name"]
    job["spec"]["backoffLimit"] = "3"

    found = "\n".join(faults(job, job_model))

    assert ".spec.template.spec.terminationGracePeriod is unknown" in found
    assert ".spec.template.spec.containers[0].command is 'orchard-infra run'" in found
    assert ".spec.template.spec.containers[0].name is missing" in found
    assert ".spec.backoffLimit is '3'" in found
    assert len(found.splitlines()) == 4


@needs_namespaces
def test_its_command_is_a_first_process_that_passes_sigterm_on_and_reaps(job, tmp_path):
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pod = run_command(
        tmp_path,
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *container["command"]],
        env={"PATH": path, "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    )
    pod.wait_for("training")
    (first,) = psutil.Process(pod.pid).children()

    wait_until(lambda: "reaped" in pod.output, what=pod.transcript)
    first.send_signal(signal.SIGTERM)  # as the kubelet does, from outside

    assert pod.finish() == 128 + signal.SIGTERM, pod.transcript()
    assert "saved" in pod.output
