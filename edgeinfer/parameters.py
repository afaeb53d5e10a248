"""Every keyword of the API in one table: its type, range, default and help.

What callers give is checked against it where it enters; flags and forms are made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from edgeinfer.errors import InvalidRequestError
from edgeinfer.values import (
    CACHE_TYPES,
    LONGEST_BREAKER,
    MOST_BREAKERS,
    biases,
    breakers,
    cache_types,
    function,
    id_set,
    integer,
    is_plain,
    layer_count,
    layers,
    memory_size,
    number,
    positive,
    schema,
    switch,
    text,
    text_or_texts,
    watched,
)
from edgeinfer.values import file_path as file_path
from edgeinfer.values import id_list as id_list
from edgeinfer.values import parse_memory as parse_memory
from edgeinfer.values import shown as shown

MAX_LOGPROBS = 128
POOLINGS = ("mean", "last")
_INT32, _INT64 = 2**31 - 1, 2**63 - 1
_MOST_THREADS = 1024  # more than any machine has; each takes a stack


class Parameter(NamedTuple):
    """A keyword. `read` makes a value of the type that is used, or raises ValueError."""

    name: str
    read: Callable[[Any], Any]
    help: str
    least: float = -math.inf
    most: float = math.inf
    default: Any = None
    choices: tuple[str, ...] = ()
    usual: tuple[float, float] | None = None  # what a person who fills in a form can mean

    @property
    def kind(self) -> type:
        """How a flag or a form spells it: int, float, bool or str."""
        return _KINDS.get(self.read, str)

    @property
    def supported(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        return _WORDS[self.read] + _range(self.least, self.most)

    def check(self, value: Any) -> Any:
        """The value in the type that is used; InvalidRequestError where it can't be one."""
        try:
            checked = self.read(value)
        except (TypeError, ValueError, OverflowError):
            raise self._refused(value) from None
        if self.choices and checked not in self.choices:
            raise self._refused(value)
        if self.kind in (int, float) and not self.least <= checked <= self.most:
            raise self._refused(value)
        return checked

    def parse(self, text: str, *, in_form: bool = False) -> Any:
        """The value that a flag spells, or a form, which takes usual ones only."""
        is_number = self.kind in (int, float)
        if is_number and not is_plain(text):
            raise self._refused(text)
        try:
            value: Any = self.kind(text) if is_number else text
        except ValueError:
            raise self._refused(text) from None
        if in_form and self.usual and not self.usual[0] <= value <= self.usual[1]:
            usual = _WORDS[self.read] + _range(*self.usual)
            raise InvalidRequestError(f"{self.name} is {text}; give {usual}", param=self.name)
        return self.check(value)

    def _refused(self, value: Any) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self.name} is {shown(value)}; it must be {self.supported}", param=self.name
        )


_KINDS: dict[Callable[[Any], Any], type] = {
    integer: int, number: float, positive: float, switch: bool,
}  # fmt: skip
_WORDS: dict[Callable[[Any], Any], str] = {
    integer: "an integer",
    number: "a finite number",
    positive: "a number above 0",
    switch: "True or False",
    text: "a text",
    breakers: f"at most {MOST_BREAKERS} texts, none empty or above {LONGEST_BREAKER} characters",
    text_or_texts: "a text or several, none empty",
    id_set: "token ids",
    biases: "numbers by token id",
    layer_count: "a number of layers, -1 for all, or 'auto'",
    memory_size: "bytes, 512M, 2G, or a share such as 80%",
    cache_types: f"one of {', '.join(map(repr, CACHE_TYPES))}, or two, for K and for V",
    function: "a function, neither async nor with a yield",
    schema: "a JSON schema, a pydantic model, a dataclass or a TypedDict",
    layers: "numbers of layers",
    watched: "some of 'logits', 'hidden' and numbers of layers",
}


def _range(least: float, most: float) -> str:
    if math.isinf(most):
        return "" if math.isinf(least) else f", {least:g} or more"
    return f" from {_limit(least)} to {_limit(most)}"


def _limit(value: float) -> str:
    bits = int(abs(value)).bit_length()
    if bits <= 30:
        return f"{value:g}"
    return f"2**{bits} - 1" if value > 0 else f"-2**{bits} + 1"


# -- the table -----------------------------------------------------------------------------------


