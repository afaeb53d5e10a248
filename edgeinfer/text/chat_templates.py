"""Where a model's chat template comes from: its file, the user, or a guess at its format.

Knows nothing of rendering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeinfer import platform
from edgeinfer.errors import InvalidRequestError, Keyword, TemplateError
from edgeinfer.gguf import Metadata
from edgeinfer.text.plain_text import decode

_TEMPLATE_KEY = "tokenizer.chat_template"
_PREFIX = f"{_TEMPLATE_KEY}."
_MOST_SOURCE = 16 << 20  # bytes of a file


def own_template(meta: Metadata, name: str = "default") -> str | None:
    """The file's template of that name; a wrong one that nobody asks for does no harm."""
    key = _PREFIX + name
    if name == "default" and _TEMPLATE_KEY in meta:
        key = _TEMPLATE_KEY
    return meta.get_str(key, "") or None


def choose_template(override: str, meta: Metadata) -> str:
    if (found := own_template(meta, override)) is not None:
        return found
    if override in BUILT_IN:
        return BUILT_IN[override]
    try:
        with open(override, "rb") as file:
            source, n_lost = decode(platform.read_whole(file, _MOST_SOURCE), override)
        if not n_lost:
            return source
        raise ValueError(f"{n_lost} characters are not UTF-8")
    except (OSError, ValueError) as error:
        own = {key[len(_PREFIX) :] or "default" for key in meta if key.startswith(_TEMPLATE_KEY)}
        names = ", ".join(sorted({*own, *BUILT_IN}))
        raise InvalidRequestError(
            f"no chat template {override!r}: neither a file that can be read nor one of {names}",
            param="chat_template",
        ) from error


def fallback_name(meta: Metadata, texts: Sequence[str]) -> str:
    for token, name in _SIGNS:
        if token in texts:
            return name
    title = f"{meta.get('general.name', '')} {meta.get('general.basename', '')}".lower()
    for words, name in _TITLES:
        if all(word in title for word in words):
            return name
    raise TemplateError(
        "the file has no chat template and none fits its vocabulary; it may be a base model",
        advice=(
            "use it without chat, or choose with ",
            Keyword("chat_template"),
            f" {'|'.join(BUILT_IN)}|FILE",
        ),
    )


# A token that gives away the format its model was trained on.
_SIGNS = (
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama3"),
    ("<start_of_turn>", "gemma"),
    ("<|end|>", "phi3"),
    ("[INST]", "mistral"),
)

_TITLES = (
    (("zephyr",), "zephyr"),
    (("tinyllama", "chat"), "zephyr"),
    (("llama-2", "chat"), "llama2"),
    (("mistral", "instruct"), "mistral"),
)

BUILT_IN: Mapping[str, str] = {
    "chatml": """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
""",
    "llama3": """\
{{- bos_token }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content.strip() + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
""",
    "gemma": """\
{{- bos_token }}
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\\n' + message.content.strip() + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
""",
    "phi3": """\
{{- bos_token }}
{%- for message in messages -%}
{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif -%}
""",
    "mistral": """\
{{- bos_token }}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' -%}
{{ message.content + eos_token }}
{%- else -%}
{{ raise_exception('no ' + message.role + ' role') }}
{%- endif -%}
{%- endfor -%}
""",
    "llama2": """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ns.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{ bos_token + '[INST] ' + ns.system + message.content + ' [/INST]' }}
{%- set ns.system = '' -%}
{%- else -%}
{{ ' ' + message.content + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if ns.system %}{{ bos_token + '[INST] ' + ns.system + ' [/INST]' }}{% endif -%}
""",
    "zephyr": """\
{%- for message in messages -%}
{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif -%}
""",
}
