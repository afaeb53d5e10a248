"""The public face: open a model, generate, chat, look at tokens and logits.

Knows nothing of terminals or command lines.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgeinfer import requesting, runtime, watching
from edgeinfer.engine.generation import check_length
from edgeinfer.engine.memory_plan import MemoryPlan
from edgeinfer.engine.process_end import close_first_at_exit
from edgeinfer.errors import ClosedError, InvalidRequestError
from edgeinfer.options import LoadOptions, Sampling, Unpack
from edgeinfer.parameters import ANSWER, LOGITS, TEXT, checked, file_path, id_list, shown
from edgeinfer.replying import Reading, chosen_tools, reading
from edgeinfer.results import Completion
from edgeinfer.runtime import Runtime
from edgeinfer.sampling.recommended import recommended
from edgeinfer.stream import Stream, items, run_all
from edgeinfer.text.messages import Conversation, Message
from edgeinfer.text.prompt import Prompt, chat_prompt
from edgeinfer.text.reply import AnswerText
from edgeinfer.text.template_engine import TemplateEngine

if TYPE_CHECKING:
    from edgeinfer.constraining import Grammars
    from edgeinfer.engine.constraint import Constraint
    from edgeinfer.engine.session import Sessions
    from edgeinfer.text.grammar import Grammar


class LLM:
    """An open model. A context manager; every method may be called from any thread."""

    def __init__(self, model: str | PathLike[str], **load: Unpack[LoadOptions]) -> None:
        self._take(runtime.load(model, load, TemplateEngine()))

    @classmethod
    def of(cls, loaded: Runtime) -> LLM:
        """The face of a model that `runtime.load` has opened; it is closed with it."""
        llm = cls.__new__(cls)
        llm._take(loaded)
        return llm

    def _take(self, loaded: Runtime) -> None:
        self._runtime = loaded
        # Closes the model when it is dropped, and at exit at the latest.
        self._close = weakref.finalize(self, self._runtime.close)
        close_first_at_exit()

    @property
    def name(self) -> str:
        """The model's name as its file gives it."""
        return self._runtime.model.name

    @property
    def n_ctx(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._runtime.plan.n_ctx

    @property
    def n_ctx_train(self) -> int:
        """Tokens of the longest text that the model was trained on."""
        return self._runtime.model.hparams.n_ctx_train

    @property
    def n_vocab(self) -> int:
        """Tokens that there are: the length of a row of logits."""
        return self._runtime.model.hparams.vocab_size

    @property
    def recommended(self) -> dict[str, Any]:
        """Sampling keywords that the file sets where a request does not."""
        return recommended(self._runtime.model.sampling)

    @property
    def plan(self) -> MemoryPlan:
        """What the model takes, by purpose."""
        return self._runtime.plan

    @property
    def runtime(self) -> Runtime:
        """What the model consists of, for tools that look inside."""
        return self._open()

    # -- text ------------------------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]) -> Completion:
        """Continue a text or a list of token ids."""
        return self.stream(prompt, **sampling).run()

    def stream(self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]) -> Stream:
        """`generate`, as events while it runs."""
        given = checked("stream", sampling, ANSWER)
        ids = requesting.prompt_ids(self._open(), prompt, given)
        start = Prompt(ids, 1, 0, n_stable=min(given.get("n_stable", 0), len(ids)))
        return self._submit(start, given, Reading(None, None, _grammar(given)))

    def generate_batch(
        self, prompts: Iterable[str | Sequence[int]], **sampling: Unpack[Sampling]
    ) -> list[Completion]:
        """Continue several prompts side by side."""
        return run_all(lambda prompt: self.stream(prompt, **sampling), prompts, "prompts")

    # -- chat ------------------------------------------------------------------------------------

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """Answer a conversation; the turns it shares with the last one are not read again.

        Calls of `tools`, functions in the form that chat APIs share, are apart in `tool_calls`.
        `tool_choice` is "auto", "none", "required" or `{"name": NAME}`.
        """
        return self.stream_chat(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            template_args=template_args,
            **sampling,
        ).run()

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """`chat`, as events while it runs."""
        given = checked("stream_chat", sampling, ANSWER)
        opened = self._open()
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        chat = Conversation.of(messages, tools, template_args, given.get("continue_last", False))
        choice = chosen_tools(chat.tools, tool_choice, parallel_tool_calls)
        chat = chat._replace(tools=choice.told if choice is not None else [])
        if choice is not None and choice.is_required:
            given.pop("stop", None)  # the reply has no text that one could end
        with requesting.counting(opened):
            prompt = chat_prompt(
                opened.tokenizer,
                opened.template,
                chat,
                overflow=given.get("overflow", "error"),
                n_ctx=self.n_ctx,
                most=requesting.most_tokens(opened, given),
                n_stable=given.get("n_stable", 0),
                has_borders=bool(opened.segment.states) or any(opened.segment.groups),
            )
        end = opened.tokenizer.decode(prompt.ids[-16:], special=True)
        read = reading(
            opened.tokenizer,
            opened.template.source_of(chat),
            end,
            choice,
            _grammar(given),
            given.get("reasoning_budget"),
        )
        return self._submit(prompt, given, read)

    def chat_batch(
        self,
        conversations: Iterable[str | Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Completion]:
        """Answer several conversations side by side."""
        return run_all(
            lambda each: self.stream_chat(
                each,
                tools=tools,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                template_args=template_args,
                **sampling,
            ),
            conversations,
            "conversations",
        )

    # -- embeddings, tokens and logits -----------------------------------------------------------

    def embed(
        self,
        texts: str | Sequence[int] | Sequence[str | Sequence[int]],
        *,
        pooling: str | None = None,
        dimensions: int | None = None,
        truncate: bool | None = None,
    ) -> NDArray[np.float32]:
        """A vector of length 1 for each text, or list of token ids: (texts, dimensions).

        `pooling` is "mean" or "last", by default what the model was loaded with or its file says.
        A text longer than the context is an error, or cut there with `truncate`.
        """
        opened = self._open()
        from edgeinfer.embedding import embedding_of  # most programs need none

        given = dict(pooling=pooling, dimensions=dimensions, truncate=truncate)
        return embedding_of(opened, texts, given).result()

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text; with `special`, spellings of control tokens become those."""
        _check_text(text, "text")
        bos, special = TEXT["bos"].check(bos), TEXT["special"].check(special)
        return self._open().tokenizer.encode(text, bos=bos, parse_special=special)

    def detokenize(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; control tokens are left out unless `special`."""
        ids, special = id_list(token_ids, "token_ids"), TEXT["special"].check(special)
        return self._open().tokenizer.decode(ids, special=special)

    def logits(
        self,
        token_ids: Sequence[int],
        *,
        last: int | None = None,
        prefill_chunk: int | None = None,
        batch_with: Sequence[Sequence[int]] | None = None,
    ) -> NDArray[np.float32]:
        """Logits after each of the `last` tokens (all by default), (last, V).

        They are the same bits whatever `prefill_chunk` (rows per step) and `batch_with` (token
        lists in the same steps) are.
        """
        opened = self._open()
        given = checked("logits", {"last": last, "prefill_chunk": prefill_chunk}, LOGITS)
        fits = partial(check_length, n_ctx=self.n_ctx)
        ids = id_list(token_ids, "token_ids", fits)
        given_others = () if batch_with is None else batch_with
        others = [id_list(each, "batch_with", fits) for each in items(given_others, "batch_with")]
        n_rows = given.get("last", len(ids))
        n_bytes = 4 * min(n_rows, len(ids)) * opened.model.hparams.vocab_size
        watching.check_room(n_bytes, f"{n_rows} rows of logits", watching.FEWER_ROWS)
        return opened.engine.logits(ids, n_rows, given.get("prefill_chunk"), others)

    def residuals(self, token_ids: Sequence[int], layer: int) -> NDArray[np.float32]:
        """The stream (T, D) that enters a layer, after each token; that of n_layers: the head.

        The layer is one of those that the model was loaded with as `residuals`.
        """
        return watching.residuals(self._open(), token_ids, layer)

    def attention(
        self, token_ids: Sequence[int], layer: int, *, last: int | None = None
    ) -> NDArray[np.float32]:
        """What the `last` tokens (all by default) give to each position: (last, H, T) in a layer.

        The softmax itself, computed again in NumPy from `residuals`, with every device's bits. A
        layer without attention is refused.
        """
        return watching.attention(self._open(), token_ids, layer, last)

    # -- sessions --------------------------------------------------------------------------------

    def save_session(self, path: str | PathLike[str], of: Stream | Sequence[int]) -> int:
        """Write what is cached of an answer and its prompt, or of tokens; how many tokens that is.

        A file that is there is replaced only once the new one is whole; no folder is made. OSError
        where the system can't write it.
        """
        opened, ids = self._open(), of
        if isinstance(of, Stream):
            of.check_engine(opened.engine, "of")
            ids = (*of.prompt_ids, *of.completion.token_ids)
        return _sessions(opened).save(file_path(path, "path"), id_list(ids, "of"))

    def load_session(self, path: str | PathLike[str]) -> tuple[int, ...]:
        """Put what a file holds into the cache: what begins with its tokens goes on from there.

        SessionError for a file that is damaged, or of another model or kind of cache; OSError
        where the system can't read it.
        """
        return _sessions(self._open()).load(file_path(path, "path"))

    # -- end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """End every generation and give all memory back."""
        self._close()

    def __repr__(self) -> str:
        if "_runtime" not in vars(self):
            return "<LLM, which could not be loaded>"
        opened = self._runtime
        facts = dict.fromkeys([f"context {self.n_ctx}", opened.devices, opened.runs_on])
        state = ", ".join(facts)
        if not self._close.alive:
            state = "closed"
        return f"<LLM {shown(self.name)} {opened.model.quantisation}: {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open model can't be copied or pickled; load it again there")

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> Runtime:
        # In a forked child, too: what threads there were still making will never be there.
        self._runtime.engine.check_alive()
        if not self._close.alive:
            raise ClosedError("the model was closed")
        return self._runtime

    def _submit(self, prompt: Prompt, given: dict[str, Any], read: Reading) -> Stream:
        opened, grammar = self._open(), read.grammar
        tokenizer, stop, is_exact = opened.tokenizer, given.get("stop", ()), grammar is not None
        is_exact |= given.get("continue_last", False)
        answer = AnswerText.open(tokenizer, stop, read.splitter, read.finder, is_exact=is_exact)
        constraint: Constraint | None = None
        if grammar is not None:
            constraint = self._grammars.compile(grammar, tokenizer)
        if read.limit is not None:
            constraint = read.limit(constraint)
        request = requesting.request_of(opened, prompt, given, constraint)
        generation = opened.engine.generation(request)
        # The stream ends it when it is dropped: an interrupt may come before anybody has one.
        stream = Stream(
            generation,
            tokenizer,
            answer,
            model=self.name,
            load_s=opened.load_s,
            owner=self,
            dropped_turns=prompt.n_dropped,
        )
        opened.engine.begin(generation)
        return stream

    @cached_property
    def _grammars(self) -> Grammars:
        from edgeinfer.constraining import Grammars  # most programs need none

        return Grammars()


def _sessions(opened: Runtime) -> Sessions:
    from edgeinfer.engine.session import model_name  # most programs need none

    name = model_name(opened.fingerprint, opened.segment)
    return opened.engine.sessions(name)


def _grammar(given: dict[str, Any]) -> Grammar | None:
    """What the answer must be, where that is asked for."""
    if given.keys().isdisjoint(("schema", "grammar", "regex")):
        return None
    from edgeinfer.constraining import grammar_of

    return grammar_of(given)


def _check_text(value: str, param: str) -> None:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{param} is {shown(value)}; it must be a text", param=param)
