"""Alerts and dashboard: their names are those that are measured, the alerts fire when they should, and a real Prometheus that scrapes a
real Ray during a real stage answers every query."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "infra/monitoring"
OURS = {series for metric in METRICS.values() for series in metric.series}
RAYS = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_object_store_used_memory",
    "ray_object_store_available_memory",
}
"""Ray's own metrics that the dashboard shows."""
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian and Ubuntu: apt install prometheus)")


def _alerts() -> dict[str, dict[str, Any]]:
    content = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    return {rule["alert"]: rule for group in content["groups"] for rule in group["rules"]}


def _queries() -> list[tuple[str, str]]:
    """Every query of the dashboard with its panel's title; Grafana's variables replaced by what it would put there."""
    content = json.loads((FOLDER / "dashboard.json").read_text())
    found = [(panel["title"], target["expr"]) for panel in content["panels"] for target in panel["targets"]]
    return [(title, expr.replace("$stage", ".*").replace("$run", ".*").replace("$__rate_interval", "5m")) for title, expr in found]


def _names(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def _labels(expression: str) -> set[str]:
    """The labels that an expression selects or groups by."""
    grouped = [name.strip() for names in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for name in names.split(",")]
    return {*grouped, *re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression)}


EXPRESSIONS = [*((name, rule["expr"]) for name, rule in _alerts().items()), *_queries()]


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_a_query_names_what_is_measured(where: str, expression: str) -> None:
    names = _names(expression)
    assert names, where
    assert names <= OURS | RAYS, where
    known = {label for metric in METRICS.values() if names & set(metric.series) for label in metric.labels} | {"le"}
    assert _labels(expression) <= known, where


def test_every_metric_is_on_the_dashboard_and_on_its_page() -> None:
    shown = set[str]().union(*(_names(expression) for _, expression in _queries()))
    page = (FOLDER.parents[1] / "docs/monitoring.md").read_text()
    for metric in METRICS.values():
        assert shown & set(metric.series), metric.name
        assert f"`{metric.series[0].removesuffix('_bucket')}`" in page, metric.name
    for alert in _alerts():
        assert f"`{alert}`" in page, alert


def test_values_of_a_label_in_an_alert_exist() -> None:
    for name, rule in _alerts().items():
        for metric_name, label, values in re.findall(r"ray_(\w+?)_total\{(\w+)=~?\"([^\"]*)\"", rule["expr"]):
            metric = METRICS[metric_name]
            assert label == metric.label, name
            assert set(values.split("|")) <= set(metric.values), name


