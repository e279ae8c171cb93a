"""Writes llama_cpp_tokens.json, what llama.cpp makes of awkward texts: the reference of test_tokenizer.py.

For each `tokenizer.ggml.pre` the default model's vocabulary goes into a tiny GGUF file under that name, and llama.cpp's
server tokenizes; a SentencePiece vocabulary is made from the same words. Needs `pip install xllamacpp gguf`:

    python tests/models/make_llama_cpp_tokens.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

TEXTS = [
    "Hello world",
    "The year 1984 and 3.14159, 1,000,000",
    "12345 67 8",
    " leading",
    "trailing  ",
    "tabs\t\tand\n\nnewlines\r\n  indented",
    "don't can't I'll we've I'M WE'LL",
    "emoji 😀👨‍👩‍👧‍👦 flags 🇩🇪",
    "日本語のテキスト、漢字",
    "Привет, мир!",
    "naïve café é",
    "   \n   ",
    "x=1;y=2//z $5 <a+b> ~^|",
    "٣٤٥ ½ ² Ⅳ १२३ ①②",
    "ﬁ ligature \u200b zero width",
    "\x01 control",
    "123abc456 v1.2.3",
    "....!!!???…—–",
    "a" * 50,
    "ᚠᛇᚻ 𝔘𝔫𝔦",
    "don’t “quote”",
    "e\u0301 decomposed",
]
SPECIAL_TEXTS = ["<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|>b", "<repo_name>x<reponame>"]
PRES = ["smollm", "gpt-2", "llama-bpe", "qwen2", "default"]


def write_tiny(path: Path, tokens: list[str], add_tokenizer) -> None:
    """A one-layer Llama of width 32 with the given vocabulary; its weights do not matter."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    add_tokenizer(writer)
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (32, 32))
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_tokens(model: Path, texts: list[str], add_special: bool) -> list[list[int]]:
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.port, params.verbosity = 256, 0, -1
    server = xllamacpp.Server(params)
    answers = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": add_special, "parse_special": True}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", body)
        with urllib.request.urlopen(request) as answer:
            answers.append(json.load(answer)["tokens"])
    return answers


def sentencepiece_vocabulary(words: list[str]) -> dict[str, list]:
    """<unk>, <s>, </s>, the 256 bytes, then words (spaces as ▁) whose score is their rank, as SentencePiece's are."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = list(dict.fromkeys(word.replace("Ġ", "▁") for word in words if word.replace("Ġ", "").isascii()))
    return {
        "tokens": special + byte_tokens + words,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(words))],
        "types": [2, 3, 3] + [6] * 256 + [1] * len(words),
    }


def main() -> None:
    fields = gguf.GGUFReader(sys.argv[1]).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    result: dict = {"texts": TEXTS, "special_texts": SPECIAL_TEXTS, "pre": {}}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRES:

            def add_bpe(writer: gguf.GGUFWriter, pre: str = pre) -> None:
                writer.add_tokenizer_model("gpt2")
                writer.add_tokenizer_pre(pre)
                writer.add_token_types(types)
                writer.add_token_merges(merges)
                writer.add_bos_token_id(1)
                writer.add_eos_token_id(2)

            path = Path(folder) / f"{pre}.gguf"
            write_tiny(path, tokens, add_bpe)
            result["pre"][pre] = llama_cpp_tokens(path, TEXTS + SPECIAL_TEXTS, add_special=False)
        vocabulary = sentencepiece_vocabulary([t for t in tokens[17:2600] if len(t) < 12])

        def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
            writer.add_tokenizer_model("llama")
            writer.add_token_scores(vocabulary["scores"])
            writer.add_token_types(vocabulary["types"])
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.add_unk_token_id(0)

        write_tiny(Path(folder) / "spm.gguf", vocabulary["tokens"], add_sentencepiece)
        answers = llama_cpp_tokens(Path(folder) / "spm.gguf", TEXTS, add_special=True)
        result["sentencepiece"] = {**vocabulary, "ids": answers}
    target = Path(__file__).with_name("llama_cpp_tokens.json")
    target.write_text(json.dumps(result, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"wrote {target}, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
