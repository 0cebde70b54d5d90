"""The options of `lora deploy`, and the schedules and events that they name. Imports no Prefect."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any
from zoneinfo import available_timezones

import typer

from pipelines.errors import PipelineError

NOTIFY = "LORA_NOTIFY_URL"
"""Environment variable with the address of an incoming webhook of Slack, or of one that takes the
same JSON."""
DATA_SLUG = "data"
DATA_CHECK_SECONDS = 3600
"""Time between checks of the data if `--on-data` is given without a schedule."""
DEBOUNCE_SECONDS = 60
SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
NOT_IN_POOL = re.compile(r"[/%&<>]")
"""Characters that Prefect refuses in the name of a work pool."""
EVENT_DATA = "{{ event.payload.data }}"
"""Rendered by Prefect's server when an event arrives; empty if its payload has no `data`."""


@dataclass(frozen=True)
class RequestedSchedule:
    """A schedule that the command names; either `cron` or `interval_seconds` is given."""

    slug: str
    """Identifies the schedule within its deployment."""
    cron: str | None = None
    timezone: str | None = None
    """Of `cron`; UTC if None."""
    interval_seconds: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    """Override the deployment's parameters."""


@dataclass(frozen=True)
class RequestedEvent:
    """An event that starts a run."""

    name: str
    debounce_seconds: int
    """Further events of the same resource in this time start no other run."""
    parameters: dict[str, Any]
    """Override the deployment's parameters; templates are rendered with the event."""


@dataclass(frozen=True)
class Requested:
    """Everything that one `lora deploy` requests; what it does not name stays as it is."""

    schedules: tuple[RequestedSchedule, ...] = ()
    events: tuple[RequestedEvent, ...] = ()
    removes_schedules: bool = False
    """Remove all other schedules."""
    removes_events: bool = False
    """Remove all other events."""
    pool: str = ""
    """Work pool; empty for the deployment's current one."""
    notify: str | None = None
    """Address for messages; None keeps it, and an empty one removes it."""


@dataclass(frozen=True)
class DeployOptions:
    """What starts a run, and where; without any option, a person starts it."""

    cron: Annotated[str, typer.Option(help='When to run, such as "0 2 * * *".')] = ""
    timezone: Annotated[
        str, typer.Option(help="Time zone of --cron, such as Europe/Berlin; UTC by default.")
    ] = ""
    interval: Annotated[int | None, typer.Option(help="Seconds between runs.", min=1)] = None
    schedule: Annotated[
        str,
        typer.Option(
            help="Name of this schedule, which replaces one with that name; cron or interval by "
            "default."
        ),
    ] = ""
    rank: Annotated[
        list[int] | None,
        typer.Option(help="Train this rank when the schedule or event is due; may be repeated."),
    ] = None
    on_event: Annotated[
        list[str] | None,
        typer.Option(help="Name of a Prefect event that starts a run; may be repeated."),
    ] = None
    debounce: Annotated[
        int | None,
        typer.Option(
            help="Seconds from an event to its run, in which further events start no other; 60 by "
            "default.",
            min=0,
        ),
    ] = None
    on_data: Annotated[
        bool,
        typer.Option(
            "--on-data",
            help="Run only if recipe or data changed since the last run; checks every hour unless "
            "a schedule or an event is given.",
        ),
    ] = False
    no_schedules: Annotated[
        bool, typer.Option("--no-schedules", help="Remove the schedules not named here.")
    ] = False
    no_events: Annotated[
        bool, typer.Option("--no-events", help="Remove the events not named here.")
    ] = False
    pool: Annotated[
        str,
        typer.Option(help="Work pool that a worker on the GPU host serves; lora for a new one."),
    ] = ""

    notify: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Webhook of Slack or the like that gets a message about a new champion, a "
            "proposed version, a run without one, and a failed run. Prefect's server keeps it "
            'encrypted; "" removes it.',
        ),
    ] = None

    def requested(self) -> Requested:
        """Return what the options request.

        Raises:
            PipelineError: options contradict each other, or one has no effect.
        """
        self._check()
        events = tuple(self._event(name) for name in dict.fromkeys(self.on_event or []))
        return Requested(
            schedules=tuple(self._schedules()),
            events=events,
            removes_schedules=self.no_schedules,
            removes_events=self.no_events,
            pool=self.pool,
            notify=self.notify,
        )

    def _schedules(self) -> list[RequestedSchedule]:
        parameters = self._parameters()
        found = []
        if self.cron:
            slug = self.schedule or "cron"
            zone = self.timezone or None
            found.append(RequestedSchedule(slug, self.cron, zone, parameters=parameters))
        interval = self.interval
        slug = self.schedule or "interval"
        if self._checks_data_only:
            interval = DATA_CHECK_SECONDS
            slug = self.schedule or DATA_SLUG
        if interval:
            found.append(RequestedSchedule(slug, interval_seconds=interval, parameters=parameters))
        return found

    def _event(self, name: str) -> RequestedEvent:
        seconds = DEBOUNCE_SECONDS if self.debounce is None else self.debounce
        parameters = {"data": EVENT_DATA, **self._parameters()}
        return RequestedEvent(name, seconds, parameters)

    def _parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        if self.rank:
            parameters["ranks"] = list(self.rank)
        if self.on_data:
            parameters["only_if_changed"] = True
        return parameters

    @property
    def _checks_data_only(self) -> bool:
        return self.on_data and not (self.cron or self.interval or self.on_event)

    @property
    def _has_schedule(self) -> bool:
        return bool(self.cron or self.interval or self._checks_data_only)

    def _check(self) -> None:
        self._check_schedule()
        if self.debounce is not None and not self.on_event:
            raise PipelineError(
                f"--debounce {self.debounce} has no effect without --on-event; give both, or "
                "neither"
            )
        if self.rank and not (self._has_schedule or self.on_event):
            raise PipelineError(
                f"--rank {self.rank[0]} belongs to a schedule or an event; add --cron, --interval "
                "or --on-event, or set lora.ranks in the recipe"
            )
        if self.notify:
            check_webhook(self.notify)
        if NOT_IN_POOL.search(self.pool):
            raise PipelineError(
                f"work pool {self.pool!r} contains one of / % & < >; choose another name, such as "
                "gpu-host"
            )

    def _check_schedule(self) -> None:
        if self.timezone and not self.cron:
            raise PipelineError(
                f"--timezone {self.timezone} has no effect without --cron; give both, or neither"
            )
        if self.timezone and self.timezone not in available_timezones():
            raise PipelineError(
                f"time zone {self.timezone!r} is unknown; give a name of the IANA database, such "
                "as Europe/Berlin"
            )
        if self.schedule and not SLUG.fullmatch(self.schedule):
            raise PipelineError(
                f"schedule {self.schedule!r} is not a name of letters, digits, '.', '_' and '-'; "
                "choose another, such as nightly"
            )
        if self.schedule and not self._has_schedule:
            raise PipelineError(
                f"--schedule {self.schedule} names no time; add --cron or --interval, or --on-data "
                "without --on-event"
            )
        if self.schedule and self.cron and self.interval:
            raise PipelineError(
                f"--schedule {self.schedule} would name two schedules; deploy --cron and "
                "--interval one after the other"
            )


def check_webhook(url: str) -> None:
    """Raise PipelineError for an address that no message can be posted to; it is not repeated."""
    if not re.match(r"https?://[^/\s]+", url):
        raise PipelineError(
            "the address of --notify must begin with https:// or http:// and a host; copy it from "
            "the settings of the webhook"
        )
