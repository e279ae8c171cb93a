"""Traces as a collector gets them, by OTLP over HTTP."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from octavo.server import tracing


class Collector(HTTPServer):
    """Keeps what it is sent: (span, attributes of its process)."""

    def __init__(self):
        self.spans = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in sent.resource_spans:
            of_process = plain(resource.resource.attributes)
            self.server.spans += [(span, of_process) for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def plain(attributes):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}


@pytest.fixture
def collector():
    here = Collector()
    thread = threading.Thread(target=here.serve_forever)
    thread.start()
    yield here
    here.shutdown()
    thread.join()
    here.server_close()


def test_each_request_is_a_span_of_its_clients_trace(serve, collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds
    server = serve(otlp_traces_endpoint=collector.url)
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "X-Request-Id": "mine"}
    body = {"prompt": [116, 104, 101, 110, 115], "max_tokens": 3, "ignore_eos": True, "stream": True}
    answer = server.post("/v1/completions", body, headers=headers)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert server.get("/health").status_code == 200
    assert server.get("/v1/models").status_code == 200
    server.wait(lambda: len(collector.spans) >= 2, "the spans have come")
    time.sleep(0.2)
    (span, process), (models, _) = collector.spans
    told = plain(span.attributes)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace, "00f067aa0ba902b7")
    assert (process["service.name"], told["octavo.request_id"]) == ("octavo", "mine")
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (5, 3)
    assert models.name.endswith("/v1/models")
    assert span.end_time_unix_nano > span.start_time_unix_nano


def test_without_opentelemetry_the_flag_says_what_to_install(serve, monkeypatch):
    monkeypatch.setattr(tracing, "_installed", lambda module: False)
    with pytest.raises(ValueError, match=r"otlp_traces_endpoint: .* pip install 'octavo\[otel\]'"):
        serve(otlp_traces_endpoint="http://127.0.0.1:1/v1/traces")
