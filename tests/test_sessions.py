"""Conversations in files: gone on with bit by bit, refused where they don't fit, never half."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import platform
from edgeinfer.batch import StepLimits, StepRequest
from edgeinfer.engine import session
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.sequence import Finished, Token
from edgeinfer.engine.session import _DIGEST, _digest
from edgeinfer.errors import BusyError, InvalidRequestError, SessionError
from edgeinfer.graph import Segment

from .backends import backend
from .test_prefix_reuse import KINDS, VOCAB, ask, check_all_is_given_back, opened, text, told

PROMPT = text(60, 133)


def engine_of(name: str, model: Segment, n_ctx: int = 400) -> Engine:
    request = StepRequest(n_ctx, 2, 2, n_states=9 if model.states else 0)
    limits = StepLimits.of(request, VOCAB, model.groups, 64)
    return Engine(backend(name).compile(model, limits), limits, n_ctx, model.output.dim)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("full", "cpu"), ("windows", "cpu"), ("windows", "shim"), ("hybrid", "cpu")]
    + [("hybrid", "shim"), ("hybrid", "cpu+reference")],
)
def test_a_conversation_goes_on_in_another_engine(
    models: dict[str, Segment], kind: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "talk.session"
    first = engine_of(name, models[kind])
    answer = told(first.submit(ask(PROMPT, 20)))[0]
    ids = [*PROMPT, *answer]
    assert first.sessions("m").save(path, ids) == len(ids) - 1
    more = ask([*ids, 3, 4, 5], 20)
    expected = told(first.submit(more))
    check_all_is_given_back(first)
    first.close()
    second = engine_of(name, models[kind])
    assert second.sessions("m").load(path) == tuple(ids[:-1])
    assert second.sessions("m").save(tmp_path / "again", ids) == len(ids) - 1
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert told(second.submit(more)) == expected
    check_all_is_given_back(second)
    second.close()


@pytest.mark.parametrize("name", ["cpu", "shim"])
@pytest.mark.parametrize("contexts", [(400, 160), (160, 400)])
def test_a_context_of_another_length_goes_on(
    models: dict[str, Segment], name: str, contexts: tuple[int, int], tmp_path: Path
) -> None:
    """Of a window what it sees is kept, also where a ring of its own would be no shorter."""
    path, asked, saved = tmp_path / "talk.session", [], []
    for n_ctx in contexts:
        engine = engine_of(name, models["windows"], n_ctx)
        answer = told(engine.submit(ask(PROMPT, 4)))[0]
        asked.append(told(engine.submit(more := ask([*PROMPT, *answer, 3, 4, 5], 15)))[0])
        engine.sessions("m").save(path, PROMPT)
        saved.append(path.read_bytes())
        engine.close()
    assert saved[0] == saved[1] and asked[0] == asked[1]
    for n_ctx in contexts:
        engine = engine_of(name, models["windows"], n_ctx)
        ids = engine.sessions("m").load(path)
        assert told(engine.submit(more))[:2] == (asked[0], len(ids))
        check_all_is_given_back(engine)
        engine.close()


@pytest.mark.parametrize(
    ("kind", "name"), [("full", "cpu"), ("windows", "shim"), ("full", "cpu+reference")]
)
def test_a_file_holds_nothing_of_the_conversation_that_it_began_with(
    models: dict[str, Segment], kind: str, name: str, tmp_path: Path
) -> None:
    """Whatever else was in the cache: its bytes are those of a cache that had nothing else."""
    parted = [*PROMPT[:105], 1, 2, 3]  # in the middle of a page that the other had filled
    first, second = engine_of(name, models[kind]), engine_of(name, models[kind])
    told(first.submit(ask(PROMPT, 20)))
    for engine, path in ((first, tmp_path / "first"), (second, tmp_path / "second")):
        answer, n_cached, _ = told(engine.submit(ask(parted, 4)))
        assert n_cached == (105 if engine is first else 0)
        assert engine.sessions("m").save(path, [*parted, *answer]) == 111
        engine.close()
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_session_passes_through_memory_in_parts(
    models: dict[str, Segment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No plan has room for whole runs, which are 64 MiB of a model of 4 B; the file is the same."""
    paths, moved = [tmp_path / "whole", tmp_path / "parts"], list[tuple[str, int]]()
    with opened(models["windows"]) as (engine, program):

        def counted(name: str) -> Any:
            call = getattr(program.program, name)
            return lambda group, pages, *data: (
                moved.append((name, len(pages))) or call(group, pages, *data)
            )

        told(engine.submit(ask(text(61, 600), 5)))
        for n_bytes, path in ((1 << 40, paths[0]), (1, paths[1])):
            monkeypatch.setattr(session, "_PART_BYTES", n_bytes)
            assert engine.sessions("m").save(path, text(61, 600)) == 600
            for name in ("read_pages", "write_pages"):
                monkeypatch.setattr(program, name, counted(name), raising=False)
        assert engine.forget()
        assert len(engine.sessions("m").load(paths[0])) == 600
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert {(name, n) for name, n in moved if n} == {("read_pages", 1), ("write_pages", 1)}
        damaged = bytearray(paths[0].read_bytes())
        damaged[-_DIGEST - 1] ^= 1
        paths[1].write_bytes(damaged)
        assert engine.forget()
        with pytest.raises(SessionError, match="a part of it"):
            engine.sessions("m").load(paths[1])
        assert told(engine.submit(ask(text(61, 600), 5)))[1:] == (0, "new")
        check_all_is_given_back(engine)


