"""The GGUF reader agrees with the `gguf` package on sound files and answers anything else with a `ValueError`."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.models import load_model
from octavo.models.gguf_file import read_gguf

MAGIC_AND_VERSION = b"GGUF" + struct.pack("<I", 3)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(tensors: int, keys: int) -> bytes:
    return MAGIC_AND_VERSION + struct.pack("<QQ", tensors, keys)


def tensor_info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def read_bytes(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def test_metadata_and_tensors_equal_those_of_the_gguf_package(tiny_gguf):
    path, _ = tiny_gguf
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {name: entry.contents() for name, entry in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for name, expected in fields.items():
        got = ours.metadata[name]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == expected, name
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        got = ours.tensors[tensor.name]
        assert got.type.name == tensor.tensor_type.name
        assert got.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(got.data.ravel(), tensor.data.view(np.uint8).ravel())


def test_every_scalar_type_and_array(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "types.gguf", "llama")
    for name, value in {
        "uint8": 200,
        "int8": -3,
        "uint16": 60000,
        "int16": -300,
        "uint32": 4 << 29,
        "int32": -5,
    }.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_uint64("uint64", 1 << 63)
    writer.add_int64("int64", -(1 << 62))
    writer.add_float32("float32", 0.5)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_array("strings", ["", "Ġa", "日本"])
    writer.add_array("bools", [True, False])
    writer.add_array("floats", [0.5, -1.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf(tmp_path / "types.gguf").metadata, gguf.GGUFReader(tmp_path / "types.gguf")
    for name, got in ours.items():
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == theirs.fields[name].contents()
    assert ours["bool"] is True


HUGE = 1 << 62
LIES = {
    "empty": (b"", "empty"),
    "other magic": (b"GGML" + bytes(60), "begins with"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
    "too many tensors": (header(HUGE, 0), "claims"),
    "too many keys": (header(0, HUGE), "claims"),
    "keys that are not there": (header(0, 7), "truncated"),
    "tensors that are not there": (header(7, 0), "truncated"),
    "key length": (header(0, 1) + struct.pack("<Q", HUGE), "truncated"),
    "value length": (header(0, 1) + string("k") + struct.pack("<IQ", 8, HUGE), "truncated"),
    "value type": (header(0, 1) + string("k") + struct.pack("<IQ", 99, 0), "unknown value type"),
    "array length": (header(0, 1) + string("k") + struct.pack("<IIQ", 9, 4, HUGE), "truncated"),
    "string array length": (header(0, 1) + string("k") + struct.pack("<IIQ", 9, 8, HUGE), "at most"),
    "string in an array": (header(0, 1) + string("k") + struct.pack("<IIQQQ", 9, 8, 2, HUGE, 0), "past the end"),
    "array of arrays": (header(0, 1) + string("k") + struct.pack("<IIQ", 9, 9, 1), "scalars and strings"),
    "not UTF-8": (header(0, 1) + struct.pack("<Q", 1) + b"\xff" + bytes(8), "UTF-8"),
    "a key twice": (header(0, 2) + 2 * (string("k") + struct.pack("<IB", 0, 1)), "twice"),
    "no dimensions": (header(1, 0) + tensor_info("t", []), "dimensions"),
    "five dimensions": (header(1, 0) + tensor_info("t", [1] * 5), "dimensions"),
    "a dimension of 0": (header(1, 0) + tensor_info("t", [0]), "dimensions"),
    "half a block": (header(1, 0) + tensor_info("t", [33], kind=8), "dimensions"),
    "unknown tensor type": (header(1, 0) + tensor_info("t", [1], kind=4), "known: F32"),
    "huge dimensions": (header(1, 0) + tensor_info("t", [HUGE, HUGE]) + bytes(64), "truncated"),
    "huge offset": (header(1, 0) + tensor_info("t", [1], offset=HUGE) + bytes(64), "truncated"),
    "unaligned offset": (header(1, 0) + tensor_info("t", [1], offset=4) + bytes(128), "aligned"),
    "overlapping tensors": (
        header(2, 0) + tensor_info("a", [9]) + tensor_info("b", [9], offset=32) + bytes(200),
        "overlap",
    ),
    "a tensor twice": (header(2, 0) + tensor_info("a", [8]) + tensor_info("a", [8], offset=32) + bytes(200), "twice"),
    "alignment": (header(0, 1) + string("general.alignment") + struct.pack("<II", 4, 3), "power of two"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_a_value_error_and_costs_no_memory(name, tmp_path):
    content, message = LIES[name]
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        read_bytes(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_any_truncation_of_a_sound_file_is_a_value_error(tiny_gguf, tmp_path):
    content = tiny_gguf[0].read_bytes()
    padding = 32  # after the last tensor, which nobody misses
    for size in (*range(0, 300, 7), *range(300, len(content), len(content) // 60), len(content) - padding):
        with pytest.raises(ValueError, match=r"not a sound GGUF|not a GGUF"):
            read_bytes(tmp_path, content[:size])


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_gives_a_model_or_a_value_error(tiny_gguf, tmp_path, data):
    """Bytes changed anywhere in the header, by whole numbers too: loading succeeds or says what is wrong."""
    content = bytearray(tiny_gguf[0].read_bytes())
    where = st.integers(0, 12_000)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(where)
        new = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=4),
                st.sampled_from([0, 1, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1]).map(lambda n: struct.pack("<Q", n)),
            )
        )
        content[at : at + len(new)] = new
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    try:
        load_model(path, progress=False)
    except ValueError as error:
        assert str(error)  # noqa: PT017


@given(content=st.binary(max_size=400))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_after_the_magic_is_a_value_error(tmp_path, content):
    with pytest.raises(ValueError, match="not a sound GGUF"):
        read_bytes(tmp_path, MAGIC_AND_VERSION + content)
