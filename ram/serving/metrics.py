"""What the server counts, in Prometheus' text format (version 0.0.4)."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTED = {
    "requests",
    "finished",
    "by_aligner",
    "prompt_tokens",
    "completion_tokens",
    "rounds",
    "prefix_hits",
}


class Metrics:
    """Requests over HTTP; used by the event loop alone."""

    def __init__(self) -> None:
        self.codes: Counter[tuple[str, int]] = Counter()
        self.seconds: Counter[str] = Counter()
        self.running, self.started = 0, time.time()

    def count(self, route: str, code: int, seconds: float) -> None:
        self.codes[route, code] += 1
        self.seconds[route] += seconds

    def text(self, figures: dict[str, Any]) -> str:
        """All figures; those of the engine by its own names."""
        times = Counter()
        for (route, _), count in self.codes.items():
            times[route] += count
        lines = _family(
            "ram_http_requests_total",
            "counter",
            "requests answered, by route and status code",
            ((f'route="{route}",code="{code}"', n) for (route, code), n in sorted(self.codes.items())),
        )
        lines += _family(
            "ram_http_request_seconds", "summary", "time from request to the end of its answer", ()
        )
        for route, seconds in sorted(self.seconds.items()):
            lines.append(f'ram_http_request_seconds_sum{{route="{route}"}} {seconds:.6f}')
            lines.append(f'ram_http_request_seconds_count{{route="{route}"}} {times[route]}')
        lines += _family("ram_http_running", "gauge", "requests being answered", [("", self.running)])
        for key, value in figures.items():
            if samples := list(_samples(value)):
                counted = key in COUNTED
                name, kind = (
                    f"ram_{key}_total" if counted else f"ram_{key}",
                    "counter" if counted else "gauge",
                )
                lines += _family(name, kind, f"the engine's {key.replace('_', ' ')}", samples)
        memory = [("", psutil.Process().memory_info().rss)]
        lines += _family("process_resident_memory_bytes", "gauge", "memory of this process", memory)
        if torch.cuda.is_available():
            used = [
                (f'device="{i}"', torch.cuda.memory_allocated(i)) for i in range(torch.cuda.device_count())
            ]
            lines += _family("ram_device_memory_bytes", "gauge", "memory that tensors take", used)
        lines += _family("process_start_time_seconds", "gauge", "since 1970", [("", round(self.started, 3))])
        return "\n".join(lines) + "\n"


def _samples(value: Any, labels: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a figure with their labels: kind, and name below it."""
    if isinstance(value, int | float):
        yield labels, float(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _samples(inner, f'{labels},name="{key}"' if labels else f'kind="{key}"')


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        number = int(value) if float(value).is_integer() else value
        lines.append(f"{name}{{{labels}}} {number}" if labels else f"{name} {number}")
    return lines