@pytest.fixture(scope="module")
def saved(models: dict[str, Segment], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "talk.session"
    with opened(models["hybrid"]) as (engine, _):
        told(engine.submit(ask(PROMPT, 5)))
        engine.sessions("m").save(path, PROMPT)
    return path


def test_what_is_damaged_is_refused(
    models: dict[str, Segment], saved: Path, tmp_path: Path
) -> None:
    data, rng, path = saved.read_bytes(), random.Random(5), tmp_path / "damaged"
    n_head = data.index(b"}") + 1
    damaged = [data[:n] for n in (0, 5, 20, 23, 24, 60, n_head, n_head + 9, len(data) - 1)]
    damaged += [data + b"x", data[:20] + b"\xff" * 4 + data[24:], rng.randbytes(9000)]
    damaged.append(data[:24] + b"[" * (n_head - 24) + data[n_head:])
    for number in ("0", "-3", "true", "1e300", "99999999999999999999999", '"9"', "null"):
        head = data[24:n_head].replace(b'"n_tokens": 132', f'"n_tokens": {number}'.encode())
        damaged.append(data[:20] + len(head).to_bytes(4, "little") + head + data[n_head:])
    head, n_ids = data[24:n_head].replace(b'"page": 32', b'"page": 32.0'), 4 * 132
    begin = data[:20] + len(head).to_bytes(4, "little") + head + data[n_head : n_head + n_ids]
    damaged.append(begin + _digest(begin) + data[n_head + n_ids + _DIGEST :])
    for at in [*rng.sample(range(len(data)), k=40), 0, 21, 30, n_head + 1]:
        damaged.append(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
    with opened(models["hybrid"]) as (engine, _):
        for each in damaged:
            path.write_bytes(each)
            with pytest.raises(SessionError):
                engine.sessions("m").load(path)
            assert all(pool.n_free == pool.n_pages for pool in engine._store._kinds)
        for no_file in (tmp_path, Path("/dev/zero")):
            if no_file.exists():
                with pytest.raises(SessionError, match="no file"):
                    engine.sessions("m").load(no_file)
                with pytest.raises(SessionError, match="no file"):
                    engine.sessions("m").save(no_file, PROMPT)
                assert not no_file.is_file()
        with pytest.raises(FileNotFoundError):
            engine.sessions("m").load(tmp_path / "absent")
        assert engine.sessions("m").load(saved) == tuple(PROMPT[:132])


def test_what_does_not_fit_is_refused_and_says_what(
    models: dict[str, Segment], saved: Path
) -> None:
    def refused(model: Segment, name: str = "m", **options: Any) -> str:
        with opened(model, **options) as (engine, _):
            with pytest.raises(SessionError) as error:
                engine.sessions(name).load(saved)
            check_all_is_given_back(engine)
        return str(error.value)

    assert "another model" in refused(models["hybrid"], "n")
    assert "kv_type" in refused(models["full"])
    assert "132 tokens, the context 128; raise n_ctx" in refused(models["hybrid"], n_ctx=128)
    with opened(models["hybrid"], slots=1) as (engine, _):
        with pytest.raises(InvalidRequestError, match="nothing"):
            engine.sessions("m").save(saved.parent / "none", [1, 2, 3])
        assert not (saved.parent / "none").exists()
        events = iter(engine.submit(ask(text(61, 600), 30)))
        read = [next(events)]  # it has begun, and holds all pages unless it has ended since
        try:
            engine.sessions("m").load(saved)
        except BusyError as error:
            assert "no room" in str(error)
        read += events
        assert sum(isinstance(event, Token) for event in read) >= 29
        check_all_is_given_back(engine)


def test_saving_and_loading_beside_requests(models: dict[str, Segment], tmp_path: Path) -> None:
    """They run on, one of them fails, and what is written meanwhile is still right."""
    for kind in KINDS:
        with opened(models[kind]) as (engine, _):
            answer = told(engine.submit(ask(PROMPT, 20)))[0]
            alone = told(engine.submit(ask(text(62, 200), 60)))[0]
            running = [engine.submit(ask(text(62, 200), 60)) for _ in range(3)]
            next(running[0])
            for i in range(4):
                engine.sessions("m").save(tmp_path / f"{i}", [*PROMPT, *answer])
                engine._scheduler.fail(running[2], ValueError()) if i == 1 else None
                engine.sessions("m").load(tmp_path / f"{i}")
            assert [told(each)[0] for each in running[:2]] == [alone] * 2
            files = {(tmp_path / f"{i}").read_bytes() for i in range(4)}
            assert len(files) == 1
            check_all_is_given_back(engine)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of processes")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_save_without_room_leaves_the_old_session(
    models: dict[str, Segment], share: float, tmp_path: Path
) -> None:
    import resource

    path, limit = tmp_path / "talk.session", resource.RLIMIT_FSIZE
    with opened(models["hybrid"]) as (engine, _):
        answer = told(engine.submit(ask(PROMPT, 20)))[0]
        engine.sessions("m").save(path, PROMPT)
        before, limits = path.read_bytes(), resource.getrlimit(limit)
        resource.setrlimit(limit, (int(len(before) * share), limits[1]))
        try:
            with pytest.raises(OSError) as error:
                engine.sessions("m").save(path, [*PROMPT, *answer])
        finally:
            resource.setrlimit(limit, limits)
        assert error.value.errno == errno.EFBIG
        assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == before
        assert engine.sessions("m").load(path) == tuple(PROMPT[:132])
        assert engine.sessions("m").save(path, [*PROMPT, *answer]) == 152
        check_all_is_given_back(engine)


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="links and modes of another kind")
def test_a_session_behind_a_link_is_replaced_there(
    models: dict[str, Segment], tmp_path: Path
) -> None:
    """What a killed save has left lies there, too."""
    kept, link = tmp_path / "disk" / "talk.session", tmp_path / "talk"
    kept.parent.mkdir()
    kept.write_bytes(b"old")
    link.symlink_to(kept)
    left = kept.with_name("talk.session.x.part")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    with opened(models["full"]) as (engine, _):
        told(engine.submit(ask(PROMPT, 2)))
        n = engine.sessions("m").save(link, PROMPT)
        assert link.is_symlink() and [*kept.parent.iterdir()] == [kept]
        assert engine.sessions("m").load(link) == engine.sessions("m").load(kept)
        assert n == len(engine.sessions("m").load(kept))
        check_all_is_given_back(engine)


