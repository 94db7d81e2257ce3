"""Small chat templates with the features of those that models come with, each by a model's name.

They are written for these tests; what they share with a model's template is its habits.
"""

from __future__ import annotations

LLAMA_2 = (
    "{% if messages[0].role == 'system' %}"
    "{% set system, turns = '<<' + messages[0].content + '>>\\n', messages[1:] %}"
    "{% else %}{% set system, turns = '', messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token + '[ASK] ' + (system if loop.first else '') + m.content.strip() + ' [/ASK]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Spaces around a trimmed answer, no generation prompt, the system prompt in the first question."""

LLAMA_3 = (
    "{% set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
    "{{ bos_token }}<|start|>system\n\nToday: {{ date }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}<|end|>"
    "{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
"""Today's date, a system turn in any case, trimmed answers."""

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[ASK]{{ m.content }}[/ASK]"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
"""Nothing between question and answer; no system prompt, and none is suffered."""

QWEN_3 = (
    "{% for m in messages %}{% set words = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}"
    "{% if '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|start|>assistant\n{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{% else %}<|start|>{{ m.role }}\n{% endif %}{{ words }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""An empty thought before the last answer, no thoughts before; thinking can be switched off."""

PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
"""A turn ends with a token that is not the end of a text."""

GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
"""Trimmed turns, another name for the assistant, no system prompt."""

GLM_4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Start tokens of its own, and nothing at the end of a turn."""

GPT_OSS = (
    "{{ '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
    "{% endif %}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""A channel between the speaker and the words, and an end of its own for the last answer."""

R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}{% set words = m.content %}{% if '</think>' in words %}"
    "{% set words = words.split('</think>')[-1] %}{% endif %}"
    "<|assistant|>{{ words + eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
"""Thoughts are dropped, and the generation prompt opens one."""

PARTS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""Content in parts, as models of images and text have it."""

NO_GENERATION_PROMPT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
)

ALL = {
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "mistral": MISTRAL,
    "qwen 3": QWEN_3,
    "phi 3": PHI_3,
    "gemma": GEMMA,
    "glm 4": GLM_4,
    "gpt-oss": GPT_OSS,
    "r1": R1,
    "parts": PARTS,
    "no generation prompt": NO_GENERATION_PROMPT,
}

SPECIAL = (
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|user|>",
    "<|assistant|>",
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<s>",
    "</s>",
)
EOS = {"llama 2": "</s>", "mistral": "</s>", "phi 3": "<|endoftext|>", "glm 4": "<|endoftext|>"}
EOS |= {"gpt-oss": "<|return|>", "r1": "</s>"}


def make(name: str, kind: str = "bytes", template: str | None = None):
    """A tokenizer with one of the templates, over bytes or, as Llama 2's, with word-start marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["Where is Oslo? It lies in Norway, so they say. Who? Anna wrote it. Why? So."] * 4
    backend = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if kind == "marks":
        alphabet = sorted({chr(i) for i in range(32, 127)} | {"\n", "▁"})
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=EOS.get(name, "<|end|>")
    )
    made.chat_template = ALL[name] if template is None else template
    return made
