"""What a job exports, from the prometheus_metrics itself."""

from __future__ import annotations

import functools
import tempfile

from din_dist.config import Config
from din_dist.distributed.runtime import Runtime
from din_dist.telemetry.prometheus import PrometheusMetrics

_SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "info": ["_info"]}
# Of machines with a GPU, where no test runs.
_GPU_METRICS = {"din_dist_gpu_memory_bytes"}


@functools.cache
def exported_metrics() -> frozenset[str]:
    """Names of all time series of a rank, the process' own included."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config().replace(output_dir=folder, metrics_port=-1, baseline_examples_per_second=1.0)
        families = list(PrometheusMetrics(config, Runtime()).registry.collect())
    names = {family.name + suffix for family in families for suffix in _SUFFIXES.get(family.type, [""])}
    return frozenset(names | _GPU_METRICS)
