"""Templates and vocabularies that would freeze or fill the machine, and sound ones that must not.

What a template does in its own process ends there: here time, memory and threads stay ours.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer import LLM, platform
from edgeinfer.errors import InvalidRequestError, TemplateError
from edgeinfer.text import template_engine
from edgeinfer.text.chat import ChatTemplate
from edgeinfer.text.hiding import Hiding
from edgeinfer.text.messages import Conversation, Message
from edgeinfer.text.prompt import chat_prompt
from edgeinfer.text.template_engine import MAX_SOURCE, TemplateEngine

from .models_for_tests import tiny_model

DataFile = Callable[[str], Path]
ROOT = Path(__file__).resolve().parent.parent
HELLO: list[Message] = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[TemplateEngine]:
    engine = TemplateEngine()
    yield engine
    engine.close()


def grown(start: str, step: str, n: int = 60) -> str:
    loop = f"{{% for i in range({n}) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}"


NESTED = grown("[1]", "[ns.x, ns.x]")
HUGE = "(10 ** 4000) ** 4000"

# By kind; what only one of them does is not named elsewhere in the code.
ATTACKS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nested compared": NESTED
    + grown("[1]", "[ns.x, ns.x]").replace("ns", "nt")
    + "{{ ns.x == nt.x }}",
    "nested hashed": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "nested printed": NESTED + "{{ ns.x }}",
    "nested to JSON": NESTED + "{{ ns.x | tojson }}",
    "deep printed": grown("1", "[ns.x]", 90000) + "{{ ns.x }}",
    "division": f"{{{{ ({HUGE}) // 7 ** 99999 }}}}",
    "remainder": f"{{{{ ({HUGE}) % 7 ** 99999 }}}}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "digits": f"{{{{ ({HUGE}) | string }}}}",
    "repeated text": "{{ 'a' * 10 ** 10 }}",
    "repeated list": "{{ [1] * 10 ** 10 }}",
    "range": "{{ range(10 ** 9) | list }}",
    "expandtabs": "{{ ('\\t' * 10 ** 6).expandtabs(1000) }}",
    "JSON indent": "{{ (range(99999) | list) | tojson(indent=10 ** 5) }}",
    "format method": "{{ '{:>1000000000}'.format('a') }}",
    "format argument": "{{ '{:{w}}'.format(1, w=10 ** 10) }}",
    "format operator": "{{ '%9999999999d' % 1 }}",
    "format filter": "{{ '%*d' | format(10 ** 9, 1) }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "zfill": "{{ 'a'.zfill(10 ** 10) }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "slice": "{{ [1] | slice(10 ** 9) | list }}",
    "wordwrap": "{{ ('a ' * 10 ** 6) | wordwrap(1, wrapstring='b' * 10 ** 4) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "join": "{{ (range(99999) | list) | join('a' * 100000) }}",
    "indent": "{{ ('a\\n' * 10 ** 6) | indent(10 ** 6) }}",
    "groupby": "{{ (range(99999) | list) * 99 | groupby('real') | list | length }}",
    "striptags": "{{ ('<!---->' * 10 ** 7) | striptags | length }}",
    "urlize": "{{ ('www.a.b ' * 10 ** 6) | urlize | length }}",
    "translate": "{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 6}) }}",
    "date": "{{ strftime_now('%Y' * 10 ** 7) }}",
    "doubled text": grown("'ab'", "ns.x + ns.x") + "{{ ns.x | length }}",
    "doubled list": grown("[1]", "ns.x + ns.x") + "{{ ns.x | length }}",
    "doubled block": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "long text": "{% for i in range(99999) %}" + "a" * 1000 + "{% endfor %}",
    "long error": "{{ raise_exception('a' * 10 ** 10) }}",
    "parentheses": "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "minuses": "{{" + "-" * 60000 + "1}}",
    "sums": "{{ 1" + "+1" * 30000 + "}}",
    "blocks": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "statements": "{{a}}" * 13000 + "{{ raise_exception('') }}",
    "source": "a" * (MAX_SOURCE + 1),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_attack_ends_as_a_template_error(
    kind: str, engine: TemplateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_engine, "_SECONDS", 0.1)
    start = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(ATTACKS[kind], engine=engine).render(HELLO)
    assert time.monotonic() - start < 60
    assert len(str(caught.value)) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ATTACKS)
def test_attack_ends_within_the_real_budget(kind: str) -> None:
    """In a process of its own, whose children's time and memory the system counts."""
    code = (
        "import sys, time, resource\nfrom edgeinfer.text.chat import ChatTemplate\n"
        "from edgeinfer.errors import TemplateError\nfrom edgeinfer.platform import peak_rss\n"
        "template, start, before = ChatTemplate(sys.stdin.read()), time.monotonic(), peak_rss()\n"
        "try:\n    template.render([{'role': 'user', 'content': 'x'}])\n"
        "except TemplateError as error:\n    told = str(error)\n"
        "template.close()\nended = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(time.monotonic() - start, ended.ru_utime + ended.ru_stime,\n"
        "    (ended.ru_maxrss >> 10) + (peak_rss() - before >> 20), told)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=ATTACKS[kind], capture_output=True, text=True, cwd=ROOT
    )
    wall, processor, mebibytes, told = done.stdout.strip().split(" ", 3)
    print(f"{kind}: {float(wall):.2f} s, of a processor {float(processor):.2f}, {mebibytes} MiB")
    assert float(wall) < 10 and float(processor) < 2 and float(mebibytes) < 150 and told


