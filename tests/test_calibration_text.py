"""Text samples from files, from a Hub dataset, and those that ship with ckptq."""

from __future__ import annotations

import http.server
import json
import os
import random
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptq.calibration import Sample, load_samples, text
from ckptq.errors import CalibrationError
from ckptq.sections import BuiltinCalibration, TextCalibration

CAPTIONS = Path(__file__).parents[1] / "examples" / "scenes" / "annotations" / "captions_calib.json"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Because."}]},
    {"role": "user", "content": "Oh."},
]


def load(*files: Path | str, **changes: Any) -> list[Sample]:
    return load_samples(TextCalibration(source="text", files=[str(f) for f in files], **changes))


def texts(samples: list[Sample]) -> list[str]:
    return sorted(s.text for s in samples)


def write(path: Path, *rows: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "one", "n": 1}, {"text": "two"}, {"text": None}, {"text": " "}, {"text": "three"}]
    path = write(tmp_path / f"x{suffix}", *rows)
    assert texts(load(path)) == ["one", "three", "two"]
    assert all(s.prompt is None and s.image is None for s in load(path))
    with pytest.raises(CalibrationError, match=r"has no 'txt'; did you mean text\?"):
        load(path, field="txt")
    with pytest.raises(CalibrationError, match="'n' should be a text or a list of messages, found int"):
        load(path, field="n")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("key", ["messages", "talk"])
def test_conversations(tmp_path: Path, suffix: str, key: str) -> None:
    chat = [{"role": m["role"], "content": "Because." if m["role"] == "assistant" else m["content"]} for m in CHAT]
    (sample,) = load(write(tmp_path / f"x{suffix}", {key: chat}), field="talk")
    assert (sample.prompt, sample.text) == ("Why?", "Because.")


def test_conversations_in_parts(tmp_path: Path) -> None:
    (sample,) = load(write(tmp_path / "x.jsonl", {"messages": CHAT}))
    assert (sample.prompt, sample.text) == ("Why?", "Because.")
    picture = [{"role": "user", "content": [{"type": "image"}]}, CHAT[2]]
    with pytest.raises(CalibrationError, match="content should be text"):
        load(write(tmp_path / "x.jsonl", {"messages": picture}))
    with pytest.raises(CalibrationError, match="no user's message with an assistant's after it"):
        load(write(tmp_path / "x.jsonl", {"messages": CHAT[:2]}))


def test_a_short_txt_is_one_sample(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\ufeffOne.\r\n\r\nTwo.\r\n", encoding="utf-8")
    assert texts(load(tmp_path / "x.txt")) == ["One.\n\nTwo."]


def test_a_long_txt_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"{n}. " + "word " * 12 + f"\nand line two of {n}" for n in range(40)]
    (tmp_path / "x.txt").write_text("\n\n".join(paragraphs))
    samples = load(tmp_path / "x.txt", sequence_length=64)
    pieces = sorted((s.text for s in samples), key=lambda t: int(t.partition(".")[0]))
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    assert all(128 <= len(piece) <= 256 for piece in pieces[:-1])


@given(st.text("ab \n"), st.integers(1, 9), st.integers(2, 20))
def test_pieces_keep_everything_but_space(whole: str, chunk: int, limit: int) -> None:
    cut = list(text.pieces((whole[i : i + chunk] for i in range(0, len(whole), chunk)), limit))
    assert "".join("".join(cut).split()) == "".join(whole.split())
    assert all(len(piece) <= limit for piece in cut)
    assert cut == list(text.pieces([whole], limit))


def test_coco_captions_as_text() -> None:
    samples = load(CAPTIONS, samples=1000)
    assert texts(samples) == sorted(a["caption"] for a in json.loads(CAPTIONS.read_text())["annotations"])
    assert {(s.prompt, s.image) for s in samples} == {(None, None)}


def test_the_seed_decides(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"text": str(n)} for n in range(500)))
    ten = load(path, samples=10)
    assert ten == load(path, samples=10)
    assert ten[:4] == load(path, samples=4)
    assert texts(ten) != texts(load(path, samples=10, seed=1))
    assert max(int(s.text) for s in ten) > 250
    assert texts(load(path, samples=1000)) == sorted(map(str, range(500)))


