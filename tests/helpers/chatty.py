"""A tiny model folder with a ChatML-like chat template: a token per byte, marks as special tokens."""

from pathlib import Path

from tiny import byte_tokenizer, tiny_model
from transformers import PreTrainedTokenizerFast

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte and ChatML's marks; its EOS is not the one of the template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.chat_template = template
    return tokenizer


def save_chatty(folder: Path, seed: int = 0, template: str | None = CHATML, hidden: int = 16) -> Path:
    """Write a model folder with that tokenizer and random weights."""
    tokenizer = chatml_tokenizer(template)
    tiny_model(len(tokenizer), seed, hidden=hidden).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
