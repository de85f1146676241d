"""Our metrics once more under the names of the reference server, with the model as a label.

Dashboards made for it go on working. Made only when somebody fetches the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_PREFIX = "fastdeploy:"


class ReferenceNames:
    """A collector: some names stand for our metrics, some for functions that are asked."""

    def __init__(self, model: str) -> None:
        self._labels = {"model_name": model}
        self._copies: list[tuple[str, Any, Callable[[dict[str, str]], bool]]] = []
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []
        self._counters: list[tuple[str, str, Callable[[], float]]] = []
        self._infos: list[tuple[str, str, dict[str, str]]] = []

    def copy(
        self, name: str, source: Any, only: Callable[[dict[str, str]], bool] = lambda labels: True
    ) -> None:
        """`name` is without prefix and without _total; samples whose labels `only` refuses are left out.

        Counters lose their own labels and become one sum.
        """
        self._copies.append((name, source, only))

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        self._gauges.append((name, help, read))

    def counter(self, name: str, help: str, read: Callable[[], float]) -> None:
        self._counters.append((name, help, read))

    def info(self, name: str, help: str, labels: dict[str, str]) -> None:
        """A gauge that is 1; its labels are the message."""
        self._infos.append((name, help, labels))

    def collect(self) -> Iterator[Metric]:
        for name, source, only in self._copies:
            for family in source.collect():
                yield self._renamed(_PREFIX + name, family, only)
        for name, help, read in self._gauges:
            family = GaugeMetricFamily(_PREFIX + name, help, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), read())
            yield family
        for name, help, read in self._counters:
            counter = CounterMetricFamily(_PREFIX + name, help, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), read())
            yield counter
        for name, help, own in self._infos:
            labels = own | self._labels
            family = GaugeMetricFamily(_PREFIX + name, help, labels=list(labels))
            family.add_metric(list(labels.values()), 1)
            yield family

    def _renamed(self, name: str, family: Metric, only: Callable[[dict[str, str]], bool]) -> Metric:
        renamed = Metric(name, family.documentation, family.type)
        if family.type == "counter":
            value = sum(sample.value for sample in family.samples if only(sample.labels))
            renamed.add_sample(f"{name}_total", self._labels, value)
            return renamed
        for sample in family.samples:
            suffix = sample.name.removeprefix(family.name)
            renamed.add_sample(name + suffix, {**sample.labels, **self._labels}, sample.value)
        return renamed
