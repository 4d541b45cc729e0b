"""docker/prometheus: its files are sound, and each alert fires when it should and not when it should not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from din_dist.telemetry.prometheus import PHASES
from din_dist.telemetry.step_report import PARTS
from tests.support.exported_metrics import exported_metrics
from tests.support.promql import FOREIGN_METRICS, PROMETHEUS, asked_values, metric_names, promtool

CASES = sorted((Path(__file__).parent / "rules").glob("*.yml"))


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


CASE_GROUPS = [group for path in CASES for group in yaml.safe_load(path.read_text())["tests"]]
RECORDING, ALERTS = rules("recording_rules.yml"), rules("alert_rules.yml")


def test_configuration() -> None:
    done = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout


@pytest.mark.parametrize("name", ["recording_rules.yml", "alert_rules.yml"])
def test_rules_are_sound(name: str) -> None:
    done = promtool("check", "rules", PROMETHEUS / name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_rules_give_what_was_calculated_by_hand(path: Path) -> None:
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [alert["alert"] for alert in ALERTS])
def test_every_alert_has_a_firing_and_a_quiet_case(name: str) -> None:
    expected = [
        [bool(case["exp_alerts"]) for case in group.get("alert_rule_test", []) if case["alertname"] == name]
        for group in CASE_GROUPS
    ]
    assert any(True in of_group for of_group in expected), "no case in which it fires"
    assert any(of_group and not any(of_group) for of_group in expected), "no series on which it stays quiet throughout"


@pytest.mark.parametrize("name", [rule["record"] for rule in RECORDING])
def test_every_recording_rule_has_a_case(name: str) -> None:
    expressions = [
        case["expr"] for group in CASE_GROUPS for case in group.get("promql_expr_test", []) if case["exp_samples"]
    ]
    assert any(name in metric_names(expression) for expression in expressions)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alerts_say_how_bad_what_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description"}
    assert alert["annotations"]["summary"].startswith("{{ $labels.run }}: ")


@pytest.mark.parametrize("rule", RECORDING + ALERTS, ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_read_what_is_exported(rule: dict[str, Any]) -> None:
    recorded = {rule["record"] for rule in RECORDING}
    unknown = metric_names(rule["expr"]) - exported_metrics() - recorded - FOREIGN_METRICS
    assert not unknown
    assert asked_values(rule["expr"], "phase") <= set(PHASES)
    assert asked_values(rule["expr"], "part") <= set(PARTS)
    assert asked_values(rule["expr"], "job") <= {"din_dist", "din_dist_ended"}


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (run) (rate(a_total{job="x", part=~"b|c"}[5m])) > 0', {"a_total"}),
        ("run:a:max / on (run) group_left () (b{} * 2e3) unless on (run) c offset 5m == 1", {"run:a:max", "b", "c"}),
        ("min_over_time(avg_over_time(a[10m])[2h:1m]) or time() - b > Inf", {"a", "b"}),
    ],
)
def test_metric_names(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names
