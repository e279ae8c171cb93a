"""docs/serving.md names what there is: every flag, every endpoint, every metric, and nothing else."""

import argparse
import re
from pathlib import Path

import octavo.cli
from octavo.server.app import ENDPOINTS
from octavo.server.engine_client import EngineClient
from octavo.server.metrics import Metrics
from octavo.server.protocol import SamplingFields

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def serve_parser() -> argparse.ArgumentParser:
    (commands,) = (action for action in octavo.cli.build_parser()._actions if action.dest == "command")
    return commands.choices["serve"]


def test_every_flag_is_told():
    flags = {option for action in serve_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert set(re.findall(r"`(--[\w-]+)`", DOCUMENT.split("## Flags")[1].split("## How")[0])) == flags


def test_defaults_are_those_of_the_settings():
    from octavo.server.settings import ServerSettings

    rows = re.findall(r"^\| `--([\w-]+)` \| .*; ([\w.]+)(?:[;.].*)? \|$", DOCUMENT, re.MULTILINE)
    told = {name.replace("-", "_"): value for name, value in rows}
    settings = ServerSettings()
    for name in (
        "host",
        "max_connections",
        "max_queue",
        "max_prompts",
        "idle_timeout",
        "send_timeout",
        "request_timeout",
        "stall_timeout",
    ):
        assert told[name].rstrip(".") == f"{getattr(settings, name)}".removesuffix(".0"), name
    assert settings.max_body == octavo.cli.memory_size(told["max_body"])
    assert "(20)" in DOCUMENT
    assert "(30)" in DOCUMENT
    assert (settings.header_timeout, settings.body_timeout) == (20, 30)


def test_every_endpoint_is_told():
    rows = set(re.findall(r"^\| `(GET|POST) (/\S*)` \| (open\.)?", DOCUMENT, re.MULTILINE))
    assert rows == {(e.method, e.path, "open." if e.open else "") for e in ENDPOINTS} | {("GET", "/", "open.")}


def test_every_field_beyond_openais_is_told():
    theirs = {"model", "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop"}
    theirs |= {"logit_bias", "max_tokens", "stream", "stream_options"}
    fields = DOCUMENT.split("### Fields")[1].split("### Errors")[0]
    assert set(SamplingFields.__struct_fields__) - theirs <= set(re.findall(r"`(\w+)`", fields))


def test_every_metric_is_told():
    names = {metric.name for metric in Metrics(EngineClient({}), "m").registry.collect()}
    told = {name.removesuffix("_total") for name in re.findall(r"`((?:vllm|octavo):\w+)`", DOCUMENT)}
    assert told == names
