"""How this machine does, as MLflow's system metrics have it: processor, memory, disk, network, and GPUs where pynvml finds any."""

from typing import Any

from mlflow.system_metrics import system_metrics_monitor


class Machine:
    """Measures with MLflow's own monitor, without its thread: that ends for good when a server is away for a moment."""

    def __init__(self, run_id: str, uri: str) -> None:
        """Begin to count; a figure is of the time since the one before."""
        module: Any = system_metrics_monitor
        self._monitor = module.SystemMetricsMonitor(run_id, tracking_uri=uri)
        self.figures()

    def figures(self) -> dict[str, float]:
        """Return what there is to say now, under MLflow's names."""
        self._monitor.collect_metrics()
        found = {
            f"system/{name}": float(value)
            for name, value in self._monitor.aggregate_metrics().items()
        }
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        return found
