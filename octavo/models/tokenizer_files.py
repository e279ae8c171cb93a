"""`read_tokenizer`: a model's tokenizer without its weights, and without torch: the server's process needs no more."""

from pathlib import Path

from octavo.models.config import end_ids, eos_ids, read_json
from octavo.models.gguf_file import read_gguf
from octavo.models.gguf_tokenizer import tokenizer_from_gguf
from octavo.models.tokenizer import Tokenizer


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Of a .gguf file, or of a directory with config.json and tokenizer.json. Raises `ValueError` for what is missing
    or damaged."""
    path = Path(path)
    if not path.is_dir():
        return tokenizer_from_gguf(read_gguf(path).metadata)
    config, generation = read_json(path / "config.json"), path / "generation_config.json"
    text = config.get("text_config") or {}  # of models that also see
    of_config = eos_ids(text.get("eos_token_id", config.get("eos_token_id")))
    return Tokenizer.from_directory(path, end_ids(read_json(generation) if generation.is_file() else {}, of_config))
