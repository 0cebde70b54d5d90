"""Phases add up to the time of a step, on a device that works behind the host, too."""

from pipelines.training.phase_timer import PhaseTimer


class Script:
    """A clock that counts its marks as seconds; the device has passed only some of them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reached = 0.0

    def mark(self) -> float:
        self.now += 1
        return self.now

    def seconds(self, start: float, end: float) -> float | None:
        return end - start if end <= self.reached else None


def test_a_phase_inside_another_stops_its_clock() -> None:
    clock = Script()
    timer = PhaseTimer(None, clock)
    with timer.phase("backward"), timer.phase("communication"):
        pass
    with timer.phase("optimizer"):
        pass
    clock.reached = clock.now
    # backward from mark 1 to 2 and from 3 to 4, with communication in between
    assert timer.collect() == {"backward": 2.0, "communication": 1.0, "optimizer": 1.0}
    assert timer.collect() == {}


def test_what_the_device_has_not_reached_is_collected_later() -> None:
    clock = Script()
    timer = PhaseTimer(None, clock)
    with timer.phase("backward"):
        pass
    clock.reached = clock.now
    with timer.phase("optimizer"):
        pass
    assert timer.collect() == {"backward": 1.0}
    clock.reached = clock.now
    assert timer.collect() == {"optimizer": 1.0}


def test_discarded_phases_are_not_collected() -> None:
    clock = Script()
    timer = PhaseTimer(None, clock)
    with timer.phase("check"):
        pass
    timer.discard()
    clock.reached = clock.now
    assert timer.collect() == {}


def test_a_phase_ends_with_an_error_inside_it() -> None:
    clock = Script()
    timer = PhaseTimer(None, clock)
    try:
        with timer.phase("forward"):
            raise ValueError
    except ValueError:
        clock.reached = clock.mark()
    assert timer.collect() == {"forward": 1.0}
