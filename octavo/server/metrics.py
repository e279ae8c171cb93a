"""Prometheus metrics: vLLM's names where the meaning is the same, so that its dashboards read them; ours beside."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from octavo.engine.memory_report import PARTS
from octavo.server.engine_client import EngineClient

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """One registry for one server. The engine's counters are read from `client` when they are scraped."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self.registry.register(_EngineCollector(client, model_name))

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            whole = Histogram(name, text, ["model_name"], registry=self.registry, buckets=tuple(buckets))
            return whole.labels(**self._labels)

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self.registry)

        self.time_to_first_token = histogram("vllm:time_to_first_token_seconds", "Until the first token", SECONDS)
        self.inter_token_latency = histogram("vllm:inter_token_latency_seconds", "Between two tokens", SECONDS)
        self.e2e_latency = histogram("vllm:e2e_request_latency_seconds", "Of a whole request", SECONDS)
        self.queue_time = histogram("vllm:request_queue_time_seconds", "Until the first step", SECONDS)
        self.request_prompt_tokens = histogram("vllm:request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self.request_generation_tokens = histogram("vllm:request_generation_tokens", "Tokens of an answer", TOKENS)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of the requests").labels(**self._labels)
        self._success = counter("vllm:request_success", "Finished sequences", ["finished_reason"])
        self._http = Counter(
            "octavo:http_requests", "HTTP requests", ["method", "path", "status"], registry=self.registry
        )
        self._memory = Gauge("octavo:kv_cache_bytes", "Of the KV cache, by part", ["part"], registry=self.registry)
        self._waste = Gauge(
            "octavo:kv_cache_waste_ratio", "Share of what is held that is waste", registry=self.registry
        )
        self._saved = Gauge("octavo:kv_cache_saved_bytes", "That sharing saves", registry=self.registry)

    def finished(self, reason: str) -> None:
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def answered(self, method: str, path: str, status: int) -> None:
        self._http.labels(method, path, str(status)).inc()

    def show_memory(self, report: dict[str, float]) -> None:
        """Sets the gauges from a MemoryReport as a dict."""
        for part in PARTS:
            self._memory.labels(part).set(report[part])
        self._waste.set(report["waste_fraction"])
        self._saved.set(report["saved"])

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector:
    """The engine's own counts, as of its last step. They begin again at 0 with a new engine, as counters may."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client = client
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        client, now = self._client, self._client.counters
        num_blocks = client.ready.num_blocks if client.ready else 1
        gauges = {
            "vllm:num_requests_running": ("Requests that hold blocks", now.running),
            "vllm:num_requests_waiting": ("Requests that wait for blocks", now.waiting),
            "vllm:kv_cache_usage_perc": ("Share of the blocks that are in use, 0 to 1", now.used_blocks / num_blocks),
            "octavo:engine_up": ("1 while the engine's process is ready", float(client.alive)),
        }
        counters = {
            "vllm:generation_tokens": ("Generated tokens", now.generated_tokens),
            "vllm:num_preemptions": ("Sequences that lost their blocks for a while", now.preemptions),
            "vllm:prefix_cache_queries": ("Tokens looked up in the prefix cache", now.prefix_queried_tokens),
            "vllm:prefix_cache_hits": ("Tokens found in the prefix cache", now.prefix_hit_tokens),
            "octavo:engine_steps": ("Steps of the engine", now.steps),
            "octavo:engine_restarts": ("Times that the engine's process was started again", client.num_restarts),
        }
        for name, (text, value) in gauges.items():
            yield self._labelled(GaugeMetricFamily(name, text, labels=["model_name"]), value)
        for name, (text, value) in counters.items():
            yield self._labelled(CounterMetricFamily(name, text, labels=["model_name"]), value)

    def _labelled(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model_name], value)
        return family
