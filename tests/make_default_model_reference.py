"""Writes tests/data/default_model_greedy.json: what transformers answers, greedily and in fp32, with the default model.

    python tests/make_default_model_reference.py

Reading the GGUF takes transformers 40 s, so its tokens are kept in the repository. Beside each token stands its margin,
the distance of its logit to the runner-up's: where that is tiny, another order of additions may choose the other token,
and a comparison has to end. Prompts are token ids of our tokenizer (that of transformers drops the model's digit
split).
"""

import json
from pathlib import Path

import torch
import transformers

from octavo.models import default_model_path, read_tokenizer

MAX_TOKENS = 40
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "To be, or not to be, that is the question:",
    "1, 2, 3, 5, 8, 13,",
    "Der Himmel ist blau, weil",
    "The three laws of motion, as Newton wrote them down, say the following. " * 12 + "The first law says",
]
QUESTIONS = ["Why is the sky blue?", "Write a haiku about paper.", "What is 12 times 12?"]


def main() -> None:
    path = default_model_path()
    tokenizer = read_tokenizer(path)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    for question in QUESTIONS:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        prompts.append(tokenizer.encode(chat, add_special_tokens=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    entries = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=list(tokenizer.eos_token_ids),
            return_dict_in_generate=True,
            output_logits=True,
        )
        top = [logits[0].topk(2).values for logits in out.logits]
        margins = [round(float(values[0] - values[1]), 5) for values in top]
        tokens = out.sequences[0, len(prompt) :].tolist()
        entries.append({"prompt_token_ids": prompt, "token_ids": tokens, "margins": margins})
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
    target = Path(__file__).parent / "data" / "default_model_greedy.json"
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    target.write_text(f'{{"made_with": "{made_with}", "entries": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
