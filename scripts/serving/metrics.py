"""Counters of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Counters in a registry of their own, so that servers of one process do not share them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"serve_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(
                f"serve_{name}_seconds", text, labels, buckets=SECONDS, registry=registry
            )

        self.requests = counter("requests", "Responses by route and status", "route", "status")
        self.tokens = counter("tokens", "Decoded tokens by mode", "mode")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.reused = counter("reused_tokens", "Prompt tokens whose keys were known")
        self.passes = counter("passes", "Rows times passes by kind", "kind")
        self.fallbacks = counter("fallbacks", "Rows that were decoded again", "how")
        self.deadlines = counter("deadlines", "Rows with a deadline", "kept")
        self.cancelled = counter("cancelled", "Requests whose client left")
        self.tick = seconds("tick", "Passes of all rows together")
        self.request = seconds("request", "Time to the end of a response", "route")
        self.queue = Gauge("serve_queue_rows", "Rows that wait", registry=registry)
        self.slots = Gauge("serve_active_rows", "Rows in slots", registry=registry)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)