def test_several_files_are_one_set(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", {"text": "a"}, {"text": "b"}), write(tmp_path / "2.parquet", {"text": "c"})
    assert texts(load(one, two)) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.TXT"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(" \n\n")
    with pytest.raises(CalibrationError, match="holds no text"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"a,b", r"unknown kind of file '\.csv'; expected \.txt, \.jsonl, \.parquet, \.json"),
        ("x.txt", b"\xff\xfe\x00", "can't be read: 'utf-8'"),
        ("x.jsonl", b'{"text": "a"}\n{"text"', r"x\.jsonl:2: not JSON"),
        ("x.jsonl", b"[1]", r"x\.jsonl:1: expected a JSON object, found list"),
        ("x.parquet", b"PAR1 not really", "can't be read"),
        ("x.json", b'{"a": 1}', "expected a JSON object with a list 'images'"),
    ],
)
def test_files_that_cannot_be_understood(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load(tmp_path / name)
    assert name in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for entry in (tmp_path / "x.txt", "org/x.jsonl", "just-a-word"):
        with pytest.raises(CalibrationError, match="no such file"):
            load(entry)
    with pytest.raises(CalibrationError, match="a folder, expected a file"):
        load(tmp_path)


def test_builtin() -> None:
    def builtin(**changes: Any) -> list[Sample]:
        return load_samples(BuiltinCalibration(source="builtin", **changes))

    everything = builtin()
    assert 60 <= len(everything) == len({s.text for s in everything}) <= 128
    assert all(s.text and "%\n" not in s.text and s.prompt is None for s in everything)
    assert builtin(samples=5) == everything[:5]
    assert builtin(samples=5) != builtin(samples=5, seed=3)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[dict[str, bytes], list[str], dict[str, str]]]:
    """A Hub with one dataset, org/name: (its files, the files it was asked for, the environment that leads to it)."""
    files: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:4] == ["api", "datasets", "org", "name"]:
                listing = [{"type": "file", "path": f, "size": len(c), "oid": f"{i:040}"} for i, (f, c) in enumerate(files.items())]
                info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                self.reply(json.dumps(listing if "tree" in parts else info).encode())
            elif parts[:4] == ["datasets", "org", "name", "resolve"] and "/".join(parts[5:]) in files:
                if self.command == "GET":
                    asked.append("/".join(parts[5:]))
                self.reply(files["/".join(parts[5:])])
            else:
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815, the name that http.server looks for

        def reply(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{zlib.crc32(body):040}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield files, asked, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        server.shutdown()


def load_elsewhere(environment: dict[str, str], *wanted: tuple[str, int]) -> list[list[str]]:
    """Of each (entry, samples) the texts, or the error; huggingface_hub reads its environment when it is imported."""
    code = f"""if True:
        import json
        from ckptq.calibration import load_samples
        from ckptq.errors import CalibrationError
        from ckptq.sections import TextCalibration
        for entry, samples in {wanted!r}:
            try:
                found = load_samples(TextCalibration(source="text", files=[entry], samples=samples))
                print(json.dumps([s.text for s in found]))
            except CalibrationError as error:
                print(json.dumps([str(error)]))"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    environment = {**kept, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_dataset(tmp_path: Path, hub: tuple[dict[str, bytes], list[str], dict[str, str]]) -> None:
    files, asked, environment = hub
    for part in ("test-0", "train-0", "train-1"):
        table = pa.table({"text": [f"{part} {n}" for n in range(3)]})
        pq.write_table(table, tmp_path / "x.parquet")
        files[f"data/{part}.parquet"] = (tmp_path / "x.parquet").read_bytes()
    files["README.md"] = b"# name"
    offline = {**environment, "HF_HUB_OFFLINE": "1"}

    (few,) = load_elsewhere(environment, ("org/name", 3))
    assert sorted(few) == ["train-0 0", "train-0 1", "train-0 2"]
    assert asked == ["data/train-0.parquet"]
    again, (more,) = load_elsewhere(offline, ("org/name", 3), ("org/name", 4))
    assert again == few
    assert "can't be had" in more  # the cache lacks train-1
    everything, (other,) = load_elsewhere(environment, ("org/name@main", 100), ("org/other", 3))
    assert len(everything) == 6
    assert "can't be had" in other
    assert load_elsewhere(offline, ("org/name", 100)) == [everything]


def test_choose_is_a_uniform_choice() -> None:
    counts = [0] * 10
    for seed in random.Random(0).sample(range(10**6), 400):
        for sample in text.choose((Sample(str(n), str(n)) for n in range(10)), 3, seed):
            counts[int(sample.text)] += 1
    assert min(counts) > 80
    assert max(counts) < 160
