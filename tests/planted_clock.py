"""A clock in the place of the module `time`, on which nothing takes time but sleep, or what a test makes it take."""

from __future__ import annotations


class PlantedClock:
    """Moves by sleeping alone, and where a test moves `now_s`."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s, self.slept_s = now_s, list[float]()

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds
