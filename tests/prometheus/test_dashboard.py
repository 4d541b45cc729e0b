"""docker/grafana: its dashboard is what its code builds, and every query is sound and reads what exists."""

from __future__ import annotations

import itertools
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from din_dist.telemetry.prometheus import PHASES
from din_dist.telemetry.step_report import PARTS
from tests.support.exported_metrics import exported_metrics
from tests.support.promql import FOREIGN_METRICS, PROMETHEUS, asked_values, metric_names, promtool
from tests.support.repository import ROOT

GRAFANA = ROOT / "docker" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "din_dist.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
DATASOURCES = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
RECORDED = {
    rule["record"]
    for group in yaml.safe_load((PROMETHEUS / "recording_rules.yml").read_text())["groups"]
    for rule in group["rules"]
}
QUERIES = [
    *((panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]),
    *((f"annotation {found['name']}", found["expr"]) for found in DASHBOARD["annotations"]["list"]),
    *(
        (f"variable {found['name']}", re.sub(r"label_values\((.*), *\w+\)", r"\1", found["query"]["query"]))
        for found in DASHBOARD["templating"]["list"]
    ),
]


def filled(expression: str) -> str:
    """An expression as Prometheus gets it: with Grafana's variables filled in."""
    found = expression.replace("$__rate_interval", "1m").replace("$run", "runs/latest")
    assert "$" not in found, found
    return found


def test_json_is_what_the_code_builds() -> None:
    built = runpy.run_path(str(GRAFANA / "build_dashboard.py"))["to_text"]()
    same = (GRAFANA / "dashboards" / "din_dist.json").read_text() == built
    assert same, "run: python docker/grafana/build_dashboard.py"


def test_every_query_parses(tmp_path: Path) -> None:
    # promtool checks no bare queries, but the expressions of rules.
    rules = [{"record": f"query{place}", "expr": filled(query)} for place, (_, query) in enumerate(QUERIES)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUERIES)} rules found" in done.stdout


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[title for title, _ in QUERIES])
def test_every_query_reads_what_exists(title: str, query: str) -> None:
    names = metric_names(filled(query))
    assert names, "reads nothing"
    assert not names - RECORDED - exported_metrics() - FOREIGN_METRICS
    assert asked_values(query, "phase") <= set(PHASES)
    assert asked_values(query, "part") <= set(PARTS)


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[title for title, _ in QUERIES])
def test_every_query_is_of_the_chosen_run(title: str, query: str) -> None:
    selectors = len(re.findall(r"\{[^{}]*\}", query))
    assert selectors == len(re.findall(r'run="\$run"', query)) or title == "variable run"
    # What ended jobs pushed has a job of its own; recording rules have left it out already.
    exported = [name for name in metric_names(filled(query)) if name.startswith(("din_dist_", "process_"))]
    assert asked_values(query, "job") == ({"din_dist"} if exported else set())


def test_every_panel_says_what_it_shows() -> None:
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"] and all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_panels_stand_side_by_side() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [list(_cells(panel["gridPos"])) for panel in DASHBOARD["panels"]]
    assert len(set(itertools.chain(*cells))) == sum(map(len, cells)), "two panels overlap"
    assert all(left < 24 for left, _ in itertools.chain(*cells))


def _cells(place: dict[str, int]) -> itertools.product[tuple[int, int]]:
    columns = range(place["x"], place["x"] + place["w"])
    return itertools.product(columns, range(place["y"], place["y"] + place["h"]))


def test_datasource_is_the_provisioned_one() -> None:
    used: list[dict[str, Any]] = [
        part["datasource"]
        for part in [
            *PANELS,
            *(target for panel in PANELS for target in panel["targets"]),
            *DASHBOARD["annotations"]["list"],
            *DASHBOARD["templating"]["list"],
        ]
    ]
    [provisioned] = DATASOURCES
    assert {(found["uid"], found["type"]) for found in used} == {(provisioned["uid"], provisioned["type"])}
    scrape_interval = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert provisioned["jsonData"]["timeInterval"] == scrape_interval


def test_dashboards_are_provisioned() -> None:
    [provider] = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "din_dist.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"] == "/var/lib/grafana/dashboards"
