"""Recorded answers come out again on every device; what is no recording is refused clearly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM, InvalidRequestError, Recording, Step, replay
from edgeinfer.cli.main import main

from .models_for_tests import tiny_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
N_CTX = 128
DEVICES = ("cpu", "shim", "law")
# Whatever changes a token, and whatever ends an answer.
ASKED: dict[str, dict[str, Any]] = {
    "drawn": dict(temperature=1.3, top_p=0.9, xtc_probability=0.5, xtc_threshold=0.05),
    "greedy": dict(temperature=0.0),
    "penalties": dict(repeat_penalty=1.3, dry_multiplier=2.0, dry_allowed_length=1),
    "mirostat": dict(mirostat=2, mirostat_tau=3.0),
    "bans": dict(logit_bias={257: -math.inf, 7: 3.5}, seed=2**64 - 1),
    "slid": dict(overflow="slide", max_tokens=N_CTX + 40, logit_bias={257: -math.inf}, n_keep=40),
    "full": dict(max_tokens=None, logit_bias={257: -math.inf}),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("replay"), n_ctx=512, chat_template=TEMPLATE)


def open_on(path: Path, device: str) -> LLM:
    if device == "shim" and shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for processors")
    return LLM(path, n_ctx=N_CTX, device=device, threads=2)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with open_on(path, "cpu") as llm:
        yield llm


def record(llm: LLM, prompt: Any = "hello", **asked: Any) -> Recording:
    with llm.stream(prompt, **{"max_tokens": 24, "seed": 5} | asked) as stream:
        stream.run()
        return Recording.of(llm, stream)


def written(recording: Recording, folder: Path) -> Path:
    path = folder / "answer.json"
    path.write_text(json.dumps(recording.as_json(), allow_nan=False))
    return path


@pytest.fixture(scope="module")
def recordings(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    """Of every request, each through a file."""
    folder = tmp_path_factory.mktemp("recordings")
    made = [record(llm, **asked) for asked in ASKED.values()]
    read = [Recording.read(written(each, folder)) for each in made]
    assert read == made
    return read


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_gives_the_recorded_tokens(
    path: Path, recordings: list[Recording], device: str
) -> None:
    with open_on(path, device) as llm:
        for name, recording in zip(ASKED, recordings, strict=True):
            found = recording.replay(llm)
            assert (name, found.differs_at, found.is_equal) == (name, None, True)


def test_whatever_ended_an_answer_it_is_compared_to_its_end(llm: LLM) -> None:
    whole = record(llm, temperature=0.0).token_ids
    text = llm.detokenize(whole)
    by_token = record(llm, temperature=0.0, stop_token_ids=[whole[9]])
    assert by_token.tokens[-1] == whole[9] and by_token.stop_id is not None
    for recording in (by_token, record(llm, temperature=0.0, stop=text[5:8])):
        assert recording.finish_reason == "stop" and recording.replay(llm).is_equal
    with llm.stream("hello", seed=5, temperature=0.0) as stream:
        while len(stream._ids) < 5:
            next(stream)
        stream.close()
        cut = Recording.of(llm, stream)
    assert cut.finish_reason == "cancelled" and cut.replay(llm).is_equal
    with llm.stream_chat("hello", seed=5, max_tokens=9, overflow="drop-turns") as stream:
        stream.run()
    assert Recording.of(llm, stream).replay(llm).is_equal


def test_types_of_the_cache_are_recorded(path: Path, llm: LLM) -> None:
    with LLM(path, n_ctx=N_CTX, kv_type=("q8_0", "q4_0")) as small:
        recording = record(small, temperature=0.0)
        assert recording.kv_type == ("q8_0", "q4_0") and recording.replay(small).is_equal
    with pytest.raises(InvalidRequestError, match="kv_type"):
        recording.replay(llm)


def test_other_models_and_settings_are_refused(llm: LLM, path: Path, tmp_path: Path) -> None:
    recording = record(llm)
    with LLM(path, n_ctx=64, device="law") as shorter:
        with pytest.raises(InvalidRequestError, match="n_ctx=128"):
            recording.replay(shorter)
    other = tiny_model(tmp_path, n_ctx=512, chat_template=TEMPLATE, seed=9)
    with LLM(other, n_ctx=N_CTX, device="law") as another:
        with pytest.raises(InvalidRequestError, match="fingerprint"):
            recording.replay(another)
    with llm.stream("hello", max_tokens=5) as stream:
        stream.close()
        empty = Recording.of(llm, stream)
    if not empty.tokens:
        with pytest.raises(InvalidRequestError, match="no tokens"):
            empty.replay(llm)


# -- the command ---------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(each) for each in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def recorded(call: Call, path: Path, tmp_path: Path) -> Path:
    """What `run --json` wrote."""
    run = ("run", path, "-p", "hi", "-n", 9, "-c", 128, "--device", "law", "--system", "Be brief.")
    code, out, _ = call(*run, "--json", "--seed", 4, "--n-keep", 3)
    assert code == 0
    file = tmp_path / "answer.json"
    file.write_text(out)
    return file


def test_the_command_says_that_it_is_equal(call: Call, recorded: Path) -> None:
    code, out, err = call("replay", recorded, "--device", "cpu", "-t", 1)
    assert (code, out) == (0, "equal: 9 tokens, as recorded on law\n"), err


def test_the_command_says_where_it_differs(call: Call, recorded: Path, path: Path) -> None:
    answer = json.loads(recorded.read_text())
    answer["token_ids"][4] = (answer["token_ids"][4] + 1) % 256
    moved = path.with_name("moved.gguf")
    shutil.copy(path, moved)
    answer["replay"]["model"] = "/nowhere/gone.gguf"
    answer["version"] = "0.0.7"
    recorded.write_text(json.dumps(answer))
    code, _, err = call("replay", recorded, "--device", "law")
    assert code == 1 and "gone.gguf" in err
    code, out, err = call("replay", recorded, "--device", "law", "--model", moved)
    assert code == 1 and out.startswith("differs at token 4 of 9: ") and "0.0.7" in err
    code, out, _ = call("replay", recorded, "--device", "law", "--model", moved, "--json")
    found = json.loads(out)
    assert (code, found["equal"], found["differs_at"]) == (1, False, 4)
    assert found["expected"][:4] == found["found"][:4]


def test_the_command_refuses_what_is_not_as_it_was(call: Call, recorded: Path) -> None:
    """With what would be, as it is typed; of a file that was edited nothing but text is shown."""
    for flags, advised in ((("-c", 96), "-c 128"), (("--kv-type", "q8_0"), "--kv-type f16/f16")):
        code, out, err = call("replay", recorded, *flags)
        assert (code, out) == (2, "") and err.endswith(f"open it with {advised}\n")
    answer = json.loads(recorded.read_text())
    answer["replay"]["device"] = "law\nequal: 10 tokens\x1b[2J"
    recorded.write_text(json.dumps(answer))
    assert call("replay", recorded)[1] == "equal: 9 tokens, as recorded on law equal: 10 tokens\n"
    answer["token_ids"][2] = 2**31 - 1
    recorded.write_text(json.dumps(answer))
    code, out, err = call("replay", recorded, "--json")
    assert (code, out) == (2, "") and "id 2147483647 is outside the vocabulary" in err


NO_RECORDINGS = [
    b"", b"{}", b"[]", b"5", b"null", b"\xff\xfe", b"[" * 100_000, b'{"replay": 5}',
    b'{"replay": {"format": 2}}', b'{"replay": {"format": 1}}', b'{"token_ids": ' + b"9" * 9000,
    b'{"text": "an answer of version 0.1.0", "token_ids": [1], "version": "0.1.0"}',
]  # fmt: skip
WRONG_VALUES: list[Any] = [None, True, -1, 1.5, "x", [], {}, [[]], 2**70, ["x"], {"x": 1}]


def test_what_is_no_recording_is_refused(recorded: Path, tmp_path: Path, call: Call) -> None:
    for text in NO_RECORDINGS:
        file = tmp_path / "wrong.json"
        file.write_bytes(text)
        with pytest.raises(InvalidRequestError, match="run --json|format|replay in") as caught:
            Recording.read(file)
        assert len(str(caught.value)) < 500
    answer = json.loads(recorded.read_text())
    for odd in (True, 1.0, 1.9, "1", 2, None):
        answer["replay"]["format"] = odd
        (tmp_path / "wrong.json").write_text(json.dumps(answer))
        with pytest.raises(InvalidRequestError, match="format in .* it must be 1, which"):
            Recording.read(tmp_path / "wrong.json")
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InvalidRequestError, match="can't be read"):
            Recording.read(missing)
    (tmp_path / "wrong.json").write_text("[]")
    code, out, err = call("replay", tmp_path / "wrong.json")
    assert (code, out) == (2, "") and "run --json" in err and "Traceback" not in err


def test_what_on_step_may_have_edited_is_not_recorded(llm: LLM) -> None:
    """Of its tokens a file can't say what they follow from."""

    def ban(step: Step) -> None:
        if step.logits is not None:
            step.logits[:300] = -1e9

    with pytest.raises(InvalidRequestError, match="leave 'logits' out of watch"):
        record(llm, on_step=ban)
    seen: list[Any] = []
    assert record(llm, on_step=seen.append, watch=("hidden",)).replay(llm).is_equal and seen


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device without an end here")
def test_what_has_no_end_or_is_too_long_is_not_read(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_MOST_BYTES", recorded.stat().st_size)
    Recording.read(recorded)
    monkeypatch.setattr(replay, "_MOST_BYTES", recorded.stat().st_size - 1)
    for path in (recorded, Path("/dev/zero")):
        with pytest.raises(InvalidRequestError, match="can't be read"):
            Recording.read(path)


def test_every_field_is_checked(recorded: Path) -> None:
    """One that is missing or of another kind is refused by name, or is as good as the right one."""
    answer = json.loads(recorded.read_text())
    outer = [name for name in ("replay", "token_ids", "prompt_token_ids", "version")]
    places = [(answer, name) for name in outer]
    places += [(answer["replay"], name) for name in answer["replay"]]
    places += [(answer["replay"]["sampling"], name) for name in answer["replay"]["sampling"]]
    for values, name in places:
        right = values.pop(name)
        for wrong in [..., *WRONG_VALUES]:  # ... is missing
            if wrong is not ...:
                values[name] = wrong
            recorded.write_text(json.dumps(answer))
            try:
                Recording.read(recorded)
            except InvalidRequestError as error:
                assert len(str(error)) < 500
                assert name in str(error) or isinstance(wrong, dict)
            else:
                if name == "numerics":  # files of before had none, and were exact
                    continue
                assert wrong is not ..., f"{name} is missing, and nobody says so"
        values[name] = right
    recorded.write_text(json.dumps(answer))
    assert Recording.read(recorded).tokens
