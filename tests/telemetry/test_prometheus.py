"""Metrics as a Prometheus server reads them: over HTTP and HTTPS, with and without a password, and pushed."""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tensorflow as tf
from prometheus_client.parser import text_string_to_metric_families

from din_dist import assembly
from din_dist.config import Config
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.serving.http.metrics import ServingMetrics
from din_dist.telemetry.prometheus import PrometheusMetrics
from tests.support.programs import free_port, program, running
from tests.support.repository import ROOT
from tests.support.small_log import small_config


def exporter_of(folder: Path, **settings: object) -> PrometheusMetrics:
    return PrometheusMetrics(small_config(folder, **{"metrics_port": 0, **settings}), Runtime())


def train(config: Config) -> assembly.Job:
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    job.trainer.train()
    return job


def scrape(url: str, **options: object) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10, **options) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        sample.name + "".join(f"{{{name}={value}}}" for name, value in sample.labels.items()): sample.value
        for sample in samples
    }


def test_a_scrape_counts_what_was_trained(tmp_path: Path) -> None:
    job = train(small_config(tmp_path, metrics_port=0, epochs=2))
    state = job.trainer.state
    try:
        (target,) = json.loads((tmp_path / "run" / "targets.json").read_text())
        assert target["labels"] == {
            "job": "din_dist",
            "run": str(tmp_path / "run"),
            "rank": "0",
            "__scheme__": "http",
        }
        (address,) = target["targets"]
        found = scrape(f"http://{address}/metrics")
    finally:
        job.telemetry.close()
    assert found["din_dist_examples_total"] == sum(record["examples"] for record in state.epoch_records)
    assert found["din_dist_steps_total"] == found["din_dist_step"] == state.step == found["din_dist_steps_planned"]
    assert found["din_dist_step_seconds_count"] == state.step
    assert found["din_dist_epochs_total"] == found["din_dist_epoch"] == 2
    parts = [
        found[f"din_dist_step_part_seconds_total{{part={part}}}"]
        for part in ("input_wait", "compute", "exchange", "update")
    ]
    assert sum(parts) == pytest.approx(found["din_dist_step_seconds_sum"])
    assert min(parts) >= 0
    assert parts[1] == max(parts)  # tracing alone takes seconds
    assert 0.1 < found["din_dist_loss"] < 1.0
    assert found["din_dist_gradient_norm"] > 0
    assert found["din_dist_learning_rate"] == 1e-3
    assert found["din_dist_world_size"] == 1
    assert found["din_dist_phase{phase=training}"] == 1
    assert found["din_dist_checkpoint_seconds_count"] == 2
    folder = tmp_path / "run" / "checkpoints" / f"step-{state.step:012d}"
    assert found["din_dist_checkpoint_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert found["din_dist_restarts_total"] == 0
    assert 0 < found["din_dist_output_free_bytes"] < found["din_dist_output_size_bytes"]
    assert found["process_resident_memory_bytes"] > 1e8


def test_positions_rows_and_unknown_ids_are_those_of_the_batches(tmp_path: Path) -> None:
    """Counted again from the batches, one epoch of one step."""
    config = small_config(tmp_path, metrics_port=0, epochs=1, global_batch_size=2000, negatives_per_positive=1)
    job = train(config)
    found = scrape(f"http://{job.telemetry.prometheus_metrics.address}/metrics")
    job.telemetry.close()
    (batch,) = (tf.nest.map_structure(lambda value: value.numpy(), batch) for batch in job.make_batches(0, 1))
    items = set(batch.candidate_item_ids) | set(batch.history_item_ids)
    assert found["din_dist_positions_total"] == batch.history_lengths.sum()
    assert found["din_dist_unique_rows{table=item}"] == found["din_dist_unique_rows{table=item_bias}"] == len(items)
    assert found["din_dist_unique_rows{table=category_id}"] == 5
    assert found["din_dist_unknown_ids_ratio{table=item}"] == 0
    assert found["din_dist_padding_ratio"] == 0  # without XLA


def test_unknown_features_are_counted_by_position(tmp_path: Path) -> None:
    import pandas

    log = tmp_path / "log.parquet"
    small_config(tmp_path)  # writes it
    events = pandas.read_parquet(log)
    events.loc[events.item_id.isin(["i0", "i1", "i2", "i3", "i4"]), "category_id"] = None
    events.to_parquet(log)
    config = small_config(tmp_path, metrics_port=0, epochs=1, global_batch_size=2000)
    job = train(config)
    found = scrape(f"http://{job.telemetry.prometheus_metrics.address}/metrics")
    job.telemetry.close()
    (batch,) = job.make_batches(0, 1)
    feature = prepare(config.data).item_features["category_id"]
    ids = [*batch.candidate_item_ids.numpy(), *batch.history_item_ids.numpy()]
    expected = sum(feature[item] == 0 for item in ids) / len(ids)
    assert 0.05 < expected < 0.5
    assert found["din_dist_unknown_ids_ratio{table=category_id}"] == pytest.approx(expected)
    assert found["din_dist_unknown_ids_ratio{table=item}"] == 0


def test_two_jobs_in_one_process_do_not_clash(tmp_path: Path) -> None:
    exporters = [exporter_of(tmp_path) for _ in range(2)]
    exporters[0].examples.inc(3)
    found = [
        scrape(f"http://{prometheus_metrics.address}/metrics")["din_dist_examples_total"]
        for prometheus_metrics in exporters
    ]
    assert found == [3, 0]
    for prometheus_metrics in exporters:
        prometheus_metrics.close()


def test_names_follow_the_conventions_and_stand_in_the_reference(tmp_path: Path) -> None:
    package = ROOT / "din_dist"
    reference = "".join((package / room / "README.md").read_text() for room in ("telemetry", "serving"))
    told = set(re.findall(r"din_dist_[a-z_]+", reference))
    prometheus_metrics = exporter_of(tmp_path, metrics_port=-1, baseline_examples_per_second=1.0)
    registries = (prometheus_metrics.registry, ServingMetrics({}).registry)
    collected = [family for registry in registries for family in registry.collect()]
    families = [family for family in collected if family.name.startswith("din_dist_")]
    assert len(families) > 45
    for family in families:
        assert re.fullmatch(r"[a-z_]+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        assert family.name + ("_total" if family.type == "counter" else "") in told or family.type == "info", (
            family.name
        )
        assert not family.name.endswith(("_ms", "_milliseconds", "_mb", "_percent")), family.name
    names = {family.name for family in families} | {f"{family.name}_total" for family in families}
    names |= {
        "din_dist_build_info",
        "din_dist_serving_model_info",
        "din_dist_output_free_bytes",
        "din_dist_output_size_bytes",
    }
    elsewhere = {"din_dist_gpu_memory_bytes", "din_dist_task_gauc"}  # with a GPU; with several labels
    assert told - names <= elsewhere, "the reference names a metric that is not there"


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--metrics_port: .* needs a free port on 127.0.0.1. Received: {port}, "):
            exporter_of(tmp_path, metrics_port=port)


def test_a_password_keeps_others_out(tmp_path: Path) -> None:
    logins = tmp_path / "logins"
    logins.write_text("prometheus:open sesame\nops:s3cret\n")
    prometheus_metrics = exporter_of(tmp_path, metrics_password_file=str(logins))
    url = f"http://{prometheus_metrics.address}/metrics"

    def ask(login: str | None) -> dict[str, float]:
        token = base64.b64encode((login or "").encode()).decode()
        return scrape(urllib.request.Request(url, headers={"Authorization": f"Basic {token}"} if login else {}))

    try:
        for login in (None, "prometheus:wrong", "ops:open sesame", "prometheus", ":"):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                ask(login)
            assert refusal.value.code == 401
            assert "Basic" in refusal.value.headers["WWW-Authenticate"]
        for login in ("prometheus:open sesame", "ops:s3cret"):
            assert ask(login)["din_dist_world_size"] == 1
    finally:
        prometheus_metrics.close()


def test_tls_serves_those_who_trust_and_is_not_held_up_by_the_silent(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 "
        f"-keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    prometheus_metrics = exporter_of(tmp_path, metrics_tls_certificate=str(certificate), metrics_tls_key=str(key))
    url = f"https://{prometheus_metrics.address}/metrics"
    try:
        host, _, port = prometheus_metrics.address.partition(":")
        with socket.create_connection((host, int(port))):  # says nothing, and stays
            trusting = ssl.create_default_context(cafile=certificate)
            assert scrape(url, context=trusting)["din_dist_world_size"] == 1
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            scrape(url)
        with pytest.raises(OSError):
            scrape(url.replace("https", "http"))
    finally:
        prometheus_metrics.close()


GATEWAY = {"pushgateway": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics_tls_certificate": "nowhere.pem", "metrics_tls_key": "nowhere.pem"}, "must be a PEM certificate"),
        ({"metrics_password_file": "nowhere"}, "must be a file that can be read. Received: nowhere, No such file"),
        ({"metrics_password_file": "empty"}, "must have a line user:password"),
        ({"metrics_password_file": "unlike"}, "must have a line user:password"),
        (
            GATEWAY | {"pushgateway_password_file": "nowhere"},
            "must be a file that can be read. Received: nowhere, No such",
        ),
        (GATEWAY | {"pushgateway_password_file": "empty"}, "must have one line user:password. Received: empty, with"),
        (GATEWAY | {"pushgateway_password_file": "unlike"}, "must have one line user:password"),
    ],
)
def test_files_of_no_use_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    Path("unlike").write_text("user\n")
    with pytest.raises(InputError, match=message):
        exporter_of(tmp_path, **settings)


def test_a_pushgateway_gets_the_last_values(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [program("prometheus-pushgateway"), f"--web.listen-address=127.0.0.1:{port}"]
    with running(command, tmp_path / "log", f"{url}/-/ready"):
        config = small_config(tmp_path, epochs=1, pushgateway=url)
        job = assembly.Assembly(config, Runtime(), prepare(config.data))
        with job.telemetry.until_the_end(job.trainer):
            job.trainer.train()
        found = {
            name.partition("{")[0]: value
            for name, value in scrape(f"{url}/metrics").items()
            if f"{{run={tmp_path / 'run'}}}" in name and "{rank=0}" in name
        }
    assert found["din_dist_examples_total"] == job.trainer.state.epoch_records[0]["examples"]
    assert found["din_dist_steps_total"] == job.trainer.state.step


def test_a_pushgateway_that_asks_for_a_password(tmp_path: Path) -> None:
    """Which comes from a file, so that no flag, checkpoint or report has it."""
    asked: list[str | None] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked.append(self.headers.get("Authorization"))
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if asked[-1] else 401)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    (tmp_path / "login").write_text("me:a:secret\n")
    with HTTPServer(("127.0.0.1", 0), Gateway) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{gateway.server_address[1]}"
        prometheus_metrics = exporter_of(tmp_path, pushgateway=url, pushgateway_password_file=str(tmp_path / "login"))
        assert prometheus_metrics.push() is None
        assert "did not take the metrics" in str(exporter_of(tmp_path, pushgateway=url).push())
        gateway.shutdown()
    assert asked == [f"Basic {base64.b64encode(b'me:a:secret').decode()}", None]


def test_a_pushgateway_that_is_not_there_does_not_fail_the_job(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path, epochs=1, pushgateway=f"http://127.0.0.1:{free_port()}")
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    with job.telemetry.until_the_end(job.trainer):
        job.trainer.train()
    assert "warning: --pushgateway: http://127.0.0.1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("url", "rule"),
    [("u:secret@host:80", "must be a URL"), ("http://u:secret@host:80", "must be without user and password")],
)
def test_no_password_of_a_gateway_is_shown(tmp_path: Path, url: str, rule: str) -> None:
    with pytest.raises(InputError, match=f"--pushgateway: {rule}") as refused:
        exporter_of(tmp_path, pushgateway=url)
    assert "secret" not in str(refused.value)
