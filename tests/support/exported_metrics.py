"""Lists the Prometheus time series that a training job exports, so that rules and dashboards can be checked."""

from __future__ import annotations

import functools
import tempfile

from din_dist.config import Config
from din_dist.distributed.runtime import Runtime
from din_dist.telemetry.prometheus import PrometheusMetrics

_SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "info": ["_info"]}
# Only machines with a GPU export these, and no test runs there.
_GPU_METRICS = {"din_dist_gpu_memory_bytes"}


@functools.cache
def exported_metrics() -> frozenset[str]:
    """Returns the names of all time series of a rank, those of its process included."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config().replace(output_dir=folder, metrics_port=-1, baseline_examples_per_second=1.0)
        families = list(PrometheusMetrics(config, Runtime()).registry.collect())
    names = {family.name + suffix for family in families for suffix in _SUFFIXES.get(family.type, [""])}
    return frozenset(names | _GPU_METRICS)
