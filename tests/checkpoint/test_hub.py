"""Downloads from a small hub on the loopback interface; `huggingface_hub` itself is real."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoint_writers import make_tensors, write_folder

from kuiperllm.checkpoint import hub
from kuiperllm.errors import DownloadError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "tiny/model"
UNWANTED = {
    "pytorch_model.bin": b"a pickle",
    "README.md": b"# Tiny",
    "original/consolidated.00.pth": b"a pickle",
    "onnx/model.safetensors": b"another form",
    "consolidated.safetensors": b"another form",
}


class FakeHub:
    """The three kinds of request that a download makes: revision, listing, file."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[str] = []
        self.tokens: dict[str, str | None] = {}
        self.refuse: tuple[int, str] | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens[f"{self.command} {path}"] = self.headers.get("authorization")
        if self.hub.refuse:
            status, code = self.hub.refuse
            return self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
        api = f"/api/models/{REPOSITORY}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.hub.files]
            info = {
                "_id": "1",
                "id": REPOSITORY,
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
                "private": False,
            }
            return self.send(200, json.dumps(info).encode())
        if path.startswith(f"{api}/revision/"):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith(f"{api}/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                for name, raw in self.hub.files.items()
            ]
            return self.send(200, json.dumps(tree).encode())
        prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
        if path.startswith(prefix) and (raw := self.hub.files.get(path.removeprefix(prefix))) is not None:
            etag = f'"{hashlib.sha1(raw).hexdigest()}"'
            return self.send(200, raw, {"X-Repo-Commit": COMMIT, "ETag": etag})
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def fake_hub(tmp_path):
    folder = write_folder(tmp_path / "source", make_tensors())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (folder / "generation_config.json").write_text('{"top_k": 5}')
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub = FakeHub(files | UNWANTED)
    yield hub
    hub.close()


# The library reads its settings once, when it is imported: each download is a process of its own.
PROGRAM = """
import json, sys
from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.errors import KuiperError
told = []
try:
    with open_checkpoint(sys.argv[1], revision=sys.argv[2] or None, progress=lambda *a: told.append(a)) as c:
        total = sum(int(c.load(name).nbytes) for name in c.tensors)
        result = {"format": c.format, "path": str(c.path), "bytes": total, "top_k": c.generation.top_k}
except KuiperError as error:
    result = {"error": type(error).__name__, "message": str(error)}
print(json.dumps({**result, "told": told}))
"""


def fetch(tmp_path: Path, endpoint: str, source: str = REPOSITORY, revision: str = "", **env: str):
    """What `open_checkpoint` does in a process with an empty cache of its own; output on stderr is kept."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, source, revision],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=clean | settings | env,
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    return json.loads(run.stdout)


def test_download_open_and_open_again_offline(tmp_path, fake_hub):
    result = fetch(tmp_path, fake_hub.url)
    assert result["format"] == "safetensors"
    assert result["bytes"] == sum(tensor.nbytes for tensor in make_tensors().values())
    assert result["top_k"] == 5
    folder = Path(result["path"])
    assert {path.name for path in folder.iterdir()} == set(fake_hub.files) - set(UNWANTED)
    assert all(
        (folder / name).read_bytes() == raw for name, raw in fake_hub.files.items() if name not in UNWANTED
    )
    assert not list(tmp_path.rglob("*.incomplete"))
    if result["told"]:  # old versions of the library show bytes in bars of their own
        wanted = sum(len(raw) for name, raw in fake_hub.files.items() if name not in UNWANTED)
        assert result["told"][-1] == [f"download {REPOSITORY}", wanted, wanted]
    assert set(fake_hub.tokens.values()) == {None}

    fake_hub.requests.clear()
    assert fetch(tmp_path, fake_hub.url, HF_HUB_OFFLINE="1")["path"] == result["path"]
    assert fake_hub.requests == []


def test_the_token_is_sent(tmp_path, fake_hub):
    fetch(tmp_path, fake_hub.url, HF_TOKEN="hf_secret")
    sent = {token for request, token in fake_hub.tokens.items() if REPOSITORY in request}
    assert sent == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ((404, "RepoNotFound"), "nor such a model on the hub"),
        ((401, "RepoNotFound"), "nor such a model on the hub"),
        ((401, ""), "nor such a model on the hub"),
        ((403, "GatedRepo"), "access is restricted; accept the terms"),
        ((403, ""), "access is restricted; accept the terms"),
        ((418, ""), "the hub answered with HTTP status 418"),
    ],
)
def test_refusals_of_the_hub(tmp_path, fake_hub, refuse, message):
    fake_hub.refuse = refuse
    result = fetch(tmp_path, fake_hub.url)
    assert result["error"] == "DownloadError"
    assert result["message"].startswith("tiny/model: ")
    assert message in result["message"]
    assert "\n" not in result["message"]


def test_unknown_revision(tmp_path, fake_hub):
    result = fetch(tmp_path, fake_hub.url, revision="no-such-branch")
    assert result["message"] == "tiny/model: has no branch, tag or commit 'no-such-branch'"


def test_no_network(tmp_path):
    result = fetch(tmp_path, "http://127.0.0.1:1")
    assert result["error"] == "DownloadError"
    assert "the hub cannot be reached; check the network" in result["message"]


def test_offline_and_not_in_the_cache(tmp_path):
    result = fetch(tmp_path, "http://127.0.0.1:1", HF_HUB_OFFLINE="1")
    assert result["message"] == "tiny/model: is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"


def test_repository_without_safetensors(tmp_path, fake_hub):
    fake_hub.files = {"config.json": b"{}", "model-q4.gguf": b"GGUF", "pytorch_model.bin": b"x"}
    result = fetch(tmp_path, fake_hub.url)
    assert "has no safetensors files; for GGUF, download one file and give its path" in result["message"]
    assert not [request for request in fake_hub.requests if "gguf" in request or ".bin" in request]


@pytest.mark.parametrize(
    "name", ["..", "a", "a/b/c", "../b", "a/..", "a/b..c", "a/.b", "/a/b", "a b/c", "a/b\n", "", "é/b"]
)
def test_malformed_names_make_no_request(name):
    with pytest.raises(DownloadError, match="no id of a model on the hub"):
        hub.download(name)


@pytest.mark.parametrize("revision", ["", "..", "a/../b", "/a", "a b", "-x", "a\n"])
def test_malformed_revisions_make_no_request(revision):
    with pytest.raises(DownloadError, match="no name of a branch"):
        hub.download("a/b", revision=revision)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "the disk is full; free some space, or set HF_HOME",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "could not be fetched: PermissionError: "),
        (RuntimeError("first line\nsecond line"), "could not be fetched: RuntimeError: 'first line'"),
        (RuntimeError(), "could not be fetched: RuntimeError: 'no reason given'"),
    ],
)
def test_failures_on_this_side(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(DownloadError) as caught:
        hub.download("a/b")
    assert str(caught.value).startswith("a/b: " + message)
    assert "\n" not in str(caught.value)
