"""A running sweep's metrics for Prometheus, read from what it has recorded at the moment they are asked for."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from halora.errors import UserError
from halora.records import names
from halora.records.sweep_state import SweepState

_STATES = ("running", "finished", "failed", "stopped", "interrupted", "discarded")


class SweepCollector(Collector):
    """Metrics of one sweep.

    Args:
        sweep: Its name.
        recorded: What it has recorded.
        unsent: Counts the records that MLflow lacks.
    """

    def __init__(self, sweep: str, recorded: SweepState, unsent: Callable[[], int]) -> None:
        self._sweep, self._recorded, self._unsent = sweep, recorded, unsent

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand."""
        points = self._recorded.points()
        states = Counter(point.state for point in points)
        trials = GaugeMetricFamily("halora_trials", "Trials begun, by state.", labels=["sweep", "state"])
        for state in _STATES:
            trials.add_metric([self._sweep, state], states[state])
        yield trials
        steps = CounterMetricFamily("halora_optimizer_steps", "Optimiser steps of all trials.", labels=["sweep"])
        steps.add_metric([self._sweep], sum(self._recorded.last_step(point.number) for point in points))
        yield steps
        reached = self._recorded.sweep_metrics
        for name, text, value in (
            ("front_size", "Trials on the front.", reached.get(names.FRONT_SIZE, 0.0)),
            ("hypervolume", "Of the front, in uJ per token at full accuracy.", reached.get(names.HYPERVOLUME, 0.0)),
            ("unsent_records", "Entries of the event log that MLflow lacks.", self._unsent()),
        ):
            gauge = GaugeMetricFamily(f"halora_{name}", text, labels=["sweep"])
            gauge.add_metric([self._sweep], value)
            yield gauge


@contextmanager
def serving_metrics(port: int | None, collector: Collector) -> Iterator[None]:
    """The metrics at `http://127.0.0.1:PORT/metrics` while the block runs; nowhere without a port.

    Raises:
        UserError: The port is taken.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise UserError(f"--metrics-port {port}: {error.strerror}", "name another port") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
