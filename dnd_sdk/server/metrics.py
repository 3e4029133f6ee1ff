"""Counters and times of one server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dnd_sdk.session import Completion, DnD

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """A registry of its own, so that two servers in one process do not add up."""

    def __init__(self, dnd: DnD) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("dnd_http_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "dnd_http_request_seconds", "Time to the last byte", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.first_token = Histogram(
            "dnd_first_token_seconds", "Time to the first piece of text", buckets=_SECONDS, registry=self.registry
        )
        self.answers = Counter("dnd_answers", "Answers by who gave them", ["decision"], registry=self.registry)
        self.adaptations = Counter("dnd_adaptations", "Adaptations by decision", ["decision"], registry=self.registry)
        self.tokens = Counter("dnd_tokens", "Tokens read and written", ["kind"], registry=self.registry)
        for name, about, value in (
            ("dnd_running", "Requests that are being answered", lambda: dnd.engine.n_running),
            ("dnd_waiting", "Requests that wait", lambda: dnd.engine.n_waiting),
            ("dnd_resident_adapters", "Adapters in slots", lambda: len(dnd.engine.resident())),
        ):
            Gauge(name, about, registry=self.registry).set_function(value)

    def answered(self, answer: Completion) -> None:
        """Count one answer."""
        self.answers.labels(answer.decision).inc()
        self.tokens.labels("prompt").inc(answer.usage["prompt_tokens"])
        self.tokens.labels("completion").inc(answer.usage["completion_tokens"])

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)
