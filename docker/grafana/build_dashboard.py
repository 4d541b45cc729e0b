"""Writes dashboards/din_dist.json: `python docker/grafana/build_dashboard.py` after a change here.

A dashboard is rows of panels, which flow from left to right in a grid of 24 columns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "dashboards" / "din_dist.json"
DATASOURCE = {"type": "prometheus", "uid": "din_dist_prometheus"}  # as in provisioning/datasources
RANKS = '{job="din_dist", run="$run"}'  # of a metric as exported
RUN = '{run="$run"}'  # of a recorded one
RATE = "[$__rate_interval]"
GRID_WIDTH = 24

Json = dict[str, Any]
Query = tuple[str, str]  # expression, legend


def panel(kind: str, title: str, description: str, unit: str, *queries: Query, width: int, height: int) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend}
            for place, (expression, legend) in enumerate(queries)
        ],
    }


def stat(title: str, description: str, unit: str, expression: str, decimals: int) -> Json:
    """The last value, large."""
    found = panel("stat", title, description, unit, (expression, title), width=4, height=4)
    found["fieldConfig"]["defaults"]["decimals"] = decimals
    found["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
    return found


def lines(title: str, description: str, unit: str, *queries: Query, stacked: bool = False, width: int = 8) -> Json:
    found = panel("timeseries", title, description, unit, *queries, width=width, height=8)
    found["fieldConfig"]["defaults"]["custom"] = {
        "fillOpacity": 60 if stacked else 0,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    found["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return found


def phases() -> Json:
    """A bar for as long as a phase lasts."""
    text = "What the job does: it starts, trains, validates, saves, tests; then it is done, stopped or failed."
    query = (f"run:din_dist_phase:max{RUN}", "{{phase}}")
    found = panel("state-timeline", "Phase", text, "none", query, width=GRID_WIDTH, height=8)
    colors = {"0": "transparent", "1": "blue"}
    found["fieldConfig"]["defaults"]["mappings"] = [
        {"type": "value", "options": {value: {"text": " ", "color": color} for value, color in colors.items()}}
    ]
    found["options"] = {"showValue": "never", "mergeValues": True, "legend": {"showLegend": False}}
    return found


def per_rank(metric: str) -> str:
    return f"sum by (rank) ({metric})"


def job_wide(metric: str) -> str:
    """Returns the query of a gauge that is the same on all ranks."""
    return f"max({metric}{RANKS})"


def by_split(metric: str) -> Query:
    return f"max by (split) ({metric}{RANKS})", "{{split}}"


def quantile(share: float) -> Query:
    buckets = f"sum by (le) (rate(din_dist_step_seconds_bucket{RANKS}{RATE}))"
    return f"histogram_quantile({share}, {buckets})", f"{share:.0%}"


def overview() -> list[Json]:
    planned, done = job_wide("din_dist_steps_planned"), job_wide("din_dist_step")
    return [
        stat(
            "Speed",
            "Examples per second, all ranks, in the last minute.",
            "ops",
            f"run:din_dist_examples:rate1m{RUN}",
            0,
        ),
        stat(
            "Progress",
            "Updates over those planned; early stopping ends before.",
            "percentunit",
            f"{done} / {planned}",
            1,
        ),
        stat(
            "Time left",
            "For the updates that are left, at the speed of the last minute.",
            "s",
            f"({planned} - {done}) / on () (run:din_dist_steps:rate1m{RUN} > 0)",
            0,
        ),
        stat("Loss", "Mean loss of the last global batch, in nats.", "none", job_wide("din_dist_loss"), 4),
        stat("Ranks", "How many answer to Prometheus; DinDistRankMissing compares.", "none", f"run:up:sum{RUN}", 0),
        stat(
            "Scaling efficiency",
            "Speed over that of as many workers, each as fast as --baseline_examples_per_second; empty without it.",
            "percentunit",
            f"run:din_dist_scaling_efficiency:ratio_rate5m{RUN}",
            1,
        ),
        phases(),
    ]


def throughput() -> list[Json]:
    return [
        lines(
            "Examples per second by rank",
            "By the clock, stacked: the top is the whole job. It falls to 0 while the job validates.",
            "ops",
            (f"run_rank:din_dist_examples:rate1m{RUN}", "rank {{rank}}"),
            stacked=True,
        ),
        lines(
            "Examples per second of the job",
            "By the clock; and per second of update time, which holds still through validation.",
            "ops",
            (f"run:din_dist_examples:rate1m{RUN}", "all ranks"),
            (f"run:din_dist_training_speed:sum_rate5m{RUN}", "all ranks, in training"),
            (f"run:din_dist_examples:min_rate1m{RUN}", "slowest rank"),
        ),
        lines(
            "History positions per second",
            "Behaviours trained on, all ranks: what the time of an update grows with.",
            "ops",
            (f"run:din_dist_positions:rate1m{RUN}", "all ranks"),
        ),
    ]


def time_split() -> list[Json]:
    return [
        lines(
            "Where the update time goes",
            "Shares, all ranks. Compute includes the messages of batch statistics; exchange is the gradients'.",
            "percentunit",
            (f"run_part:din_dist_step_part_seconds:ratio_rate5m{RUN}", "{{part}}"),
            stacked=True,
        ),
        lines(
            "Time of an update",
            "Quantiles over all ranks, input wait included.",
            "s",
            *(quantile(share) for share in (0.5, 0.9, 0.99)),
        ),
        lines(
            "A rank's own work in an update",
            "Input wait and compute. The others wait for the rank that takes longest.",
            "s",
            (f"run_rank:din_dist_own_step_seconds:rate5m{RUN}", "rank {{rank}}"),
        ),
    ]


def learning() -> list[Json]:
    return [
        lines("Loss", "Mean loss of the last global batch.", "none", (job_wide("din_dist_loss"), "loss (nats)")),
        lines(
            "Gradient norm", "Global, before clipping.", "none", (job_wide("din_dist_gradient_norm"), "gradient norm")
        ),
        lines("Learning rate", "Of the last update.", "none", (job_wide("din_dist_learning_rate"), "learning rate")),
        lines(
            "Unknown ids",
            "Share of the last batch's candidates and positions without a known id, by table.",
            "percentunit",
            (f"max by (table) (din_dist_unknown_ids_ratio{RANKS})", "{{table}}"),
        ),
        lines(
            "Padding",
            "Share of positions that were added to reach one of XLA's few lengths.",
            "percentunit",
            (f"max by (rank) (din_dist_padding_ratio{RANKS})", "rank {{rank}}"),
        ),
        lines(
            "Updates refused",
            "Because loss or gradient was not finite; the job ends there.",
            "none",
            (f"sum(din_dist_nonfinite_steps_total{RANKS})", "refused"),
        ),
    ]


def quality() -> list[Json]:
    return [
        lines(
            "GAUC", "Per-user AUC averaged by impressions, at the last evaluation.", "none", by_split("din_dist_gauc")
        ),
        lines("AUC", "At the last evaluation.", "none", by_split("din_dist_auc")),
        lines("Log loss", "Mean, in nats, at the last evaluation.", "none", by_split("din_dist_log_loss")),
    ]


def exchange() -> list[Json]:
    return [
        lines(
            "Bytes to the exchange",
            "What all ranks hand over, by kind of message.",
            "Bps",
            (f"sum by (kind) (rate(din_dist_exchanged_bytes_total{RANKS}{RATE}))", "{{kind}}"),
            stacked=True,
            width=12,
        ),
        lines(
            "Rows updated",
            "Unique rows of each embedding table in the last update, over all ranks.",
            "none",
            (f"max by (table) (din_dist_unique_rows{RANKS})", "{{table}}"),
            width=12,
        ),
    ]


def elastic() -> list[Json]:
    return [
        lines(
            "Ranks",
            "How many the job has, and how many answer.",
            "none",
            (f"run:din_dist_world_size:max{RUN}", "in the job"),
            (f"run:up:sum{RUN}", "answering"),
            width=12,
        ),
        lines(
            "Resets and restarts",
            "Changes of the set of workers while a process lived; starts in the output directory after the first.",
            "none",
            (f"max(din_dist_elastic_resets_total{RANKS})", "elastic resets"),
            (f"run:din_dist_restarts:max{RUN}", "restarts"),
            width=12,
        ),
    ]


def checkpoints() -> list[Json]:
    seconds = "din_dist_checkpoint_seconds"
    return [
        lines(
            "Age of the last checkpoint",
            "What a crash would cost now; since the process' start before its first one.",
            "s",
            (f"run:din_dist_checkpoint_age_seconds:min{RUN}", "age"),
            width=6,
        ),
        lines(
            "Time to write one",
            "Mean over ranks and checkpoints so far.",
            "s",
            (f"sum({seconds}_sum{RANKS}) / (sum({seconds}_count{RANKS}) > 0)", "mean"),
            width=6,
        ),
        lines("Size", "Of the last checkpoint.", "bytes", (job_wide("din_dist_checkpoint_bytes"), "size"), width=6),
        lines(
            "Failures",
            "Checkpoints that could not be written.",
            "none",
            (f"sum(din_dist_checkpoint_failures_total{RANKS})", "failures"),
            width=6,
        ),
    ]


def resources() -> list[Json]:
    return [
        lines(
            "Processors in use",
            "Cores that each rank keeps busy.",
            "none",
            (per_rank(f"rate(process_cpu_seconds_total{RANKS}{RATE})"), "rank {{rank}}"),
            width=6,
        ),
        lines(
            "Resident memory",
            "Of each rank; pages of the data that ranks of a machine share count in each.",
            "bytes",
            (per_rank(f"process_resident_memory_bytes{RANKS}"), "rank {{rank}}"),
            width=6,
        ),
        lines(
            "GPU memory",
            "What TensorFlow holds, now and at its peak; empty without a GPU.",
            "bytes",
            (f"sum by (rank, kind) (din_dist_gpu_memory_bytes{RANKS})", "rank {{rank}}, {{kind}}"),
            width=6,
        ),
        lines(
            "Free disk",
            "Where the output directory is, and all there is.",
            "bytes",
            (f"min(din_dist_output_free_bytes{RANKS})", "free"),
            (f"min(din_dist_output_size_bytes{RANKS})", "in all"),
            width=6,
        ),
    ]


ROWS = {
    "Overview": overview,
    "Throughput": throughput,
    "Time": time_split,
    "Learning": learning,
    "Quality": quality,
    "Exchange between ranks": exchange,
    "Elastic events": elastic,
    "Checkpoints": checkpoints,
    "Resources": resources,
}
ANNOTATIONS = {  # title -> color, expression
    "Workers changed": ("purple", f"changes(run:din_dist_world_size:max{RUN}[1m]) > 0"),
    "Elastic reset": ("blue", f"max(increase(din_dist_elastic_resets_total{RANKS}[1m])) > 0"),
    "Started again": ("orange", f"changes(run:din_dist_restarts:max{RUN}[1m]) > 0"),
    "Alert": ("red", 'ALERTS{alertstate="firing", run="$run"}'),
}


def placed_panels() -> list[Json]:
    """All rows' panels, from left to right and on to the next line where the grid ends."""
    panels: list[Json] = []
    top = 0

    def place(found: Json, left: int, top: int) -> None:
        panels.append({**found, "id": len(panels) + 1, "gridPos": {**found["gridPos"], "x": left, "y": top}})

    for title, make in ROWS.items():
        place(
            {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": GRID_WIDTH, "h": 1}},
            0,
            top,
        )
        left, top, height = 0, top + 1, 0
        for found in make():
            size = found["gridPos"]
            if left + size["w"] > GRID_WIDTH:
                left, top, height = 0, top + height, 0
            place(found, left, top)
            left, height = left + size["w"], max(height, size["h"])
        top += height
    return panels


def dashboard() -> Json:
    return {
        "uid": "din_dist",
        "title": "din_dist",
        "description": "One training job: speed, quality, workers, checkpoints, resources.",
        "tags": ["din_dist"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,  # one cross-hair for all panels
        "templating": {
            "list": [
                {
                    "name": "run",
                    "label": "Output directory",
                    "type": "query",
                    "datasource": DATASOURCE,
                    "query": {"query": 'label_values(din_dist_phase{job="din_dist"}, run)', "refId": "run"},
                    "refresh": 2,  # when the time range changes
                    "sort": 1,
                    "multi": False,
                    "includeAll": False,
                }
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": name,
                    "datasource": DATASOURCE,
                    "enable": True,
                    "iconColor": color,
                    "expr": expression,
                    "step": "15s",
                    "titleFormat": "{{alertname}}" if name == "Alert" else name,
                }
                for name, (color, expression) in ANNOTATIONS.items()
            ]
        },
        "panels": placed_panels(),
    }


def to_text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(to_text())