def test_of_two_that_save_at_once_one_is_whole(models: dict[str, Segment], tmp_path: Path) -> None:
    """Who loads meanwhile finds one of them, too."""
    path, found = tmp_path / "talk.session", list[object]()
    prompts = [text(70, 133), text(71, 200)]
    whole = {tuple(prompt) for prompt in prompts}
    with ExitStack() as stack:
        engines = [stack.enter_context(opened(models["full"]))[0] for _ in range(3)]
        for engine, prompt in zip(engines, prompts, strict=False):
            told(engine.submit(ask(prompt, 2)))
        engines[0].sessions("m").save(path, prompts[0])

        def repeat(action: Callable[[], object]) -> None:
            try:
                found.extend(action() for _ in range(20))
            except BaseException as error:
                found.append(error)

        threads = [
            threading.Thread(target=repeat, args=[partial(engine.sessions("m").save, path, prompt)])
            for engine, prompt in zip(engines, prompts, strict=False)
        ]
        threads.append(
            threading.Thread(target=repeat, args=[partial(engines[2].sessions("m").load, path)])
        )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(found) == 60 and set(found) <= {133, 200, *whole}
        assert [*tmp_path.iterdir()] == [path]
        for engine in engines:
            check_all_is_given_back(engine)


KILLED = """
import os, signal, sys
from pathlib import Path
from edgeinfer import platform
from tests.test_sessions import *
from tests.test_windows import segment

engine, path = engine_of("reference", segment(0, 40, 40)), Path(sys.argv[1])
told(engine.submit(ask(PROMPT, 2)))
assert engine.sessions("m").save(path, PROMPT[:132]) == 132
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "writing":
    read, n_reads = engine._runner.program.read_pages, []
    engine._runner.program.read_pages = lambda *given: (
        n_reads.append(given[1]), kill() if sum(map(bool, n_reads)) == 2 else None, read(*given)
    )[2]
else:
    platform.sync = kill
engine.sessions("m").save(path, PROMPT[:100])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("when", ["writing", "syncing"])
def test_a_save_that_is_killed_leaves_the_old_session(
    models: dict[str, Segment], when: str, tmp_path: Path
) -> None:
    path = tmp_path / "talk.session"
    root = Path(__file__).resolve().parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, path, when], cwd=root, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (left,) = tmp_path.glob("*.part")  # what was being written
    engine = engine_of("reference", models["windows"])
    assert engine.sessions("m").load(path) == tuple(PROMPT[:132])
    sessions = engine.sessions("m")
    sessions.save(path, PROMPT[:132])
    assert left.exists()  # somebody may have just begun it
    os.utime(left, (1, 1))
    with open(left, "rb") as claimed:
        assert platform.try_lock(claimed)
        sessions.save(path, PROMPT[:132])
        assert left.exists()
    sessions.save(path, PROMPT[:132])
    assert list(tmp_path.iterdir()) == [path]
    engine.close()


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_wait_for_a_session_holds_nothing(
    models: dict[str, Segment], kind: str, is_saved: bool, tmp_path: Path
) -> None:
    """The engine opens it all the same, once it gets there: behind a long step, for example."""
    path, is_let_go = tmp_path / "talk.session", threading.Event()
    with opened(models[kind], slots=1) as (engine, _), pytest.MonkeyPatch.context() as patch:
        told(engine.submit(ask(PROMPT, 1)))
        sessions = engine.sessions("m")
        sessions.save(path, PROMPT)

        def interrupted() -> None:
            if threading.current_thread() is not holder:
                patch.undo()
                is_let_go.set()
                raise KeyboardInterrupt

        holder = threading.Thread(target=engine.between_steps, args=[lambda: is_let_go.wait(120)])
        holder.start()
        patch.setattr(engine, "check_alive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sessions.save(path, PROMPT) if is_saved else sessions.load(path)
        holder.join(120)
        assert not engine._store.has_guests
        check_all_is_given_back(engine)
        assert len(told(engine.submit(ask(text(62, 600), 30)))[0]) == 30  # as all pages hold


@pytest.mark.parametrize("name", ["copy_pages", "read_pages", "write_pages"])
def test_a_session_that_a_device_fails_holds_nothing(
    models: dict[str, Segment], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are copied where a conversation ends inside of one."""
    path = tmp_path / "talk.session"
    with opened(models["full"]) as (engine, program):
        told(engine.submit(ask(PROMPT, 1)))
        sessions = engine.sessions("m")
        assert sessions.save(path, PROMPT[:100]) == 100

        def fail(group: int, pages: list[int], *rest: Any) -> Any:
            if not pages:  # how large one is
                return type(program).__getattr__(program, name)(group, pages, *rest)
            raise ValueError("the device's")

        monkeypatch.setattr(program, name, fail, raising=False)
        with pytest.raises(ValueError, match="the device's"):
            sessions.load(path) if name == "write_pages" else sessions.save(path, PROMPT[:101])
        assert not engine._store.has_guests
        check_all_is_given_back(engine)


