"""What the operator may say of the server: addresses, keys and limits. The engine's own options are EngineOptions."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """host, port: where it listens; port 0 takes a free one.
    api_keys: any of them opens the API; none leaves it open to whoever reaches the port.
    served_model_name: names that clients may ask for, the first being ours; the model's own by default.
    root_path: the prefix that a proxy in front of us takes away.
    ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs: for HTTPS; with ca_certs, clients need a certificate.
    allowed_origins: pages of these origins may call the API (CORS); none by default.
    max_connections: open at a time; those beyond get 503 and are closed.
    max_queue: sequences that may wait beyond those that a step can hold, before 429.
    max_body: bytes of a request's body. max_prompts: prompts in one request.
    header_timeout, body_timeout: seconds for a client to send its head, then its body. idle_timeout: seconds that a
    connection may rest between requests. send_timeout: seconds that a client may leave a stream unread.
    request_timeout: seconds for a whole answer. shutdown_timeout: seconds that answers may take to end after a signal.
    stall_timeout: seconds without a step after which a busy engine counts as unhealthy.
    otlp_traces_endpoint: URL of an OpenTelemetry collector that gets a trace of each request; none by default.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_name: tuple[str, ...] = ()
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None
    allowed_origins: tuple[str, ...] = ()
    max_connections: int = 8192
    max_queue: int = 1024
    max_body: int = 8 << 20
    max_prompts: int = 256
    header_timeout: float = 20.0
    body_timeout: float = 30.0
    idle_timeout: float = 75.0
    send_timeout: float = 60.0
    request_timeout: float = 3600.0
    shutdown_timeout: float = 30.0
    stall_timeout: float = 120.0
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: expected 0 to 65535, got {self.port}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_timeout") and not value > 0:
                raise ValueError(f"{field.name}: expected seconds above 0, got {value}")
        for name, least in (("max_connections", 1), ("max_queue", 0), ("max_body", 1024), ("max_prompts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ValueError("api_key: expected at least 8 printable ASCII characters")
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"root_path: expected it to begin with /, got {self.root_path!r}")
        if self.otlp_traces_endpoint and not self.otlp_traces_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint: expected an http(s) URL, got {self.otlp_traces_endpoint!r}")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile: expected ssl_certfile beside it")
