"""MLflow's system metrics: CPU, memory, disk, network, and GPUs if pynvml finds any."""

from typing import Any

from mlflow.system_metrics import system_metrics_monitor


class SystemMetrics:
    """Uses MLflow's monitor without its thread, which stops for good if a server goes away."""

    def __init__(self, run_id: str, uri: str) -> None:
        """Start counting; each value covers the time since the previous one."""
        module: Any = system_metrics_monitor
        self._monitor = module.SystemMetricsMonitor(run_id, tracking_uri=uri)
        self.collect()

    def collect(self) -> dict[str, float]:
        """Return the current values under MLflow's names."""
        self._monitor.collect_metrics()
        values = {}
        for name, value in self._monitor.aggregate_metrics().items():
            values[f"system/{name}"] = float(value)
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        return values
