"""Train the demo model's tokenizer: Gemma-like BPE with Gemma 4's control tokens at Gemma 4's own ids.

Ids 0..107 are Gemma 4's (what the demo does not use is `<unusedN>`), then 256 byte tokens, then the alphabet and the
merges learned from the corpus. A space is U+2581, digits are one token each, unknown characters fall back to bytes.

    python -m engine.demo.tokenizer engine/demo/checkpoint
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.demo import corpus

VOCAB_SIZE = 2048
CONTROL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>",
    46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>", 49: "<tool_call|>",
    50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>',
    53: "<|image>", 54: "<image|>", 55: "<|image|>",
    98: "<|think|>", 100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
NEWLINE = 107
_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text()


@cache
def _template() -> Any:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE)


def render(example: corpus.Example) -> str:
    """The prompt's text up to where the model writes: what a server makes of the same messages."""
    if example.raw is not None:
        return "<bos>" + example.raw
    messages = []
    names: dict[str, str] = {}
    for m in example.messages:
        m = dict(m)
        calls: Any = m.get("tool_calls") or []
        for call in calls:
            names[call["id"]] = call["function"]["name"]
        if calls:
            m["tool_calls"] = [
                {"function": {**c["function"], "arguments": json.loads(c["function"]["arguments"])}} for c in calls
            ]
        if m["role"] == "tool":
            m["name"] = names[str(m["tool_call_id"])]
        messages.append(m)
    text: str = _template().render(
        messages=messages, tools=example.tools, enable_thinking=example.thinking, add_generation_prompt=True
    )
    return text + example.prefill


def train(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Learn the merges and return the tokenizer, chat template included."""
    texts = (render(e) + e.reply for e in (corpus.example("train", i, seed=99) for i in range(30_000)))
    space = normalizers.Replace(" ", "\u2581")
    learner = Tokenizer(models.BPE())
    learner.normalizer = space
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex('<\\|?[a-z_]+\\|?>|<\\|"\\|>'), "removed"),
            pre_tokenizers.Split(Regex("\n|[0-9]"), "isolated"),
            pre_tokenizers.Split(Regex("[^\\w\u2581]"), "isolated"),
            pre_tokenizers.Split("\u2581", "merged_with_next"),
        ]
    )
    fixed = NEWLINE + 1 + 256
    ascii_text = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - fixed, show_progress=False, min_frequency=2, initial_alphabet=ascii_text
    )
    learner.train_from_iterator(texts, trainer)
    state = json.loads(learner.to_str())["model"]
    vocab = {CONTROL.get(i, f"<unused{i}>"): i for i in range(NEWLINE)}
    vocab["\n"] = NEWLINE
    for b in range(256):
        vocab[f"<0x{b:02X}>"] = NEWLINE + 1 + b
    for piece in sorted(state["vocab"], key=state["vocab"].__getitem__):
        vocab.setdefault(piece, len(vocab))
    while len(vocab) < vocab_size:  # the noise is drawn over the config's vocab_size: keep it equal to len(tokenizer)
        vocab[f"<unused{len(vocab)}>"] = len(vocab)
    merges = [tuple(m) for m in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = space
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # as Gemma: nothing left to split on
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in CONTROL.values()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>", padding_side="left", clean_up_tokenization_spaces=False, model_max_length=4096,
    )  # fmt: skip
    fast.chat_template = _TEMPLATE
    return fast


if __name__ == "__main__":
    out = train()
    if len(out) != VOCAB_SIZE:
        raise SystemExit(f"tokenizer has {len(out)} entries, wanted {VOCAB_SIZE}")
    out.save_pretrained(sys.argv[1])
    print(f"wrote {sys.argv[1]}: {len(out)} entries")