PIECES = st.sampled_from(
    ["'a' * n", "range(n) | list", "ns.x + ns.x", "[ns.x, ns.x]", "(ns.x, ns.x)", "{'k': ns.x}",
     "ns.x ~ ns.x", "ns.x * n", "ns.x | string", "ns.x | list", "ns.x | tojson(indent=n)",
     "ns.x | batch(n, 0) | list", "ns.x | join(ns.x)", "ns.x | sort", "ns.x | unique | list",
     "ns.x | indent(n)", "ns.x | center(n)", "ns.x | wordwrap(1)", "ns.x | urlize", "ns.x | pprint",
     "ns.x | groupby(0)", "ns.x == ns.x", "n ** n", "n ** 99 // 7", "ns.x % n", "ns.x | length",
     "('%' ~ n ~ 's') % ns.x", "('{:' ~ n ~ '}').format(n)", "ns.x | reverse | list", "[ns.x]",
     "ns.x | xmlattr", "ns.x | truncate(n)", "ns.x | replace('a', ns.x)", "ns.x | map('list')"]
)  # fmt: skip


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(PIECES, min_size=1, max_size=5),
    n=st.sampled_from([3, 10**3, 10**6, 10**10, 10**400]),
    times=st.sampled_from([1, 50, 99999]),
)
def test_any_mixture_ends_and_the_engine_goes_on(
    steps: list[str], n: int, times: int, engine: TemplateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_engine, "_SECONDS", 0.05)
    sets = "".join(f"{{% set ns.x = {step} %}}" for step in steps)
    source = f"{{% set n = {n} %}}{{% set ns = namespace(x='a\\tb') %}}"
    source += f"{{% for i in range({times}) %}}{sets}{{% endfor %}}{{{{ ns.x }}}}"
    start = time.monotonic()
    try:
        ChatTemplate(source, engine=engine).render(HELLO)
    except TemplateError:
        pass
    assert time.monotonic() - start < 60
    monkeypatch.undo()
    assert ChatTemplate("ok", engine=engine).render(HELLO) == "ok"


def test_other_threads_run_while_a_template_is_stuck(
    engine: TemplateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_engine, "_SECONDS", 0.5)
    done, n_turns = threading.Event(), 0

    def watch() -> None:
        nonlocal n_turns
        while not done.wait(0.005):
            n_turns += 1

    thread = threading.Thread(target=watch)
    thread.start()
    with pytest.raises(TemplateError, match="more time"):
        ChatTemplate("a\n{{ 9 ** 99999999 // 7 }}", engine=engine).render(HELLO)
    done.set()
    thread.join()
    assert n_turns > 5  # one or two where it holds them up


def test_a_loop_is_named_by_its_line(
    engine: TemplateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_engine, "_SECONDS", 0.3)
    with pytest.raises(TemplateError, match="line [23]: .* more time") as caught:
        ChatTemplate("a\n" + ATTACKS["loops"], engine=engine).render(HELLO)
    assert caught.value.line in (2, 3)


