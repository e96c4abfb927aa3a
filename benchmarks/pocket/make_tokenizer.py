"""Make the pocket model's tokenizer and its side files: byte-level BPE, 2,048 tokens.

Llama 4's layout at pocket size: plain tokens first, special tokens last, digits one by one, the
begin-of-text token put in front by the post-processor, turns as the chat template writes them.
Knows nothing of the network or its training.

    python benchmarks/pocket/make_tokenizer.py llama4q/pocket/text/train.txt llama4q/pocket/model
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

VOCABULARY = 2_048
CONTEXT = 16_384
IMAGE_SIZE = 56
PATCH_SIZE = 14

# In the order of the official vocabulary; the gaps there are reserved tokens here, at the end.
NAMED_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>",
    "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>",
    "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
    "<|image|>", "<|patch|>",
)  # fmt: skip
SPECIAL_COUNT = 32
SPECIAL_TOKENS = NAMED_TOKENS + tuple(
    f"<|reserved_special_token_{number}|>" for number in range(SPECIAL_COUNT - len(NAMED_TOKENS))
)

# Llama 4's splitting rule, with single digits instead of groups of three: a needle's digits are
# then one token each, and a copied number is right or wrong digit by digit.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif content['type'] == 'text' %}
                {{- content['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE of exactly `VOCABULARY` tokens, the special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - SPECIAL_COUNT,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\f\n"), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            ),
        ]
    )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"{tokenizer.get_vocab_size()} tokens, not {VOCABULARY}: give more text")
    return tokenizer


def side_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The JSON files that stand beside tokenizer.json, as on the Hub."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    added = {
        str(ids[token]): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    named = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
    }
    return {
        "tokenizer_config.json": {
            "added_tokens_decoder": added,
            **named,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {},
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": CONTEXT,
            "processor_class": "Llama4Processor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": named,
        "generation_config.json": {
            "bos_token_id": ids["<|begin_of_text|>"],
            "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]],
            "pad_token_id": ids["<|finetune_right_pad|>"],
            "do_sample": False,
        },
        "preprocessor_config.json": _image_preprocessor(),
        "processor_config.json": {
            "fake_image_token": "<|image|>",
            "image_token": "<|image|>",
            "start_of_image_token": "<|image_start|>",
            "end_of_image_token": "<|image_end|>",
            "patch_token": "<|patch|>",
            "tile_x_separator_token": "<|tile_x_separator|>",
            "tile_y_separator_token": "<|tile_y_separator|>",
            "patch_size": PATCH_SIZE,
            "pixel_shuffle_ratio": 0.5,
            "processor_class": "Llama4Processor",
        },
    }


def _image_preprocessor() -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Llama4ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_patches": 4,
        "processor_class": "Llama4Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "resize_to_max_canvas": False,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("text", type=Path, help="the training text")
    parser.add_argument("out", type=Path, help="the model's folder")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.out / "tokenizer.json"))
    (options.out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, content in side_files(tokenizer).items():
        (options.out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokens = len(tokenizer.encode(text).ids)
    each = len(text) / tokens
    print(f"vocabulary {VOCABULARY}; the text is {tokens} tokens of {each:.2f} characters each")


if __name__ == "__main__":
    main()
