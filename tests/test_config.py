"""Any configuration object is read, and a wrong one is refused before anything is touched."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from orchard_infra.config import (
    EnvironmentConfig,
    HardwareAwareConfig,
    HardwareConfig,
    LockPath,
    Settings,
    default_lock_path,
    read_config,
    read_lock_path,
)
from orchard_infra.errors import ConfigurationError

LOCK = "/locks/digits.lock"


@attrs.define
class AttrsHardware:
    allow_process_kill: bool
    lock_file_path: str
    project_name: str


@dataclasses.dataclass
class DataHardware:
    allow_process_kill: bool
    lock_file_path: str
    project_name: str


class SlottedHardware:
    __slots__ = ("allow_process_kill", "lock_file_path", "project_name")

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def wrap(hardware: object) -> object:
    return SimpleNamespace(hardware=hardware)


def with_attrs(**values: Any) -> object:
    return attrs.make_class("Cfg", ["hardware"])(AttrsHardware(**values))


def with_dataclass(**values: Any) -> object:
    return dataclasses.make_dataclass("Cfg", ["hardware"])(DataHardware(**values))


def with_namespace(**values: Any) -> object:
    return wrap(SimpleNamespace(**values))


def with_argparse(**values: Any) -> object:
    return argparse.Namespace(hardware=argparse.Namespace(**values))


def with_slots(**values: Any) -> object:
    return wrap(SlottedHardware(**values))


def with_named_tuple(**values: Any) -> object:
    return wrap(namedtuple("Hardware", values)(**values))


def with_pydantic(**values: Any) -> object:
    pydantic = pytest.importorskip("pydantic")
    fields = {name: (type(value), ...) for name, value in values.items()}
    hardware = pydantic.create_model("Hardware", **fields)
    return pydantic.create_model("Cfg", hardware=(hardware, ...))(hardware=values)


def with_omegaconf(**values: Any) -> object:
    return pytest.importorskip("omegaconf").OmegaConf.create({"hardware": values})


def with_structured_omegaconf(**values: Any) -> object:
    omegaconf = pytest.importorskip("omegaconf")
    return omegaconf.OmegaConf.create(
        {"hardware": omegaconf.OmegaConf.structured(DataHardware(**values))}
    )


def with_the_package_s_own(**values: Any) -> object:
    return EnvironmentConfig(**values)


def with_the_package_s_own_hardware(**values: Any) -> object:
    return EnvironmentConfig(hardware=HardwareConfig(**values))


KINDS = [
    with_attrs,
    with_dataclass,
    with_namespace,
    with_argparse,
    with_slots,
    with_named_tuple,
    with_pydantic,
    with_omegaconf,
    with_structured_omegaconf,
    with_the_package_s_own,
    with_the_package_s_own_hardware,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("allowed", [True, False])
def test_any_kind_of_object_serves(kind, allowed):
    cfg = kind(allow_process_kill=allowed, lock_file_path=LOCK, project_name="digits")
    assert isinstance(cfg, HardwareAwareConfig)
    assert read_config(cfg) == Settings("digits", allowed, Path(LOCK))


def test_a_bare_string_is_a_project_with_nothing_allowed(runtime_directory):
    path = runtime_directory / "locks" / "digits.lock"
    assert read_config("digits") == Settings("digits", False, path)
    assert not path.parent.exists()  # reading makes nothing


def test_the_package_s_own_configuration_allows_nothing_unless_asked(runtime_directory):
    for cfg in (EnvironmentConfig("digits"), EnvironmentConfig(hardware=HardwareConfig("digits"))):
        assert cfg.project_name == "digits"
        assert cfg.hardware.allow_process_kill is False
        assert cfg.hardware.lock_file_path == runtime_directory / "locks" / "digits.lock"
        assert read_config(cfg) == read_config("digits")


def test_the_project_is_named_by_the_hardware_then_the_cfg_then_the_lock_file():
    hardware = SimpleNamespace(allow_process_kill=False, lock_file_path="/locks/a.b.lock")
    cfg = SimpleNamespace(hardware=hardware)
    assert read_config(cfg).project == "a.b"
    cfg.project_name = "outer"
    assert read_config(cfg).project == "outer"
    hardware.project_name = "inner"
    assert read_config(cfg).project == "inner"
    hardware.project_name = None
    assert read_config(cfg).project == "outer"


@pytest.mark.parametrize("name", ["line\nfeed", "\x1b[2J", "n" * 250, "\u202ecilbup"])
def test_a_lock_file_with_an_odd_name_names_a_project_that_can_be_shown(name):
    settings = read_config(with_namespace_of(lock_file_path=f"/locks/{name}.lock"))
    assert settings.lock_path.name == f"{name}.lock"
    assert settings.project.isprintable()
    assert 1 <= len(settings.project) <= 200


def with_namespace_of(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(
        hardware=SimpleNamespace(**{"allow_process_kill": False, "lock_file_path": LOCK, **values})
    )


# Refusals


class Odd:
    """What is odd of it depends on which attribute is asked for."""

    allow_process_kill = False
    lock_file_path = LOCK


class HardwareRaises(Odd):
    @property
    def lock_file_path(self) -> str:  # type: ignore[override]
        raise KeyError("LOCK_DIR")


class KillRaises(Odd):
    @property
    def allow_process_kill(self) -> bool:  # type: ignore[override]
        raise RuntimeError("not resolved yet")


class ProjectRaises(Odd):
    @property
    def project_name(self) -> str:
        raise ValueError("no name yet")


class CfgRaises:
    @property
    def hardware(self) -> object:
        raise LookupError("no hardware here")


class PathOfNumber(os.PathLike):  # type: ignore[type-arg]
    def __fspath__(self) -> str:
        return 7  # type: ignore[return-value]


class PathRaises(os.PathLike):  # type: ignore[type-arg]
    def __fspath__(self) -> str:
        raise OSError("not mounted")


class PathOfBytes(os.PathLike):  # type: ignore[type-arg]
    def __fspath__(self) -> bytes:
        return b"/x.lock"


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


LOCK_PATH = "cfg.hardware.lock_file_path"
KILL = "cfg.hardware.allow_process_kill"
PROJECT = "cfg.hardware.project_name"


@pytest.mark.parametrize(
    ("cfg", "path", "found"),
    [
        (None, "cfg.hardware", "None"),
        (7, "cfg.hardware", "7 (int)"),
        (b"digits", "cfg.hardware", "b'digits' (bytes)"),
        ({"hardware": {}}, "cfg.hardware", "{'hardware': {}} (dict)"),
        (SimpleNamespace(), "cfg.hardware", "namespace()"),
        (CfgRaises(), "cfg.hardware", "no hardware here"),
        (wrap(None), LOCK_PATH, "None (NoneType)"),
        (wrap({"lock_file_path": LOCK}), LOCK_PATH, "(dict)"),
        (wrap(SimpleNamespace(lock_file_path=LOCK)), KILL, "namespace(lock_file_path"),
        (wrap(SimpleNamespace(allow_process_kill=True)), LOCK_PATH, "namespace(allow"),
        (wrap(HardwareRaises()), LOCK_PATH, "KeyError: 'LOCK_DIR'"),
        (wrap(KillRaises()), KILL, "RuntimeError: not resolved yet"),
        (wrap(ProjectRaises()), PROJECT, "ValueError: no name yet"),
        *(
            (with_namespace_of(allow_process_kill=value), KILL, found)
            for value, found in [
                ("false", "'false' (str)"),
                ("", "'' (str)"),
                (0, "0 (int)"),
                (1, "1 (int)"),
                (None, "None (NoneType)"),
                ([], "[] (list)"),
                (Unshowable(), "(Unshowable)"),
                ("x" * 1000, "xxx... (str)"),
            ]
        ),
        *(
            (with_namespace_of(lock_file_path=value), LOCK_PATH, found)
            for value, found in [
                (None, "None (NoneType)"),
                (7, "7 (int)"),
                (True, "True (bool)"),
                (b"/x.lock", "b'/x.lock' (bytes)"),
                ("", "'' (str)"),
                ("  ", "'  ' (str)"),
                ("/x\0.lock", r"'/x\x00.lock' (str)"),
                ("/x\ud800.lock", r"'/x\ud800.lock' (str)"),
                ("/", "'/' (str)"),
                (PathOfNumber(), "(PathOfNumber)"),
                (PathOfBytes(), "(PathOfBytes)"),
                (PathRaises(), "not mounted"),
            ]
        ),
        *(
            (with_namespace_of(project_name=value), PROJECT, found)
            for value, found in [
                (7, "7 (int)"),
                (b"x", "b'x' (bytes)"),
                ("", "'' (str)"),
                (" ", "' ' (str)"),
                ("\x1b[2J", r"'\x1b[2J' (str)"),
                ("a\nb", r"'a\nb' (str)"),
                ("\ud800", r"'\ud800' (str)"),
                ("n" * 201, "nnn... (str)"),
            ]
        ),
        ("", "cfg", "'' (str)"),
        ("a\0b", "cfg", r"'a\x00b' (str)"),
    ],
)
def test_a_wrong_one_is_refused_with_the_full_path_and_what_was_found(
    tmp_path, monkeypatch, runtime_directory, cfg, path, found
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        read_config(cfg)
    assert str(caught.value).split(" ")[0] == path
    assert found in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == list(runtime_directory.iterdir()) == []


def test_a_project_name_of_the_cfg_is_refused_where_it_was_found():
    cfg = with_namespace_of()
    cfg.project_name = 7
    with pytest.raises(ConfigurationError, match=r"^cfg\.project_name must be a str, not 7"):
        read_config(cfg)


def test_what_went_wrong_inside_the_configuration_is_the_cause():
    with pytest.raises(ConfigurationError) as caught:
        read_config(wrap(HardwareRaises()))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_mandatory_value_that_omegaconf_misses_is_named():
    cfg = with_omegaconf(allow_process_kill=False, lock_file_path="???")
    with pytest.raises(ConfigurationError, match=r"^cfg\.hardware\.lock_file_path .*Missing"):
        read_config(cfg)


def test_an_interpolation_that_omegaconf_cannot_resolve_is_named():
    cfg = with_omegaconf(allow_process_kill=False, lock_file_path="${nowhere}/x.lock")
    with pytest.raises(ConfigurationError, match=r"^cfg\.hardware\.lock_file_path .*nowhere"):
        read_config(cfg)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "project_name must be a str, not None"),
        ({"project_name": 7}, "project_name must be a str, not 7"),
        ({"project_name": "x", "allow_process_kill": "false"}, "allow_process_kill must be"),
        ({"project_name": "x", "allow_process_kill": None}, "allow_process_kill must be"),
        ({"project_name": "x", "lock_file_path": b"x"}, "lock_file_path must be"),
        ({"project_name": "x", "lock_file_path": ""}, "lock_file_path must be"),
        ({"project_name": "x", "hardware": HardwareConfig("x")}, "not both"),
        ({"allow_process_kill": True, "hardware": HardwareConfig("x")}, "not both"),
        ({"lock_file_path": LOCK, "hardware": HardwareConfig("x")}, "not both"),
    ],
)
def test_the_package_s_own_configuration_is_checked_when_it_is_made(arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        EnvironmentConfig(**arguments)


def test_the_package_s_own_hardware_is_checked_when_it_is_made():
    with pytest.raises(ConfigurationError, match="allow_process_kill must be True or False"):
        HardwareConfig("x", allow_process_kill="false")
    with pytest.raises(ConfigurationError, match="lock_file_path must be"):
        HardwareConfig("x", lock_file_path=None)


# Paths


def test_a_relative_path_is_made_absolute_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = read_config(with_namespace_of(lock_file_path=Path("locks") / ".." / "x.lock"))
    monkeypatch.chdir("/")
    assert settings.lock_path == tmp_path / "x.lock"
    assert EnvironmentConfig("x", lock_file_path="x.lock").hardware.lock_file_path.is_absolute()


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = read_config(with_namespace_of(lock_file_path="~/x.lock"))
    assert settings.lock_path == Path("/home/somebody/x.lock")


def test_links_in_a_path_are_left_for_the_lock_to_judge(tmp_path):
    (tmp_path / "link").symlink_to("/nonexistent/x")
    settings = read_config(with_namespace_of(lock_file_path=tmp_path / "link"))
    assert settings.lock_path == tmp_path / "link"


def test_a_relative_path_in_a_directory_that_is_gone_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigurationError, match=r"^cfg\.hardware\.lock_file_path .*x\.lock"):
        read_config(with_namespace_of(lock_file_path="x.lock"))
    assert read_config(with_namespace_of(lock_file_path=LOCK)).lock_path == Path(LOCK)
    monkeypatch.chdir(tmp_path)  # pytest looks where it is


# What a release needs


@pytest.mark.parametrize("kind", KINDS)
def test_the_lock_path_is_read_from_any_kind_of_object(kind):
    cfg = kind(allow_process_kill=True, lock_file_path=LOCK, project_name="digits")
    assert read_lock_path(cfg) == LockPath(Path(LOCK), LOCK)


def test_the_lock_path_is_read_from_a_cfg_that_has_nothing_else():
    cfg = SimpleNamespace(hardware=SimpleNamespace(lock_file_path=LOCK))
    assert read_lock_path(cfg) == LockPath(Path(LOCK), LOCK)


def test_the_lock_path_of_a_project_name_is_the_one_that_a_prepare_takes():
    assert read_lock_path("a/b").path == read_config("a/b").lock_path


@pytest.mark.parametrize("given", ["x.lock", "./x.lock", Path("x.lock"), "below/../x.lock"])
def test_a_relative_path_is_recognised_after_the_directory_was_changed(
    tmp_path, monkeypatch, given
):
    monkeypatch.chdir(tmp_path)
    prepared = read_config(with_namespace_of(lock_file_path=given))
    monkeypatch.chdir("/")
    found = read_lock_path(with_namespace_of(lock_file_path=given))
    assert (prepared.lock_path, found.path) == (tmp_path / "x.lock", Path("/x.lock"))
    assert prepared.lock_path_given == found.given == "x.lock"


def test_a_relative_path_is_recognised_after_its_directory_was_deleted(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    prepared = read_config(with_namespace_of(lock_file_path="x.lock"))
    gone.rmdir()
    assert read_lock_path(with_namespace_of(lock_file_path="x.lock")).given == "x.lock"
    assert prepared.lock_path_given == "x.lock"
    monkeypatch.chdir(tmp_path)  # pytest looks where it is


@pytest.mark.parametrize(
    ("cfg", "path"),
    [
        (None, "cfg.hardware"),
        (SimpleNamespace(), "cfg.hardware"),
        (CfgRaises(), "cfg.hardware"),
        (wrap(SimpleNamespace(allow_process_kill=True)), LOCK_PATH),
        (wrap(HardwareRaises()), LOCK_PATH),
        *(
            (with_namespace_of(lock_file_path=value), LOCK_PATH)
            for value in (None, 7, b"/x", "", "/x\0", "/", ".", PathOfNumber(), PathRaises())
        ),
        ("", "cfg"),
    ],
)
def test_a_wrong_lock_path_is_refused_by_a_release_with_the_full_path_too(cfg, path):
    with pytest.raises(ConfigurationError) as caught:
        read_lock_path(cfg)
    assert str(caught.value).split(" ")[0] == path


WEIRD = [
    "a/b",
    "a-b",
    "a b",
    "a\\b",
    "a-b-c14cddc0",  # looks like the name that "a/b" gets
    "..",
    ".",
    "...",
    ".hidden",
    "hidden",
    "-rf",
    "~",
    "$HOME",
    "x; rm -rf /",
    "../../etc/passwd",
    "/etc/passwd",
    "naïve",
    "naive",
    "模型",
    "🌳",
    "n" * 80,
    "n" * 81,
    "n" * 200,
    "n" * 79 + "/",
    "CON",
    "x.lock",
    "'quoted'",
]


def test_weird_names_get_lock_files_that_are_safe_and_all_different(runtime_directory):
    paths = [read_config(name).lock_path for name in WEIRD]
    assert len(set(paths)) == len(WEIRD)
    for path in paths:
        assert path.parent == runtime_directory / "locks"
        assert path.suffix == ".lock"
        assert path.name.isascii()
        assert len(path.name) < 120
        assert not path.name.startswith(".")
        assert not set(path.name) & set("/\\ \0$~;'\"*?")


def test_a_name_that_is_safe_stays_readable_and_the_same_name_is_the_same_file():
    assert default_lock_path("resnet50_v1.5").name == "resnet50_v1.5.lock"
    assert default_lock_path("a/b") == default_lock_path("a/b")