def test_panels_do_not_overlap_and_have_their_own_number() -> None:
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    places = [
        (p["gridPos"]["x"] + x, p["gridPos"]["y"] + y) for p in panels for x in range(p["gridPos"]["w"]) for y in range(p["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


@needs_promtool
def test_every_alert_fires_when_it_should() -> None:
    content = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())
    fired, silent = set[str](), set[str]()
    for case in content["tests"]:
        for check in case["alert_rule_test"]:
            (fired if check["exp_alerts"] else silent).add(check["alertname"])
    assert fired == silent == set(_alerts())
    run = subprocess.run([str(PROMTOOL), "test", "rules", "alerts_test.yaml"], cwd=FOLDER, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_promtool
@pytest.mark.parametrize("file", ["prometheus.yaml", "prometheus-kubernetes.yaml"])
def test_prometheus_takes_its_configuration(file: str, tmp_path: Path) -> None:
    content = yaml.safe_load((FOLDER / file).read_text())
    for scrape in content["scrape_configs"]:
        scrape.pop("kubernetes_sd_configs", None)  # Debian builds Prometheus without it
    (tmp_path / file).write_text(yaml.safe_dump(content))
    shutil.copy(FOLDER / "alerts.yaml", tmp_path)
    run = subprocess.run([str(PROMTOOL), "check", "config", file], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(_alerts())} rules found" in run.stdout


@dataclass
class Monitored:
    """What was seen of a run: the names that Ray served, and the Prometheus that scraped it, None where there is none."""

    begun: float
    ended: float = 0.0
    served: set[str] = field(default_factory=set)
    prometheus: str | None = None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression over the time of the run."""
        values = {"query": expression, "start": self.begun, "end": self.ended, "step": 1}
        return list(_ask(f"{self.prometheus}/api/v1/query_range?{urllib.parse.urlencode(values)}")["data"]["result"])


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    """A Ray, a stage on it, and a Prometheus that finds Ray by its file, all on loopback."""
    folder = tmp_path_factory.mktemp("monitored")
    (folder / "marks").mkdir()
    rays = tempfile.mkdtemp(prefix="ray-")  # a socket's whole path may have 107 characters, and Ray's own part has 80
    command = [sys.executable, "-m", "tests.infra.monitored", rays, str(folder / "marks"), str(folder / "root")]
    environment = {"RAY_metrics_report_interval_ms": "2000", "RAY_raylet_start_wait_time_s": "120"}
    environment |= {"DASHBOARD_PORT": str(_free_port()), "RAY_ADDRESS": ""}
    driver = subprocess.Popen(command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdin is not None
    assert driver.stdout is not None
    server: subprocess.Popen[bytes] | None = None
    stop = threading.Event()
    try:
        assert "ready\n" in driver.stdout
        seen = Monitored(time.time())
        discovery = Path(rays, "prom_metrics_service_discovery.json")
        _until(discovery.exists)
        scraper = threading.Thread(target=_scrape, args=(discovery, seen.served, stop), daemon=True)
        scraper.start()
        if PROMETHEUS:
            server, seen.prometheus = _start_prometheus(folder, discovery)
            _until(lambda: _up(str(seen.prometheus)) > 0)
        driver.stdin.write("go\n")
        driver.stdin.flush()
        assert "done\n" in driver.stdout, "Ray prints there too"
        seen.ended = time.time()
        yield seen
    finally:
        stop.set()
        if server is not None:
            server.terminate()
            server.wait(30)
        driver.stdin.close()
        try:
            driver.wait(60)
        except subprocess.TimeoutExpired:
            driver.kill()
        shutil.rmtree(rays, ignore_errors=True)


@pytest.mark.nodes
def test_ray_serves_every_metric(monitored: Monitored) -> None:
    assert OURS - monitored.served == set()
    assert RAYS - monitored.served == set()


@pytest.mark.nodes
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian and Ubuntu: apt install prometheus)")
def test_a_real_prometheus_answers_every_query(monitored: Monitored) -> None:
    for title, expression in _queries():
        series = monitored.query(expression)
        values = [float(value) for each in series for _, value in each["values"]]
        assert any(math.isfinite(value) for value in values), f"{title}: {expression}"


@pytest.mark.nodes
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian and Ubuntu: apt install prometheus)")
def test_the_numbers_are_those_of_the_run(monitored: Monitored) -> None:
    def last(expression: str) -> dict[str, float]:
        """The last value of each series by its own label."""
        own = {metric.label for metric in METRICS.values()} - {""}
        found = monitored.query(expression)
        return {next((v for k, v in each["metric"].items() if k in own), ""): float(each["values"][-1][1]) for each in found}

    stage = '{stage="protect",attempt="1"}'
    assert last(f"ray_facemae_shards_total{stage}") == {"": 8}
    assert last(f"ray_facemae_images_total{stage}") == {"": 21}
    assert last(f"ray_facemae_quarantined_total{stage}") == {"": 3}
    assert last(f"ray_facemae_shards_given_up_total{stage}") == {"": 1}
    assert last(f"ray_facemae_shards_left{stage}") == {"": 0}
    assert last(f"ray_facemae_worker_losses_total{stage}") == {"process": 1, "node": 0}
    retries = last(f"ray_facemae_retries_total{stage}")
    assert retries["storage"] >= 1
    assert retries["charged"] >= 1
    assert last('ray_facemae_images_total{stage="train"}') == {"": 16}
    assert last("count by (stage) (ray_facemae_training_loss)") == {"": 1}
    seconds = last(f"sum by (step) (ray_facemae_step_seconds_count{stage})")
    assert seconds == {"fetch": 7, "compute": 7, "publish": 8}


@pytest.mark.nodes
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian and Ubuntu: apt install prometheus)")
def test_a_real_prometheus_evaluates_every_alert(monitored: Monitored) -> None:
    rules = _ask(f"{monitored.prometheus}/api/v1/rules")["data"]["groups"][0]["rules"]
    assert {rule["name"] for rule in rules} == set(_alerts())
    assert {rule["health"] for rule in rules} == {"ok"}
    assert monitored.query(_alerts()["FaceMAEShardGivenUp"]["expr"]), "one shard was given up"
    assert not monitored.query(_alerts()["FaceMAEStorageErrors"]["expr"])


def _start_prometheus(folder: Path, discovery: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Our configuration, with the folder of this test's Ray and a shorter interval."""
    content = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    content["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (scrape,) = content["scrape_configs"]
    scrape["file_sd_configs"][0]["files"] = [str(discovery)]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(FOLDER / "alerts.yaml", folder)
    address = f"127.0.0.1:{_free_port()}"
    options = {"config.file": "prometheus.yaml", "storage.tsdb.path": "tsdb", "web.listen-address": address, "log.level": "error"}
    command = [str(PROMETHEUS), *(f"--{name}={value}" for name, value in options.items())]
    return subprocess.Popen(command, cwd=folder), f"http://{address}"


def _scrape(discovery: Path, names: set[str], stop: threading.Event) -> None:
    """Collect the names that Ray serves, as long as it does."""
    while not stop.wait(0.5):
        for target in (target for group in json.loads(discovery.read_text()) for target in group["targets"]):
            try:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                    names.update(re.findall(r"^(\w+)\{", answer.read().decode(), re.MULTILINE))
            except OSError:
                continue


def _up(prometheus: str) -> int:
    """How many targets answer."""
    try:
        return len(_ask(f"{prometheus}/api/v1/query?query=up%3D%3D1")["data"]["result"])
    except OSError:
        return 0


def _ask(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return dict(json.load(answer))


def _until(done: Any) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