def _by_name(*parameters: Parameter) -> dict[str, Parameter]:
    return {parameter.name: parameter for parameter in parameters}


# How a model is loaded.
LOAD = _by_name(
    Parameter("n_ctx", integer, "Context length in tokens.", 1, _INT32),
    Parameter("memory", memory_size, "Most memory to use, beside a GPU's own."),
    Parameter("threads", integer, "CPU threads.", 1, _MOST_THREADS),
    Parameter("kv_type", cache_types, "K and V in the cache: f16 (usual), q8_0, q4_0."),
    Parameter("device", text, "Where to run."),
    Parameter("gpu_layers", layer_count, "Layers on GPUs, the last ones (auto: what fits)."),
    Parameter(
        "numerics", text,
        "exact: the bits of every device. fast: a GPU's tensor cores round more, in attention and "
        "matrices of F16 and BF16.",
        default="exact", choices=("exact", "fast"),
    ),
    Parameter("slots", integer, "Full-length contexts that the cache holds.", 1, _INT32),
    Parameter(
        "kept_tokens", integer, "Of earlier prompts, kept beside the contexts.", 0, _INT32,
    ),
    Parameter("pre", text, "Pre-tokenizer, for a file that names none."),
    Parameter("chat_template", text, "Instead of the file's own."),
    Parameter("drafts", switch, "Load the block that guesses tokens.", default=False),
    Parameter("naive", switch, "One answer at a time, nothing reused.", default=False),
    Parameter(
        "pooling", text, "What of a text its embedding is made of, where the file does not say.",
        choices=POOLINGS,
    ),
    Parameter("residuals", layers, "Layers whose entering stream may be watched."),
    Parameter("download", switch, "Fetch a model that is not here.", default=False),
    Parameter("progress", function, "Told how far loading is."),
)  # fmt: skip

# When an answer ends, and how it is made.
REQUEST = _by_name(
    Parameter(
        "max_tokens", integer, "Most tokens to generate.", 0, _INT64, usual=(1, 10_000_000)
    ),
    Parameter("stop", text_or_texts, "End before this text.", default=()),
    Parameter("stop_token_ids", id_set, "End at this token.", default=frozenset()),
    Parameter(
        "overflow", text,
        "When the context is full: stop with an error, or forget the oldest tokens or turns.",
        default="error", choices=("error", "slide", "drop-turns"),
    ),
    Parameter(
        "n_keep", integer,
        "Tokens at the start that stay when it slides, three quarters of it at most; unset: system "
        "text and tools.",
        0, _INT32, usual=(0, 1_000_000),
    ),
    Parameter(
        "n_stable", integer,
        "Messages (of a chat) or tokens at the start that later prompts share, and are kept for.",
        0, _INT32, 0,
    ),
    Parameter(
        "continue_last", switch, "Go on with the assistant's message that ends a chat.",
        default=False,
    ),
    Parameter("priority", integer, "Larger ones run first.", -_INT32, _INT32, 0),
    Parameter("schema", schema, "The answer is JSON by this schema."),
    Parameter("grammar", text, "The answer follows this grammar, Lark or GBNF."),
    Parameter("regex", text, "The answer matches this regular expression."),
    Parameter(
        "reasoning_budget", integer, "Most tokens of reasoning in a chat; then it is closed.",
        0, _INT32,
    ),
    Parameter("on_step", function, "Called after each step, before its token is picked."),
    Parameter("watch", watched, "What on_step is shown.", default=("logits",)),
    Parameter(
        "speculation", switch,
        "Guess tokens ahead where that is faster (on); the answer is the same.",
    ),
)  # fmt: skip

