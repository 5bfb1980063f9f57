"""The running build of keyproxy, as a metric."""

from __future__ import annotations

import platform

from prometheus_client.core import InfoMetricFamily, Metric

from keyproxy import __version__
from keyproxy.metrics import recorder


def build_info() -> Metric:
    """The version, the Python version, and whether the build is compiled."""
    kind = "pure" if recorder.__file__.endswith(".py") else "compiled"
    build = InfoMetricFamily("keyproxy_build", "The running build.")
    build.add_metric([], {"version": __version__, "python": platform.python_version(), "build": kind})
    return build
