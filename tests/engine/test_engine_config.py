"""The engine's numbers: derived sizes, and contradictions refused by name."""

from typing import Any

import pytest

from octavo.engine.config import EngineConfig

SIZES: dict[str, Any] = {"num_blocks": 10, "max_model_len": 100, "kv_bytes_per_token": 24, "block_size": 7}


def test_sizes() -> None:
    config = EngineConfig(**SIZES)
    assert (config.block_bytes, config.cache_tokens, config.cache_bytes) == (168, 70, 1680)
    assert config.max_sequence_len == 71, "the last token of a sequence is never stored"


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in (*SIZES, "max_num_seqs") for value in (0, -1, 1.0, True, "1")]
    + [("max_num_batched_tokens", 255), ("enable_prefix_caching", 1), ("scheduling_policy", "lifo")],
)
def test_refuses_and_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        EngineConfig(**{**SIZES, field: value})