# How a token is picked; names and defaults are llama.cpp's. Unset, the file's value comes first.
SAMPLING = _by_name(
    Parameter(
        "temperature", number, "0 always takes the likeliest token, 1 is lively.", default=0.8,
        usual=(0, 5),
    ),
    Parameter(
        "top_k", integer, "Choose among the k likeliest; 0: all.", -_INT32, _INT32, 40,
        usual=(0, 1_000_000),
    ),
    Parameter("top_p", number, "Choose among those that make up this share.", 0, 1, 0.95),
    Parameter("min_p", number, "Leave out what is below this share of the likeliest.", 0, 1, 0.05),
    Parameter("typical_p", number, "Locally typical sampling; 1: off.", 0, 1, 1.0),
    Parameter("top_n_sigma", number, "Keep logits within n sigma; 0 or less: off.", default=-1.0),
    Parameter("xtc_probability", number, "Chance to leave out top choices.", 0, 1, 0.0),
    Parameter("xtc_threshold", number, "What a top choice has; above 0.5: off.", 0, 1, 0.1),
    Parameter("repeat_last_n", integer, "Tokens that penalties look at; -1: all.", -1, _INT32, 64),
    Parameter(
        "repeat_penalty", positive, "Above 1 makes repetition less likely.", default=1.0,
        usual=(0, 10),
    ),
    Parameter("presence_penalty", number, "For each token that was there.", default=0.0),
    Parameter("frequency_penalty", number, "For each time that a token was there.", default=0.0),
    Parameter("dry_multiplier", number, "Penalise long repeats; 0: off.", 0, default=0.0),
    Parameter("dry_base", number, "How DRY grows with a repeat's length.", 0, default=1.75),
    Parameter("dry_allowed_length", integer, "Repeats that cost nothing.", 0, _INT32, 2),
    Parameter("dry_penalty_last_n", integer, "Tokens that DRY looks at; -1: all.", -1, _INT32, 64),
    Parameter(
        "dry_sequence_breakers", breakers, "Texts that no repeat goes across.",
        default=("\n", ":", '"', "*"),
    ),
    Parameter("dynatemp_range", number, "Temperature by entropy, this far around.", 0, 1e6, 0.0),
    Parameter("dynatemp_exponent", number, "How it depends on entropy.", 0, default=1.0),
    Parameter("mirostat", integer, "Hold the surprise near tau: version 1 or 2.", 0, 2, 0),
    Parameter("mirostat_tau", number, "The surprise to hold.", 0, default=5.0),
    Parameter("mirostat_eta", number, "How fast mirostat learns.", 0, default=0.1),
    Parameter("min_keep", integer, "Candidates that filters leave.", 0, _INT32, 0),
    Parameter(
        "seed", integer, "The same number gives the same answer.", 0, 2**64 - 1, usual=(0, 2**63)
    ),
    Parameter("logit_bias", biases, "Added to logits, by token id.", default={}),
    Parameter(
        "logprobs", integer, "Keep the n likeliest tokens of each place.", 0, MAX_LOGPROBS,
        usual=(0, 20),
    ),
)  # fmt: skip
ANSWER = REQUEST | SAMPLING

# What `logits` takes beside token ids.
LOGITS = _by_name(
    Parameter("last", integer, "Rows to give back, the last ones.", 1, _INT64),
    Parameter("prefill_chunk", integer, "Most rows in a step.", 1, _INT64),
)

# What `residuals` and `attention` take beside them.
LOOK = _by_name(
    Parameter("layer", integer, "The layer that is looked at.", 0, _INT32),
    Parameter("last", integer, "Rows to give back, the last ones.", 1, _INT64),
)

# How `embed` makes vectors of texts.
EMBED = _by_name(
    Parameter(
        "pooling", text, "The mean of a text's rows, or the last one; as it was loaded.",
        choices=POOLINGS,
    ),
    Parameter("dimensions", integer, "Keep so many of a vector's values, the first.", 1, _INT32),
    Parameter(
        "truncate", switch, "Leave out the end of what the context does not hold.", default=False
    ),
)  # fmt: skip

# What `tokenize` and `detokenize` take beside the text or the ids.
TEXT = _by_name(
    Parameter("bos", switch, "Begin with the token that begins a text.", default=False),
    Parameter("special", switch, "Spellings of control tokens are those.", default=False),
)


def checked(
    function: str, given: Mapping[str, Any], table: Mapping[str, Parameter]
) -> dict[str, Any]:
    """What was given of a table, None being the same as nothing; TypeError for other names."""
    check_keywords(function, given, table)
    return {name: table[name].check(value) for name, value in given.items() if value is not None}


def check_keywords(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for a keyword that `function` does not have, naming the nearest one."""
    names = list(known)
    for name in given:
        if name not in names:
            import difflib  # 2 ms that starts don't need

            near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() has no keyword {name!r}{hint}")
