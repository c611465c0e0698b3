"""How busy a node is, under the names that MLflow's page "System metrics" looks for."""

from __future__ import annotations

import logging

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

log = logging.getLogger(__name__)


class SystemMetrics:
    """CPU, memory, disk and network of this node, and its GPUs where their library is installed
    (`nvidia-ml-py`, or `pyrsmi` for AMD's).

    Args:
        node: tells nodes apart in one run: `system/<node>/cpu_utilization_percentage`. MLflow's page can
            choose among nodes that are called node_0, node_1, …
    """

    def __init__(self, node: str | None = None) -> None:
        self._prefix = f"system/{node}/" if node else "system/"
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor(), *_gpu_monitors()]
        self.sample()  # the use of a CPU is that since the last sample

    def sample(self) -> dict[str, float]:
        """What is in use now (percent, megabytes, watts), on average since the last sample for the CPU, and
        the megabytes sent and received since the first one. Takes about a millisecond."""
        figures: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            figures |= {
                self._prefix + name: float(value) for name, value in monitor.aggregate_metrics().items()
            }
            monitor.clear_metrics()
        return figures


def _gpu_monitors() -> list[BaseMetricsMonitor]:
    # a card that does not tell its power, say, is not worth a line at every sample
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    for monitor in (GPUMonitor, ROCMMonitor):
        try:
            return [monitor()]
        except Exception as error:  # noqa: BLE001 - no library, no driver, no GPU, or a library that breaks
            log.debug("no %s: %s", monitor.__name__, error)
    return []