def test_all_renders_of_a_request_share_one_budget(
    engine: TemplateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "{% for i in range(99999) %}{% set x = i ** 9 %}{% endfor %}{{ messages[0].content }}"
    monkeypatch.setattr(template_engine, "_SECONDS", 60)
    template = ChatTemplate(source, engine=engine)
    budget = template_engine.Budget()
    template._attempt([{"content": ""}], {}, budget)
    once = 60 - budget.seconds
    # Once is allowed, and so would ten be by itself; the ten of a first request are not.
    monkeypatch.setattr(template_engine, "_SECONDS", 4 * once)
    with pytest.raises(TemplateError, match="more time"):
        template.render(HELLO)


TWO_TOKENS: Any = {"max_tokens": 2, "logit_bias": {257: -1e9}}  # and no end before


def test_a_model_is_loaded_and_generates_whatever_its_template_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_engine, "_SECONDS", 0.2)
    path = tiny_model(tmp_path, chat_template=ATTACKS["division"])
    with LLM(path, device="reference") as llm:
        assert llm.generate("a", **TWO_TOKENS).usage.completion_tokens == 2
        with pytest.raises(TemplateError):
            llm.chat("a", max_tokens=2)
        assert llm.generate("a", **TWO_TOKENS).usage.completion_tokens == 2


# Where it runs


def test_a_model_runs_without_the_engine_of_templates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = template_engine.PathFinder.find_spec

    def find_others(name: str, *rest: Any) -> Any:
        return None if name in ("jinja2", "markupsafe") else find(name, *rest)

    monkeypatch.setattr(template_engine.PathFinder, "find_spec", find_others)
    with LLM(tiny_model(tmp_path, chat_template="{{ messages }}"), device="reference") as llm:
        assert llm.generate("a", **TWO_TOKENS).usage.completion_tokens == 2
        with pytest.raises(TemplateError, match="pip install jinja2"):
            llm.chat("a")


def test_the_process_runs_nothing_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    for name in ("jinja2", "markupsafe", "json", "marshal", "sitecustomize", "edgeinfer"):
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "json.py"))
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render(HELLO) == "x"
    assert not ran.exists()
    template.close()


ASKS = """
import sys
sys.path = sys.argv[1:]
from edgeinfer.text.jinja_process import Request, _Templates
answer = _Templates().answer(Request("{% for i in [1] %}{{ i | tojson }}{% endfor %}", {}, 1.0), 9)
print(answer.text, "jinja2.loaders" in sys.modules, "pickle" in sys.modules)
"""


