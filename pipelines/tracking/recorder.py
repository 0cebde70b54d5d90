"""One training's run in MLflow: found again or made, told rows of metrics.jsonl and how the machine does, and ended.

Nothing is lost by a server that is away: what it did not take is offered again, and what it is told twice stays one.
"""

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Param, Run, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipelines.paths import tracking_uri
from pipelines.runtime.stage import Stage
from pipelines.tracking import logged
from pipelines.tracking.machine import Machine
from pipelines.tracking.runs import (
    TRAINING_TAG,
    Point,
    configure_mlflow_client,
    experiment_id,
    log_points,
    make_store,
    reason_of,
    run_of,
)

KIND_TAG, STEP_TAG = "lora.kind", "lora.training_step"
KEPT = 10_000
"""Rows, and samples, that wait for a server; of more the oldest are let go, and the comparison's own runs have them in the end."""


class Recorder:
    """What one training has to tell."""

    def __init__(self, stage: Stage, experiment: str, began: int) -> None:
        """Ask no server yet.

        Args:
            stage: the training's.
            experiment: name of MLflow's experiment.
            began: milliseconds since 1970.
        """
        configure_mlflow_client()
        self._stage, self._experiment, self._began = stage, experiment, began
        self._rows: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._samples: deque[Point] = deque(maxlen=KEPT)
        self._machine: Machine | None = None
        self._run: Run | None = None
        self._step = 0

    def take(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keep rows until they are sent."""
        self._rows.extend(rows)

    def sample(self, now: int) -> None:
        """Keep how the machine does, once the run is found.

        Args:
            now: milliseconds since 1970; the step is that of the last row.
        """
        if self._machine is None:
            return
        step = self._rows[-1]["step"] if self._rows else self._step
        with suppress(psutil.Error, AttributeError):  # a machine may have no network to tell of
            self._samples += [
                (name, value, now, step) for name, value in self._machine.figures().items()
            ]

    def send(self, status: str | None = None) -> str | None:
        """Send all that waits, and end the run with a status where one is given; return why that failed, None where it did not.

        The run is opened with the first row, which says whether the training begins anew or goes on.
        """
        if self._run is None and not self._rows and status is None:
            return None
        try:
            uri = tracking_uri(self._stage.root)
            make_store(uri)
            client = MlflowClient(uri, uri)
            run_id = self._opened(client, uri)
            self._tell(client, run_id)
            if status is not None:
                client.set_terminated(run_id, status)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            return reason_of(error)
        return None

    def _tell(self, client: MlflowClient, run_id: str) -> None:
        """Send rows that are newer than the last that is logged: one that goes on from a checkpoint takes a few steps again."""
        rows = [row for row in self._rows if row["step"] > self._step]
        log_points(client, run_id, [point for row in rows for point in logged.points(row)])
        if rows:
            client.set_tag(run_id, STEP_TAG, str(rows[-1]["step"]))
            self._step = rows[-1]["step"]
        self._rows.clear()
        log_points(client, run_id, self._samples)
        self._samples.clear()

    def _opened(self, client: MlflowClient, uri: str) -> str:
        if self._run is None:
            experiment = experiment_id(client, self._experiment, self._stage.root)
            tags = {TRAINING_TAG: self._stage.key}
            name = f"{self._stage.label} training"
            run = run_of(client, experiment, name, tags, self._began)
            if STEP_TAG in run.data.tags and self._begins_anew():
                if run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "KILLED")
                run = client.create_run(
                    experiment, start_time=self._began, tags=tags, run_name=name
                )
            run_id = str(run.info.run_id)
            if run.info.status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
            params = (
                []
                if run.data.params
                else [Param(name, value) for name, value in parameters(self._stage).items()]
            )
            client.log_batch(run_id, params=params, tags=[RunTag(KIND_TAG, "training")])
            self._step = int(run.data.tags.get(STEP_TAG, 0))
            self._machine = Machine(run_id, uri)
            self._run = run
        return str(self._run.info.run_id)

    def _begins_anew(self) -> bool:
        """Tell whether the first step was taken since; one that goes on shows its earlier rows again."""
        first = self._rows[0] if self._rows else None
        return first is not None and first["step"] == 1 and 1000 * first["time"] >= self._began


def parameters(stage: Stage) -> dict[str, str]:
    """Return the few parameters of a training, under the names that a comparison's runs have."""
    inputs = stage.inputs
    known = {
        "method": inputs["method"],
        "learning_rate": f"{inputs['learning_rate']:g}",
        "quantization": inputs["quantization"],
    }
    adapter = (
        {"lora.r": str(inputs["rank"]), "lora.alpha": f"{inputs['lora']['alpha']:g}"}
        if "rank" in inputs
        else {}
    )
    return {**known, **adapter}
