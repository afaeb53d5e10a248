"""Which tokens of a vocabulary may follow by a grammar: llguidance, with a tokenizer of ours.

Imported only where an answer has a grammar.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np

from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.grammar import Grammar, first_line, limits
from edgeinfer.text.grammar_limits import deeply
from edgeinfer.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Compiled grammars, the latest ones. Most take up to 1 MiB, of a long text 50 to 250 bytes a
# character, and 30 MiB more where answers have been in all the states that a lexer may have.
_MOST_KEPT = 8
_MOST_KEPT_TEXT = 1 << 17  # characters of all together: of one, a whole text may be as long
# Tokens in a row that must follow: each step computes all of them, and holds up other answers.
_MOST_FORCED = 1 << 14


class GrammarCompiler:
    """Compiles grammars for one vocabulary, which it takes in once. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary: Any = _Vocabulary(tokenizer)
        ends = sorted(tokenizer.eog_ids) or [vocabulary.eos_token_id]
        self._vocabulary = llguidance.LLTokenizer(vocabulary, eos_token=ends)
        self._unused = None if tokenizer.eog_ids else vocabulary.eos_token_id
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """InvalidRequestError where it is too large, or asks for what the vocabulary lacks."""
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None and not kept.is_spent:
                self._kept.move_to_end(grammar)
                return kept
        # Without the lock: what takes long holds up nobody else.
        made = deeply(lambda: self._made(grammar), grammar.param)
        with self._lock:
            self._kept.pop(grammar, None)
            self._kept[grammar] = made
            while len(self._kept) > 1 and self._is_over():
                self._kept.popitem(last=False)
        return made

    def _is_over(self) -> bool:
        n_characters = sum(len(grammar.text) for grammar in self._kept)
        return len(self._kept) > _MOST_KEPT or n_characters > _MOST_KEPT_TEXT

    def _made(self, grammar: Grammar) -> CompiledGrammar:
        matcher = llguidance.LLMatcher(self._vocabulary, grammar.text, log_level=0, limits=limits())
        made = CompiledGrammar(grammar, matcher, self._vocabulary.vocab_size, self._unused)
        first = matcher.deep_copy()
        GrammarMatcher(made, first, self._vocabulary.vocab_size, self._unused).forced(0)
        first.compute_bitmask()  # some are only now seen to be too large, or to allow nothing
        if first.is_error():
            raise InvalidRequestError(
                f"{grammar.param} can't be used: {_error(first)}", param=grammar.param
            )
        return made


class CompiledGrammar:
    """A grammar for one vocabulary: an engine's `Constraint`.

    Its answers share a lexer, whose states add up; one that `is_spent` has no more to give.
    """

    def __init__(self, grammar: Grammar, matcher: Any, n_tokens: int, unused: int | None) -> None:
        self.text, self.param, self.is_spent = grammar.text, grammar.param, False
        self._matcher, self._n_tokens, self._unused = matcher, n_tokens, unused

    def begin(self) -> GrammarMatcher:
        """For one more answer."""
        return GrammarMatcher(self, self._matcher.deep_copy(), self._n_tokens, self._unused)


class GrammarMatcher:
    """How far one answer has come in its grammar: an engine's `Matcher`.

    llguidance knows `n_tokens`; of these one may be `unused` by the model. Where a grammar proves
    too large an InvalidRequestError names the keyword that it came by.
    """

    def __init__(
        self, grammar: CompiledGrammar, matcher: Any, n_tokens: int, unused: int | None
    ) -> None:
        self._grammar = grammar
        self._matcher, self._n_words, self._unused = matcher, -(-n_tokens // 32), unused
        self._is_checked = False  # whether too much must follow here

    @property
    def is_ended(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def forced(self, n: int) -> list[int]:
        """Up to `n` tokens that must follow, as far as that is known."""
        found: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        if len(found) > _MOST_FORCED:
            raise self._refused(f"{len(found):,} tokens in a row must follow by it")
        self._is_checked = True
        return found[:n]

    def count_possible(self, tokens: Sequence[int]) -> int:
        """How many of these may follow one another at most."""
        n: int = self._matcher.validate_tokens(list(tokens))
        return n

    def fill(self, masks: NDArray[np.uint32], drafts: Sequence[int]) -> None:
        """Row i of `masks` (n, words): which tokens may follow the first i of the drafts."""
        if not self._is_checked:  # where nobody guesses
            self.forced(0)
        masks[:] = 0
        n_taken = 0
        for i, mask in enumerate(masks):
            if i and not (_has(masks[i - 1], drafts[i - 1]) and self._take(drafts[i - 1])):
                break
            n_taken = i
            own = mask[: self._n_words]
            self._matcher.unsafe_compute_mask_ptr(own.ctypes.data, own.nbytes)
            self._check()
            if self._unused is not None:
                mask[self._unused >> 5] &= ~np.uint32(1 << (self._unused & 31))
        if n_taken and not self._matcher.rollback(n_taken):
            self._check()

    def advance(self, token: int) -> None:
        """Go on behind a token that a mask has allowed."""
        self._is_checked = False
        self._matcher.consume_token(token)
        self._check()

    def _take(self, draft: int) -> bool:
        """Whether a draft can be taken back again; one that ends the answer has nothing behind."""
        return not self._matcher.is_stopped() and bool(self._matcher.consume_token(draft))

    def _check(self) -> None:
        if self._matcher.is_error():
            self._grammar.is_spent |= "too many states" in self._matcher.get_error()
            raise self._refused(_error(self._matcher))

    def _refused(self, reason: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self._grammar.param} can't be kept to: {reason}; simplify it",
            param=self._grammar.param,
        )


def _error(matcher: Any) -> str:
    return first_line(matcher.get_error()) or f"nothing may follow ({matcher.stop_reason()})"


def _has(mask: NDArray[np.uint32], token: int) -> bool:
    return bool(mask[token >> 5] >> np.uint32(token & 31) & np.uint32(1))


class _Vocabulary:
    """A tokenizer as llguidance reads it.

    Tokens that end an answer and control tokens are no text; a grammar names them by id.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        ids = range(tokenizer.n_vocab)
        self.tokens = [tokenizer.piece(id) for id in ids]
        ends = tokenizer.eog_ids
        self.special_token_ids = [id for id in ids if id in ends or tokenizer.is_control(id)]
        if not ends:  # one that no model has: a grammar's end is seen without it
            self.special_token_ids.append(len(self.tokens))
            self.tokens.append(b"<end>")
        self.eos_token_id = min(ends, default=len(self.tokens) - 1)
        self.bos_token_id = tokenizer.bos_id
        special = set(self.special_token_ids)
        self._by_piece = {
            piece: id for id, piece in enumerate(self.tokens) if piece and id not in special
        }
        self._longest = max(map(len, self._by_piece), default=0)

    def __call__(self, text: str) -> list[int]:
        """The tokens that spell a text, and nothing else."""
        data = text.encode()
        ids = self._tokenizer.encode_middle(text)
        if b"".join([self.tokens[id] for id in ids]) == data:
            return ids
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._by_piece), None)
            if end is None:  # a byte that no token has: what follows can't be told
                break
            ids.append(self._by_piece[data[start:end]])
            start = end
        return ids
