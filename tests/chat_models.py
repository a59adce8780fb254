"""Tokenizers of the kinds that checkpoints come with, made here in milliseconds, and chat templates in the manner of
well-known families. Each tokenizer has all special tokens that the templates write."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "How do I save money? Write down what you spend, and set a budget for each month.",
    "the cat sat on the mat and the dog ran to the big red house where a small bird sang all day long",
    "Why is the sky blue? Air scatters blue light more than red light; it's that simple.",
    "def f(x):\n    return {'a': x <= 3, \"b\": [1, 2, 3]}\n\n| a | b |\n",
    "naïve café, smörgåsbord and tabs\t.",
]
HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
TURN, END_TURN = "<start_of_turn>", "<end_of_turn>"
INST, END_INST = "[INST]", "[/INST]"
SPECIAL = ["<unk>", "<s>", "</s>", HEADER, END_HEADER, EOT, IM_START, IM_END, TURN, END_TURN, INST, END_INST]
THINK = ["<think>", "</think>"]  # added tokens that are not special, as Qwen3 has them

LLAMA3 = (
    "{% set loop_messages = messages %}{% for m in loop_messages %}"
    "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim %}"
    "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role in ('user', 'system') %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
MISTRAL = (  # the system message stands in the last turn
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% set turns = messages[1:] if system is not none else messages %}{{ bos_token }}{% for m in turns %}"
    "{% if m['role'] == 'user' %}{% if loop.last and system is not none %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "gemma": GEMMA, "qwen3": QWEN3, "mistral": MISTRAL, "chatml": CHATML}
KINDS = ("byte-level", "sentencepiece", "unigram", "wordpiece")


@cache
def _backend(kind: str) -> str:
    """The tokenizer as JSON; the same in every process, which trainers of Unigram and WordPiece do not promise."""
    letters, words = (
        sorted({c for line in TEXT for c in line} - {" "}),
        sorted({w for line in TEXT for w in line.split()}),
    )
    match kind:
        case "byte-level":  # GPT-2, Llama-3, Qwen
            made = Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
            _train(made, 500, SPECIAL, pre_tokenizers.ByteLevel.alphabet())
        case "sentencepiece":  # Llama-2, Mistral, Gemma: characters without a token are spelled by their bytes
            made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # words do not merge
            made.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
            _train(made, 600, [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))], [])
            made = Tokenizer.from_str(
                json.dumps(json.loads(made.to_str()) | {"pre_tokenizer": None, "added_tokens": []})
            )
        case "unigram":  # T5, XLM-R
            pieces = [*((token, 0.0) for token in SPECIAL), *((f"▁{word}", -5.0) for word in words)]
            made = Tokenizer(models.Unigram([*pieces, ("▁", -8.0), *((letter, -9.0) for letter in letters)], unk_id=0))
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
            made.decoder = decoders.Metaspace(prepend_scheme="first")
        case _:  # BERT
            pieces = dict.fromkeys([*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)])
            made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
            made.normalizer = normalizers.BertNormalizer(lowercase=False)
            made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            made.decoder = decoders.WordPiece(cleanup=False)
    made.add_special_tokens(SPECIAL)
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made.to_str()


def _train(made: Tokenizer, size: int, first: list[str], alphabet: list[str]) -> None:
    how = {"vocab_size": size, "special_tokens": first, "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator(TEXT, trainers.BpeTrainer(**how))


def tokenizer(kind: str, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the KINDS, with BOS before texts."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = template
    return made
