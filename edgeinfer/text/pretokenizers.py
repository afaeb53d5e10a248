"""How the text of byte-pair vocabularies is cut into words: one row per `tokenizer.ggml.pre` name.

Knows nothing of vocabularies, merges or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """One way of cutting: each pattern splits further what the patterns before it left.

    `threes` come before the patterns: runs that the first one matches are words of their own, in
    which what the second (of Python's `re`) matches is cut into groups of three from the right. A
    pattern can do that only by looking ahead to the end of the number from every digit of it.
    """

    patterns: tuple[str, ...]
    threes: tuple[str, str] | None = None
    ignore_merges: bool = False  # a whole word that is in the vocabulary is taken without merging
    add_bos: bool = False  # the default when the file does not say
    has_bos: bool = True  # False: the vocabulary has no BOS unless the file names one
    byte_level: bool = True  # False: raw UTF-8 with U+2581 for spaces and <0xXX> for other bytes
    ends: str = " \t\r\n\uff0c\u3002\u3001"  # what always ends a word, after a letter or a digit


_PORTION = 1 << 13  # characters: 5 ms in a library that lets no other thread run
# Letters that are some for every pattern and in every version of Unicode.
_LETTERS = "0-9A-Za-z\u0410-\u044f\u4e00-\u9fa5\u3041-\u3093\u30a1-\u30f6\uac00-\ud7a3"
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCT = r" ?[^\s\p{L}\p{N}]+"
_TAIL = rf"{_PUNCT}[\r\n]*|{_SPACES}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_WIDE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_PROSE = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_PUNCT}|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}|{_TAIL}"

_UPPER = r"((?=[\p{L}])([^a-z]))"
_LOWER = r"((?=[\p{L}])([^A-Z]))"
_CASED = rf"{_LEAD}{_UPPER}*{_LOWER}+%s|{_LEAD}{_UPPER}+{_LOWER}*%s"
_CASED_TAIL = rf"{_PUNCT}[\r\n/]*|{_SPACES}"
_MARKED = rf"{_LEAD}[\p{{L}}\p{{M}}]+{_CONTRACTION}?"

_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)

# The alphabets that deepseek-llm calls letters.
_DEEPSEEK_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-"
    "\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-"
    "\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-"
    "\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

_ROWS: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe", PreTokenizer((_LLAMA3,))),
    ("chatglm-bpe", PreTokenizer((_LLAMA3,), has_bos=False)),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True, has_bos=False)),
    (
        "jais-2",
        PreTokenizer(
            (
                rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCT}[\r\n]*|\s*[\r\n]+|"
                r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|"
                r"\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
            )
        ),
    ),
    (
        "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizer((_QWEN2,)),
    ),
    (
        "qwen35",
        PreTokenizer(
            (
                rf"{_CONTRACTION}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}|"
                rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
            )
        ),
    ),
    (
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    (
        "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling",
        PreTokenizer((_GPT2,)),
    ),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        PreTokenizer(
            (_CASED % (f"{_CONTRACTION}?", f"{_CONTRACTION}?") + rf"|\p{{N}}{{1,3}}|{_CASED_TAIL}",)
        ),
    ),
    (
        "tekken",
        PreTokenizer(
            (_CASED % ("", "") + rf"|\p{{N}}|{_CASED_TAIL}",), ignore_merges=True, add_bos=True
        ),
    ),
    (
        "tiny_aya cohere2moe",
        PreTokenizer(
            (rf"{_MARKED}|\p{{N}}{{1,3}}|{_CASED_TAIL}",),
            threes=(r"\d+", r"\d+"),
        ),
    ),
    (
        "youtu",
        PreTokenizer(
            (
                "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a"
                "\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _CJK,
                rf"{_MARKED}|\p{{N}}|{_CASED_TAIL}",
            ),
            ignore_merges=True,
        ),
    ),
    (
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        PreTokenizer((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}[\r\n]*|{_SPACES}")),
    ),
    (
        "spark2_5",
        PreTokenizer(
            (r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
        ),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                r"\s?[!-/:-~" "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$",
                _CJK_WIDE,
                r"\p{N}+",
            )
        ),
    ),
    (
        "deepseek-coder",
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_WIDE, r"\p{N}")),
    ),
    (
        "falcon",
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ),
    (
        "default",
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ),
    (
        "minicpm5",
        PreTokenizer(
            (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}+|{_TAIL}"),
            ignore_merges=True,
        ),
    ),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(
            (
                rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_LEAD}\p{{L}}+|\p{{N}}|"
                rf"{_PUNCT}[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    (
        "seed-coder",
        PreTokenizer(
            (
                rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}{{1}}|"
                rf" ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
            )
        ),
    ),
    ("ufakzeka", PreTokenizer((rf"{_LEAD}\p{{L}}+|\p{{N}}|{_TAIL}",))),
    (
        "exaone-moe",
        PreTokenizer(
            (
                rf"{_CONTRACTION}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
                rf"{_PUNCT}[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            ),
            ends="\t\r\n\uff0c\u3002\u3001",
        ),
    ),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", _QWEN2))),
    (
        "afmoe",
        PreTokenizer(
            (
                "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"
                "\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f"
                "\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
                rf"{_DEEPSEEK3}[\r\n]*|{_SPACES}",
            ),
            threes=(r"\p{N}+", r".+"),
        ),
    ),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_PROSE,))),
    ("viking", PreTokenizer((_PROSE, r"\p{N}"))),
    (
        "chameleon",
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    ("superbpe", PreTokenizer((), threes=(r"\p{N}+", r"\d+"), ends="")),
    ("gemma4", PreTokenizer((r"[^\n]+|[\n]+",), add_bos=True, byte_level=False, ends="\n")),
    ("sarvam-moe", PreTokenizer((r"[^\n]+|[\n]+",), byte_level=False, ends="\n")),
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {name: row for names, row in _ROWS for name in names.split()}
)


def portions(text: str, ends: str) -> Iterator[str]:
    """Parts of a text that have the words that it has as a whole, thousands of characters each."""
    start = 0
    if ends and len(text) > _PORTION:
        cut = re.compile(f"(?<=[{_LETTERS}])(?=[{ends}])")
        while (found := cut.search(text, start + _PORTION)) is not None:
            yield text[start : found.start()]
            start = found.start()
    yield text[start:]


def in_threes(run: str, digits: str) -> list[str]:
    """A run of numbers cut in groups of three, from the right of what `digits` matches."""
    from unicodedata import category  # a library that few vocabularies need

    if not category(run[0]).startswith("N"):
        return [run]
    cuts = [0, len(run)]
    for found in re.finditer(digits, run):
        cuts += range(found.end() - 3, found.start() - 1, -3)
    cuts = sorted(set(cuts))
    return [run[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
