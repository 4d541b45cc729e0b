"""Settings of what a job reports of itself."""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar

from din_dist.config.settings import Settings, path_setting, port_setting, require, setting, text_setting
from din_dist.files import without_password

_PROMETHEUS = "Prometheus"
_TRACKER = "experiment tracker"


class LogFormat(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


class TrackerKind(enum.StrEnum):
    NONE = "none"
    MLFLOW = "mlflow"
    TENSORBOARD_HPARAMS = "tensorboard-hparams"
    WANDB = "wandb"


def _check_tracker_uri(name: str, value: str) -> None:
    # The flags are kept, and sent to the tracker too.
    rule, remedy = "must be without user and password", "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
    require(without_password(value) == value, rule, name, without_password(value), remedy)


def _check_pushgateway(name: str, value: str) -> None:
    shown = without_password(value)
    is_url = not value or value.startswith(("http://", "https://"))
    require(is_url, "must be a URL", name, shown, "For example http://pushgateway:9091.")
    # Checkpoints, reports and exports keep the flags, and all users of a machine see them.
    rule = "must be without user and password"
    require(shown == value, rule, name, shown, "Give them in --pushgateway_password_file.")


@dataclasses.dataclass(frozen=True)
class TelemetryConfig(Settings):
    """Logs, TensorBoard and Prometheus."""

    THEME: ClassVar[str] = "logs and TensorBoard"

    log_every_steps: int = setting(
        100, "Updates between two log lines and TensorBoard points.", at_least=1, may_change=True
    )
    log_format: LogFormat = setting(
        LogFormat.TEXT,
        "Format of the lines on stderr: text for people, or json, one object per line, for log collectors.",
        may_change=True,
    )
    histograms_every_steps: int = setting(
        1000,
        "Updates between TensorBoard histograms of attention weights and embedding norms; 0 for none.",
        at_least=0,
        may_change=True,
    )
    profile_at_step: int = setting(
        0,
        "First of 20 updates to profile for TensorBoard; 0 for none. A running job also profiles when a file named "
        "`profile` appears in --output_dir.",
        at_least=0,
        may_change=True,
    )
    projector_items: int = setting(
        1000,
        "Most frequent items whose embeddings go to TensorBoard's projector when a job is done; 0 for none.",
        at_least=0,
        may_change=True,
    )
    metrics_host: str = text_setting(
        "127.0.0.1", "Address that the Prometheus exporters listen on.", may_change=True, theme=_PROMETHEUS
    )
    metrics_port: int = port_setting(
        0,
        "Prometheus port of the first worker of a machine; the other workers take the next ports. 0: a free port each, "
        "written to targets.json in --output_dir. -1: no exporter.",
        lowest=-1,
        may_change=True,
        theme=_PROMETHEUS,
    )
    metrics_tls_certificate: str = path_setting(
        "",
        "PEM certificate with which the exporters serve HTTPS. Default: none, they serve HTTP.",
        may_change=True,
        theme=_PROMETHEUS,
    )
    metrics_tls_key: str = path_setting(
        "", "PEM file with the key of --metrics_tls_certificate. Default: none.", may_change=True, theme=_PROMETHEUS
    )
    metrics_password_file: str = path_setting(
        "",
        "File with lines user:password. Each scrape must give one of them (basic authentication). Default: none.",
        may_change=True,
        theme=_PROMETHEUS,
    )
    pushgateway: str = text_setting(
        "",
        "URL of a Prometheus Pushgateway, which gets the last values when a job ends. A password belongs in "
        "--pushgateway_password_file. Default: none.",
        check=_check_pushgateway,
        may_change=True,
        theme=_PROMETHEUS,
    )
    pushgateway_password_file: str = path_setting(
        "",
        "File with one line user:password, for a Pushgateway with basic authentication. Default: none.",
        may_change=True,
        theme=_PROMETHEUS,
    )
    baseline_examples_per_second: float = setting(
        0.0,
        "Speed of one worker alone, as din_dist.cli.benchmark measures it. Prometheus computes the scaling efficiency "
        "from it.",
        at_least=0,
        may_change=True,
        theme=_PROMETHEUS,
    )

    tracker: TrackerKind = text_setting(
        TrackerKind.NONE,
        "Experiment tracker that gets settings, curves and files of the job. mlflow and wandb need the extras of these "
        "names. tensorboard-hparams: TensorBoard's tab HPARAMS.",
        may_change=True,
        theme=_TRACKER,
        later=True,
    )
    tracker_uri: str = text_setting(
        "",
        "Where the tracker keeps its runs: for mlflow a server, a folder or sqlite:///FILE; for wandb a server. "
        "Default: what MLFLOW_TRACKING_URI says, or mlflow.db beside --output_dir; for wandb its own.",
        check=_check_tracker_uri,
        may_change=True,
        theme=_TRACKER,
        later=True,
    )
    tracker_experiment: str = text_setting(
        "din_dist", "MLflow's experiment, or the project of wandb.", may_change=True, theme=_TRACKER, later=True
    )
    tracker_parent: str = text_setting(
        "",
        "Id of the run that this one belongs to: a parent in MLflow, a group in wandb. tune gives it to its trials. "
        "Default: none.",
        may_change=True,
        theme=_TRACKER,
        later=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.metrics_tls_certificate) == bool(self.metrics_tls_key),
            "needs --metrics_tls_key, and the other way round",
            "metrics_tls_certificate",
            self.metrics_tls_certificate,
            "Give both, or neither.",
        )
        require(
            bool(self.pushgateway) or not self.pushgateway_password_file,
            "belongs to --pushgateway",
            "pushgateway_password_file",
            self.pushgateway_password_file,
            "Add --pushgateway, or drop it.",
        )
