"""What the server did, for Prometheus and the log."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .work import Work


STAGES = ("fetch", "decode", "prepare", "queue", "encode", "first_token", "answer")


class Metrics:
    """Counts of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter("holitom_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.in_progress = Gauge("holitom_requests_in_progress", "Requests not answered yet.", registry=self.registry)
        self.stage_seconds = Histogram(
            "holitom_stage_seconds", "Seconds that each stage of a request took.", ["stage"], registry=self.registry
        )
        self.visual_tokens = Counter(
            "holitom_visual_tokens",
            "Video tokens before compression, after stages 1 and 2 (outer) and after stage 3 (inner).",
            ["point"],
            registry=self.registry,
        )
        self.text_tokens = Counter(
            "holitom_tokens", "Tokens of prompts, videos uncompressed, and of answers.", ["of"], registry=self.registry
        )
        # There from the start: a rate needs a value before the first request.
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for point in ("before", "outer", "inner"):
            self.visual_tokens.labels(point)

    def add(self, work: Work, path: str, status: int) -> None:
        """Counts a request that is over."""
        self.requests.labels(path, str(status)).inc()
        for stage, seconds in work.seconds.items():
            self.stage_seconds.labels(stage).observe(seconds)
        for name, number in work.tokens.items():
            (self.text_tokens if name in ("prompt", "answer") else self.visual_tokens).labels(name).inc(number)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
