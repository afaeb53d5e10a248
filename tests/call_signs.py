"""By family of models, a text that tells how it spells calls, as it would in a template."""

from __future__ import annotations

DSML = "｜DSML｜"
SIGNS = {
    "hermes": "<tool_call>",
    "llama": 'Respond in the format {"name": function name, "parameters": dictionary}',
    "mistral": "[TOOL_CALLS]",
    "harmony": "<|channel|>",
    "deepseek": "<｜tool▁call▁begin｜>",
    "dsml": DSML,
    "lfm2": "<|tool_call_start|>",
    "gemma": "<|tool_call>",
    "functiongemma": "<start_function_call>",
    "granite": "<|tool_call|>",
    "cohere": "<|START_ACTION|>",
    "kimi": "<|tool_call_argument_begin|>",
    "minimax": "<minimax:tool_call>",
    "seed": "<seed:tool_call>",
    "nemotron": "<TOOLCALL>",
    "olmo": "<function_calls>",
    "listed": "<tool_calls>",
    "phi": "<|tool|><|/tool|>",
    "apertus": "<|tools_prefix|>",
    "functionary": ">>>all",
}