@pytest.mark.parametrize("needs_all", [False, True])
def test_jinja_comes_without_its_loaders_unless_it_needs_them(
    tmp_path: Path, needs_all: bool
) -> None:
    import jinja2

    shutil.copytree(Path(jinja2.__file__).parent, tmp_path / "jinja2")
    if needs_all:  # as another version might
        with (tmp_path / "jinja2" / "sandbox.py").open("a") as file:
            file.write("\nfrom jinja2 import Environment as _Whole\n")
    path = [str(tmp_path), *(folder for folder in sys.path if folder)]
    done = subprocess.run(
        [sys.executable, "-c", ASKS, *path], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["1", str(needs_all), str(needs_all)], done.stderr


def test_a_frozen_program_that_can_not_start_itself_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(TemplateError, match="frozen.*run --raw"):
        ChatTemplate("x").render(HELLO)


def test_a_process_that_was_killed_is_replaced(engine: TemplateEngine) -> None:
    template = ChatTemplate("{{ messages[0].content }}", engine=engine)
    assert template.render(HELLO) == "x"
    assert engine._worker is not None
    engine._worker._process.kill()
    engine._worker._process.wait()
    assert template.render(HELLO) == "x"


def test_what_is_known_to_end_is_rendered_again(
    engine: TemplateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may be ended by others: what it rendered before is not called too slow for that."""
    is_usable, n_kills = template_engine._Worker.is_usable, 0

    def killed(worker: Any) -> bool:
        nonlocal n_kills
        if not is_usable(worker):
            return False
        n_kills += 1
        worker._process.kill()
        worker._process.wait()
        return True

    assert engine.render("{{ a }}", {"a": "b"}, template_engine.Budget()) == "b"
    with monkeypatch.context() as patched:
        patched.setattr(template_engine._Worker, "is_usable", killed)
        assert engine.render("{{ a }}", {"a": "c"}, template_engine.Budget()) == "c"
        assert n_kills == 1
        with pytest.raises(template_engine.LimitError):  # of a template that nobody knows
            engine.render("{{ a }}{{ b }}", {"a": "c"}, template_engine.Budget())
    assert engine.render("{{ a }}", {"a": "d"}, template_engine.Budget()) == "d"


def test_what_was_quick_before_does_not_run_for_ever(
    engine: TemplateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_engine, "_SECONDS", 0.1)
    loop = "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}x"
    assert engine.render(loop, {"n": 1}, template_engine.Budget()) == "x"
    for _ in range(2):
        with pytest.raises(template_engine.LimitError, match="time"):
            engine.render(loop, {"n": 90_000}, template_engine.Budget())
    assert engine.render(loop, {"n": 1}, template_engine.Budget()) == "x"


def test_threads_share_an_engine(engine: TemplateEngine) -> None:
    wrong = []

    def render(n: int) -> None:
        template = ChatTemplate("{{ messages[0].content }}!", engine=engine)
        for i in range(20):
            text = f"{n} {i}" * 999
            if template.render([{"role": "user", "content": text}]) != text + "!":
                wrong.append(text)

    threads = [threading.Thread(target=render, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("source", ["x", "{{ 9 ** 99999999 // 7 }}"])
def test_the_process_dies_with_its_parent(source: str) -> None:
    code = (
        "import sys, os, threading, time, signal\n"
        "from edgeinfer.text.template_engine import Budget, TemplateEngine\n"
        "engine, budget = TemplateEngine(), Budget()\nengine.render('x', {}, budget)\n"
        "print(engine._worker._process.pid, flush=True)\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "budget.seconds = 0.5\nengine.render(sys.argv[1], {}, budget)\ntime.sleep(9)\n"
    )
    command = [sys.executable, "-c", code, source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    end = time.monotonic() + 120
    while is_running(int(done.stdout)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(int(done.stdout))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return state != "Z"


def test_limits_hold_for_this_system() -> None:
    """A process that is to be ended is, and is told a little before."""
    code = (
        "from edgeinfer.platform import ProcessLimits\nlimits = ProcessLimits(64 << 20)\n"
        "assert limits.ends_loops\n"
        "try:\n    bytes(256 << 20)\nexcept MemoryError:\n    print('memory')\n"
        "limits.allow_seconds(0.1)\n"
        "try:\n    for _ in iter(int, 1): pass\n"
        "except TimeoutError:\n    print('time', flush=True)\n"
        "for _ in iter(int, 1): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert platform.ended_for_time(done.returncode)
    expected = ["memory", "time"] if sys.platform.startswith("linux") else ["time"]
    assert done.stdout.split() == expected


# What is sound


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ '# %s: %s' | format('user', messages[0].content) }}", "# user: in 2024, 10000 x"),
        ("{{ missing | default(4096) }}", "4096"),
        ("{{ [1024, 2048].index(2048) }}", "1"),
        ("{{ '3000' | int(2000) }} {{ 'x' | int(2000) }}", "3000 2000"),
        ("{{ ['a', 'b', 'c'] | join('-' * 3000) | length }}", "6003"),
        ("{{ 'a' | truncate(2000) }}", "a"),
        ("{{ '%s and %5.2f' % ('a', 1.5) }}", "a and  1.50"),
        ("{{ '{:>8}|{:4096}'.format('a', 1) | length }}", "4105"),
        ("{{ 2048 // 1000 }} {{ 2 ** 20 % 1000 }}", "2 576"),
        ("{{ messages[0].content | wordwrap(1200) }}", "in 2024, 10000 x"),
        ("{{ [1, 2, 3] | batch(2, 0) | list }}", "[[1, 2], [3, 0]]"),
        ("{{ {'a': [1]} | tojson(indent=4) | length }}", "30"),
    ],
)
def test_what_public_templates_do_renders(
    source: str, expected: str, engine: TemplateEngine
) -> None:
    chat: list[Message] = [{"role": "user", "content": "in 2024, 10000 x"}]
    assert ChatTemplate(source, engine=engine).render(chat) == expected


def test_thousands_of_messages_take_a_part_of_the_budget(
    data_file: DataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data_file("templates/Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    roles = ("user", "assistant")
    chat: list[Message] = [{"role": roles[i % 2], "content": f"text {i}"} for i in range(2001)]
    usual = template_engine.Budget().seconds
    monkeypatch.setattr(template_engine, "_SECONDS", 60)
    template, budget = ChatTemplate(source), template_engine.Budget()
    text = template.render(chat)
    template._attempt([{**each} for each in chat], {}, budget)
    template.close()
    assert text.count("<|im_start|>") == 2002
    assert 0 < 60 - budget.seconds < usual / 2


def test_a_conversation_of_megabytes_renders(engine: TemplateEngine) -> None:
    source = "{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}"
    text = "\U0001f999 llama " * 250_000
    template = ChatTemplate(source, engine=engine)
    assert template.render([{"role": "user", "content": text}]) == "user" + text


# Text that stays text, whatever the vocabulary and the message hold


class Vocabulary:
    bos_id = None

    def __init__(self, *specials: str) -> None:
        self.special_texts = specials
        self.seen = ""

    def encode_marked(
        self, text: str, restore: object, *, bos: bool | None = None, most: int | None = None
    ) -> list[int]:
        self.seen = text
        return [len(text.translate(restore))]  # type: ignore[arg-type]


def test_a_message_may_hold_every_private_character_of_the_first_plane(
    engine: TemplateEngine,
) -> None:
    vocabulary = Vocabulary("<e>", "#")
    text = "".join(map(chr, range(0xE000, 0xF900))) + "<e>#"
    template = ChatTemplate("{{ messages[0].content }}", engine=engine)
    chat = Conversation.of([{"role": "user", "content": text}])
    ids = chat_prompt(vocabulary, template, chat).ids
    assert ids == [len(text)] and "<e>" not in vocabulary.seen and "#" not in vocabulary.seen
    for start, stop in ((0xF0000, 0xFFFFE), (0x100000, 0x10FFFE)):
        text += "".join(map(chr, range(start, stop)))
    with pytest.raises(InvalidRequestError, match="private-use"):
        Hiding(("<e>",), text)


@pytest.mark.parametrize(
    "specials",
    [
        ["<" + "a" * 100_000 + ">"],
        ["<" + "a" * 30_000 + str(i) for i in range(3)],
        [f"<{i:06}" + "a" * 273 for i in range(20_000)],
    ],
)
def test_hiding_takes_no_more_than_the_vocabulary(specials: list[str]) -> None:
    import tracemalloc

    start = time.thread_time()
    tracemalloc.start()
    hiding = Hiding(tuple(specials), "x")
    hidden = hiding(specials[0][1:] + "b <" + "a" * 5000 + specials[0], "user")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.thread_time() - start < 8
    assert peak < 4 * sum(map(len, specials)) + (20 << 20)
    assert specials[0] not in hidden


LETTERS = st.text("ab<>", min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(
    specials=st.lists(LETTERS, min_size=1, max_size=6, unique=True),
    text=st.text("ab<> ", max_size=12),
    data=st.data(),
    longest=st.sampled_from([2, 3, 256]),
    monkeypatch=st.builds(pytest.MonkeyPatch),
)
def test_no_template_completes_what_a_message_begins(
    specials: list[str],
    text: str,
    data: st.DataObject,
    longest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgeinfer.text.hiding._LONGEST", longest)
    try:
        hiding = Hiding(tuple(specials), [specials, text])
        hidden = hiding(text, "user")
    finally:
        monkeypatch.undo()
    assert hidden.translate(hiding.restore) == text
    special = data.draw(st.sampled_from(specials))
    cut = data.draw(st.integers(0, len(special)))
    core = hidden.strip()
    for joined, at in ((special[:cut] + core, cut), (core + special[cut:], len(core))):
        begin = joined.find(special)
        while begin >= 0 and core:
            crosses = begin < at < begin + len(special)
            inside = begin >= at if joined.endswith(core) else begin + len(special) <= at
            assert not crosses and not inside
            begin = joined.find(special, begin + 1)
