"""The MLflow run of one training: looked up or created, filled with metrics, and ended.

No data is lost while a server is away: what it did not accept is sent again, and MLflow stores a
point that is sent twice once.
"""

from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import psutil
from mlflow import MlflowClient
from mlflow.entities import Param, Run, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipelines.console import Row
from pipelines.errors import one_line
from pipelines.paths import tracking_uri
from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.runtime.interfaces.results import TrainResult
from pipelines.runtime.stage import Stage
from pipelines.tracking.logged import Parameters
from pipelines.tracking.runs import (
    KIND_TAG,
    TRAINING_TAG,
    configure_mlflow_client,
    ensure_store,
    experiment_id,
    find_or_create_run,
    log_points,
)
from pipelines.tracking.step_metrics import MetricPoint, StepMetrics
from pipelines.tracking.system_metrics import SystemMetrics

STEP_TAG = "lora.training_step"
MAX_WAITING = 10_000
"""Rows, and samples, that wait for a server. The oldest are dropped beyond that.

The comparison's own runs get all of them in the end.
"""


class Recorder:
    """Sends the metrics of one training to its MLflow run."""

    def __init__(
        self, stage: Stage[TrainInputs, TrainResult], experiment: str, started: int
    ) -> None:
        """Configure the client; no server is contacted yet.

        Args:
            stage: the stage of the training.
            experiment: name of the MLflow experiment.
            started: milliseconds since 1970.
        """
        configure_mlflow_client()
        self._stage = stage
        self._experiment = experiment
        self._started = started
        self._rows: deque[StepMetrics] = deque(maxlen=MAX_WAITING)
        self._samples: deque[MetricPoint] = deque(maxlen=MAX_WAITING)
        self._system_metrics: SystemMetrics | None = None
        self._run: Run | None = None
        self._step = 0

    def take(self, rows: Iterable[Row]) -> None:
        """Keep rows until they are sent."""
        self._rows.extend(StepMetrics.model_validate(row) for row in rows)

    def sample(self, now: int) -> None:
        """Keep the current system metrics, once the run is open.

        Args:
            now: milliseconds since 1970; the step is that of the last row.
        """
        if self._system_metrics is None:
            return
        step = self._step
        if self._rows:
            step = self._rows[-1].step
        with suppress(psutil.Error, AttributeError):  # a machine may have no network counters
            for name, value in self._system_metrics.collect().items():
                self._samples.append((name, value, now, step))

    def send(self, status: str | None = None) -> str | None:
        """Send everything that waits, and end the run if a status is given.

        The run is opened with the first row, which shows whether the training restarts or resumes.

        Returns:
            Why sending failed; None if it succeeded.
        """
        if self._run is None and not self._rows and status is None:
            return None
        try:
            uri = tracking_uri(self._stage.root)
            ensure_store(uri)
            client = MlflowClient(uri, uri)
            run_id = self._open_run(client, uri)
            self._send_waiting(client, run_id)
            if status is not None:
                client.set_terminated(run_id, status)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            return one_line(error, with_type=False, limit=300)
        return None

    def _send_waiting(self, client: MlflowClient, run_id: str) -> None:
        """Send samples, and the rows after the last logged step.

        A training that resumes from a checkpoint repeats a few steps.
        """
        rows = [row for row in self._rows if row.step > self._step]
        points: list[MetricPoint] = []
        for row in rows:
            points += row.points()
        log_points(client, run_id, points)
        if rows:
            step = rows[-1].step
            client.set_tag(run_id, STEP_TAG, str(step))
            self._step = step
        self._rows.clear()
        log_points(client, run_id, self._samples)
        self._samples.clear()

    def _open_run(self, client: MlflowClient, uri: str) -> str:
        """Return the id of the training's run; find or create it on the first call."""
        if self._run is not None:
            return str(self._run.info.run_id)
        run = self._find_or_create_run(client)
        run_id = str(run.info.run_id)
        if run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        params = []
        if not run.data.params:
            for name, value in parameters(self._stage.inputs).by_name().items():
                params.append(Param(name, value))
        client.log_batch(run_id, params=params, tags=[RunTag(KIND_TAG, "training")])
        self._step = int(run.data.tags.get(STEP_TAG, 0))
        self._system_metrics = SystemMetrics(run_id, uri)
        self._run = run
        return run_id

    def _find_or_create_run(self, client: MlflowClient) -> Run:
        experiment = experiment_id(client, self._experiment, self._stage.root)
        tags = {TRAINING_TAG: self._stage.key}
        name = f"{self._stage.label} training"
        run = find_or_create_run(client, experiment, name, tags, self._started)
        if STEP_TAG not in run.data.tags or not self._restarts():
            return run
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")
        return client.create_run(experiment, start_time=self._started, tags=tags, run_name=name)

    def _restarts(self) -> bool:
        """Return whether the training starts over from step 1.

        A resumed training first repeats its earlier rows, which are older than this process.
        """
        if not self._rows:
            return False
        first = self._rows[0]
        is_new = 1000 * first.time >= self._started
        return first.step == 1 and is_new


def parameters(inputs: TrainInputs) -> Parameters:
    """Return the parameters of a training, which are those of its run in a comparison."""
    adapter = inputs.adapter
    if adapter is None:
        return Parameters(inputs.method, inputs.quantization)
    return Parameters(
        inputs.method,
        inputs.quantization,
        inputs.learning_rate,
        rank=adapter.rank,
        alpha=adapter.lora.alpha,
    )
