"""What the gateway counts, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dsmoe_ray.serving.admission import Admission

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class GatewayMetrics:
    """Counters of one gateway; others may add their own to ``registry``."""

    def __init__(self, admission: Admission) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dsmoe_gateway_requests",
            "Calls that were answered, by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self.gone = Counter(
            "dsmoe_gateway_clients_gone", "Calls whose client left before the answer was whole.", registry=registry
        )
        self.failed_streams = Counter(
            "dsmoe_gateway_failed_streams", "Streams that ended with an error event.", registry=registry
        )
        self.prompt_tokens = Counter("dsmoe_gateway_prompt_tokens", "Tokens of prompts taken on.", registry=registry)
        self.generated_tokens = Counter(
            "dsmoe_gateway_generated_tokens", "Tokens that routers generated for calls.", registry=registry
        )
        self.time_to_first_token = Histogram(
            "dsmoe_gateway_time_to_first_token_seconds",
            "From a call's arrival to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "dsmoe_gateway_generation_seconds",
            "From a generating call's arrival to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        sequences = Gauge("dsmoe_gateway_sequences", "Texts under way.", registry=registry)
        sequences.set_function(lambda: admission.num_sequences)
        tokens = Gauge("dsmoe_gateway_queued_tokens", "Prompt and wanted tokens under way.", registry=registry)
        tokens.set_function(lambda: admission.num_tokens)

    def to_text(self) -> bytes:
        """Return all counters in the text format."""
        return generate_latest(self.registry)