def test_no_folder_is_made_for_a_session(models: dict[str, Segment], tmp_path: Path) -> None:
    """It may be mistyped; no command that writes a file makes one either."""
    with opened(models["full"]) as (engine, _):
        told(engine.submit(ask(PROMPT, 2)))
        with pytest.raises(FileNotFoundError, match="there"):
            engine.sessions("m").save(tmp_path / "there" / "talk.session", PROMPT)
        assert not [*tmp_path.iterdir()]
        check_all_is_given_back(engine)


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_lacks_pages_waits_for_a_session(
    models: dict[str, Segment], kind: str, is_saved: bool
) -> None:
    """What is being saved or loaded can't give up its pages, and ends soon."""
    request = ask(text(62, 600), 30)
    with opened(models[kind], slots=1) as (engine, _):
        expected = told(engine.submit(request))[0]
        assert engine.forget()
        told(engine.submit(ask(PROMPT, 1)))
        store, layout = engine._store, engine.layout("error")
        opens = partial(store.lend if is_saved else store.receive, PROMPT, layout)
        guest = engine.between_steps(opens)
        assert guest is not None and not guest.cache.is_empty
        running, cancelled = engine.submit(request), engine.submit(request)
        end = time.monotonic() + 120
        while running.sequence is None or running not in engine._scheduler.waiting:
            assert time.monotonic() < end
            time.sleep(0.001)
        cancelled.cancel()
        assert isinstance(list(cancelled)[-1], Finished)
        engine.between_steps(partial(store.dismiss, guest, is_kept=is_saved))
        assert told(running)[0] == expected
        check_all_is_given_back(engine)
