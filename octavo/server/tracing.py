"""OpenTelemetry traces of the requests, for those who collect them: `pip install octavo[otel]` and
`octavo serve --otlp-traces-endpoint URL`.

OpenTelemetry's own instrumentation of ASGI makes one span for each request and continues the trace that a client's
`traceparent` names; the SDK collects them in a thread of its own and sends them. Its variables, such as
OTEL_SERVICE_NAME and OTEL_EXPORTER_OTLP_HEADERS, count. Prompts and answers are in no span.
"""

import os
from importlib.util import find_spec

from starlette.types import ASGIApp, Message, Receive, Scope, Send

UNTRACED = "/health$,/metrics$,/v1/stats$"  # asked again and again by machines, and by the page


def traced(app: ASGIApp, endpoint: str) -> ASGIApp:
    """The application with its requests traced to an OTLP/HTTP collector, such as http://127.0.0.1:4318/v1/traces.
    ValueError where OpenTelemetry is not installed."""
    needed = ("opentelemetry.sdk", "opentelemetry.instrumentation.asgi", "opentelemetry.exporter.otlp.proto.http")
    if not all(map(_installed, needed)):
        raise ValueError("otlp_traces_endpoint: OpenTelemetry is not installed; pip install 'octavo[otel]'")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "octavo"}
    provider = TracerProvider(resource=Resource.create(name))  # sends what is left when the process ends
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    middleware: ASGIApp = OpenTelemetryMiddleware(
        _described(app), tracer_provider=provider, excluded_urls=UNTRACED, exclude_spans=["receive", "send"]
    )
    return middleware


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


def _described(app: ASGIApp) -> ASGIApp:
    """Tells a request's span what our log tells of it: `RequestInfo`."""
    from opentelemetry.trace import get_current_span

    async def described(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_described(message: Message) -> None:
            info = scope.get("octavo")
            if info is not None and message["type"] == "http.response.body" and not message.get("more_body"):
                span = get_current_span()  # ends with this message
                span.set_attribute("octavo.request_id", info.request_id)
                if info.prompt_tokens:
                    span.set_attribute("gen_ai.usage.input_tokens", info.prompt_tokens)
                    span.set_attribute("gen_ai.usage.output_tokens", info.output_tokens)
            await send(message)

        await app(scope, receive, send_described)

    return described
