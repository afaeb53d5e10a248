"""What the chat is doing: the conversation, the model, the running answer, what waits.

Knows nothing of widgets; the screen calls `drain` and draws what comes back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeinfer import RepeatGuard
from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.errors import in_chat
from edgeinfer.tui.gauge import Readings
from edgeinfer.tui.loader import ModelLoader
from edgeinfer.tui.params import CHAT_DEFAULTS
from edgeinfer.tui.records import Draft, Node, draft_column, draft_of
from edgeinfer.tui.settings import ChatSettings
from edgeinfer.tui.store import Store
from edgeinfer.tui.titles import TitleWriter
from edgeinfer.tui.turn import Turn

if TYPE_CHECKING:
    from edgeinfer import ChatModel, Completion

_SAVE_SECONDS = 0.2  # with the screen's looks between: what a kill or a power cut takes
_DRAFT = "draft"  # a preference


@dataclass(slots=True)
class News:
    """What happened to the running answer since the last look."""

    text: str = ""
    reasoning: str = ""
    is_over: bool = False
    n_dropped: int = 0


@dataclass(slots=True, eq=False)
class Running:
    """The answer that is being written."""

    node: Node
    turn: Turn
    saved_at: float = 0.0
    n_saved: int = 0  # characters
    thinking_from: float = 0.0
    thinking_s: float = 0.0
    completion: Completion | None = None


@dataclass(slots=True)
class Session:
    """State and its changes. Every method is called by the screen's thread."""

    settings: ChatSettings
    store: Store
    conversation: Conversation = field(init=False)
    model: ChatModel | None = None
    path: str = ""  # of the model
    loader: ModelLoader | None = None
    next_path: str = ""  # to load after what loads
    running: Running | None = None
    queue: list[Draft] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    n_ctx: int | None = None  # that is asked for in this chat
    open_n_ctx: int | None = None  # that was asked for when the model was opened
    readings: Readings = field(default_factory=Readings)
    n_dropped: int = 0  # turns that are not read any more, as last told
    titles: TitleWriter = field(default_factory=TitleWriter)

    def __post_init__(self) -> None:
        self.sampling = dict(self.settings.sampling)
        self.conversation = Conversation(self.store, system=self.settings.system)

    @property
    def is_served(self) -> bool:
        """Whether models run elsewhere: what is not told of them is not known."""
        return self.settings.server is not None

    @property
    def _preference(self) -> str:
        """Under which the store keeps the model that was opened last."""
        server = self.settings.server
        return "model" if server is None else f"model at {server.place}"

    @property
    def last_path(self) -> str | None:
        """The model that was opened last, here or on the server."""
        return self.store.preference(self._preference)

    @property
    def is_ready(self) -> bool:
        return self.model is not None and self.running is None and self.loader is None

    @property
    def notice(self) -> str:
        """Why the conversation is not being kept; "" while it is, and where none shall be."""
        return self.store.notice(self.conversation.id)

    # -- the model -------------------------------------------------------------------------------

    def load(self, path: str) -> None:
        """Load a model in the background; the one that is open goes once that can work."""
        if self.loader is not None:
            self.next_path = path
            return
        replaces = self.model is not None
        self.loader = ModelLoader(self.settings, path, self.n_ctx, replaces=replaces)
        if self.model is None:
            self.readings.start_loading(path)

    def hand_over(self) -> None:
        """Give the open model to the loader, which closes it: that may take seconds."""
        assert self.loader is not None and self.model is not None
        self.stop()
        self.titles.cancel()
        self.readings.start_loading(self.loader.path)
        self.loader.give(self.model, self.path, self.open_n_ctx)
        self.model = None

    def take_loaded(self) -> BaseException | None:
        """Once the loader is done, its model; the error when it failed.

        The model that was open before is then open still, or again where that could be.
        """
        assert self.loader is not None and self.loader.task.is_over
        loader, self.loader = self.loader, None
        error = loader.task.error or loader.error
        if loader.task.error is None:
            self.model, self.path = loader.task.result, loader.path
            self.open_n_ctx = loader.n_ctx
            if loader.error is not None:
                self.n_ctx = loader.n_ctx
            self.conversation.set_model(self.model.name)
            self.readings.start_model(self.model)
        elif self.model is None:
            self.readings.fail_loading()
        if error is None:
            self.store.set_preference(self._preference, self.path)
        if self.next_path:
            path, self.next_path = self.next_path, ""
            self.load(path)
        return error

    def take_draft(self) -> Draft:
        """What was being written when a chat ended before."""
        draft = draft_of(self.store.preference(_DRAFT))
        if not draft.is_empty:
            self.store.set_preference(_DRAFT, "")
        return draft

    def end(self, draft: Draft) -> None:
        """Keep what there is, what waits to be asked and what is being written included."""
        self.stop()
        self.titles.cancel()
        while self.queue:
            self.ask(self.queue.pop(0))
        if not draft.is_empty:
            self.store.set_preference(_DRAFT, draft_column(draft))
        self.store.close()

    def tend_title(self) -> bool:
        """Let the model find a title while it has nothing else to do; whether it has one."""
        is_idle = self.is_ready and not self.queue and self.store.path is not None
        model = self.model if is_idle else None
        return self.titles.tend(self.conversation, model, time.monotonic())

    # -- asking ----------------------------------------------------------------------------------

    def ask(self, draft: Draft) -> Node:
        """Add the user's message to the branch; `answer` is next."""
        self.conversation.model = self.model.name if self.model else ""
        return self.conversation.ask(draft.text, draft.attachments, self.conversation.leaf)

    def edit(self, node: Node, draft: Draft) -> Node:
        """Ask anew beside an earlier message."""
        return self.conversation.ask(draft.text, draft.attachments, node.parent)

    def answer(self) -> Node:
        """Let the model answer the branch on show."""
        assert self.model is not None and self.conversation.leaf is not None
        self.titles.cancel()
        messages = self.conversation.for_model()
        node = self.conversation.answer(self.conversation.leaf)
        sampling = {name: value for name, value in self.sampling.items() if value is not None}
        guard = RepeatGuard() if self.settings.stops_repeats else None
        turn = Turn(self.model, messages, sampling, guard)
        self.running = Running(node, turn)
        self.readings.start_turn()
        turn.start()
        return node

    def retry(self, answer: Node) -> bool:
        """Make the message before an answer the end, so that `answer` writes another."""
        if answer.parent is None:
            return False
        self.conversation.show(answer.parent)
        return True

    def undo(self) -> Node | None:
        """Take the last exchange off the branch; its user message."""
        node = self.conversation.last("user")
        if node is not None:
            self.conversation.show(node.parent)
        return node

    # -- while it runs ---------------------------------------------------------------------------

    def drain(self) -> News:
        """Take what the model has said; write down what there is of the answer now and then."""
        running, news = self.running, News()
        if running is None:
            return news
        turn, node = running.turn, running.node
        is_over = turn.is_over  # before the queue is emptied: nothing can come after
        while turn.events:
            at, event = turn.events.popleft()
            if event.type == "prompt_progress":
                self.readings.take_prompt(event.done, event.total)
            elif event.type == "delta":
                self._take_delta(running, at, event.text, event.reasoning)
                news.text += event.text
                news.reasoning += event.reasoning
            else:
                running.completion = event.completion
        node.content += news.text
        node.reasoning += news.reasoning
        if turn.n_dropped > self.n_dropped:
            news.n_dropped = self.n_dropped = turn.n_dropped
        if is_over:
            news.is_over = True
            is_cut = turn.is_stopped and running.completion is None
            self._end("failed" if turn.error else "stopped" if is_cut else "done")
        else:
            self._save_partial(running)
        return news

    def stop(self) -> News | None:
        """End the running answer now and keep what there is; None when nothing runs."""
        running = self.running
        if running is None:
            return None
        running.turn.stop()
        news = self.drain()
        if self.running is not None:
            self._end("stopped")
        news.is_over = True
        return news

    def _take_delta(self, running: Running, now: float, text: str, reasoning: str) -> None:
        if reasoning and not running.thinking_from:
            running.thinking_from = now
        if reasoning or (text and running.thinking_from and not running.thinking_s):
            running.thinking_s = now - running.thinking_from if not reasoning else 0.0
        if self.is_served:  # an event of a server may be many tokens
            self.readings.take_text(now)
        else:
            self.readings.take_token(now)

    def thinking_seconds(self) -> float:
        """How long the running answer has been thinking, or thought."""
        running = self.running
        if running is None or not running.thinking_from:
            return 0.0
        return running.thinking_s or time.perf_counter() - running.thinking_from

    def _save_partial(self, running: Running) -> None:
        now, node = time.perf_counter(), running.node
        n = len(node.content) + len(node.reasoning)
        if n > running.n_saved and now - running.saved_at >= _SAVE_SECONDS:
            self.conversation.save(node)
            running.saved_at, running.n_saved = now, n

    def _end(self, state: str) -> None:
        running = self.running
        assert running is not None
        node, completion = running.node, running.completion
        self.running = None
        node.state = "stopped" if state == "stopped" else "failed" if state == "failed" else "done"
        if running.thinking_from:
            took = running.thinking_s or time.perf_counter() - running.thinking_from
            node.details["thinking_s"] = round(took, 1)
        if running.turn.error is not None:
            drops = (CHAT_DEFAULTS | self.sampling)["overflow"] == "drop-turns"
            node.details["error"] = in_chat(running.turn.error, drops_turns=drops)
        if running.turn.is_repeating:
            node.details["finish"] = "repeats"
        if self.settings.server is not None:
            node.details["server"] = self.settings.server.place
        if completion is not None:
            node.details |= self._facts(completion)
        self.readings.end_turn(completion, state)
        node.details.setdefault("n_tokens", self.readings.n_answer)
        node.details.setdefault("tok_s", round(self.readings.rate, 1))
        self.conversation.save(node)

    def _facts(self, completion: Completion) -> dict[str, Any]:
        """What is kept of an answer beside its text."""
        facts: dict[str, Any] = {
            "model": completion.model,
            "n_tokens": completion.usage.completion_tokens,
            "n_prompt": completion.usage.prompt_tokens,
            "n_cached": completion.usage.cached_tokens,
            "tok_s": round(completion.timings.decode_tok_s, 1),
            "first_s": round(completion.timings.first_token_s, 3),
            "finish": completion.finish_reason,
            "seed": completion.seed,
        }
        if completion.logprobs is not None and self.model is not None:
            name = self.model.detokenize
            facts["logprobs"] = [
                [each.text, each.logprob, [[name([id], special=True), p] for id, p in each.top]]
                for each in completion.logprobs
            ]
        # What a server did not tell is 0.
        return {name: fact for name, fact in facts.items() if fact or not self.is_served}
