"""Many streaming clients, some of which vanish, cancel or send nonsense.

    python benchmarks/serve_load.py --minutes 2

Starts `kuiper serve` on the demo model (or another: `-m`), keeps 256 clients busy, looks at the process all
the while, and says at the end what was answered and whether anything is left: blocks, threads, open files,
memory. The exit code is 1 if something is, or if an answer was not one of those that are meant to be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kuiperllm.server.load.client import AnswerError, Target
from kuiperllm.server.load.run import summary

TEMPLATE = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
MALFORMED: list[tuple[str, Any, int]] = [
    ("/v1/chat/completions", {"messages": "x"}, 400),
    ("/v1/completions", {"prompt": "x", "max_tokens": -1}, 400),
    ("/v1/completions", {"prompt": "x", "nonsense": 1}, 400),
    ("/v1/completions", {"prompt": "x", "model": "none"}, 404),
    ("/v1/completions", {"prompt": "x" * 100_000}, 400),
    ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "((("}}, 400),
    ("/v1/nothing", {}, 404),
    ("/v1/chat/completions", None, 415),
]
WORDS = ("to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler", "in", "mind")


class Load:
    """The clients and what came of them."""

    def __init__(self, target: Target, until: float, seed: int) -> None:
        self.target = target
        self.until = until
        self.rng = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.unexpected: Counter[str] = Counter()
        self.first_ms: list[float] = []
        self.tokens = 0

    async def client(self) -> None:
        """One client: a request after the other, of a random kind."""
        while time.monotonic() < self.until:
            kind = self.rng.choices(("stream", "vanish", "whole", "form", "malformed"), (60, 20, 8, 5, 7))[0]
            try:
                await getattr(self, kind)()
                self.outcomes[kind] += 1
            except AnswerError as error:
                if error.status == 503:
                    self.outcomes["503"] += 1
                    await asyncio.sleep(self.rng.random())
                else:
                    self.unexpected[f"{kind}: {error}"] += 1
            except OSError as error:
                self.unexpected[f"{kind}: {type(error).__name__} {error}"] += 1

    def prompt(self) -> str:
        return " ".join(self.rng.choices(WORDS, k=self.rng.randrange(1, 120)))

    def body(self, **more: Any) -> dict[str, Any]:
        common = {"max_tokens": self.rng.randrange(1, 120), "temperature": self.rng.choice((0, 0.7, 1.3))}
        return {"prompt": self.prompt(), **common, **more}

    async def stream(self) -> None:
        begun, first = time.perf_counter(), 0.0
        path, body = "/v1/completions", self.body(stream=True, n=self.rng.choice((1, 1, 1, 2)))
        if self.rng.random() < 0.5:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        body["stream_options"] = {"include_usage": True}
        async with aclosing(self.target.stream(path, body)) as events:
            async for now, event in events:
                first = first or now
                self.tokens += (event.get("usage") or {}).get("completion_tokens", 0)
        self.first_ms.append(1e3 * (first - begun))

    async def vanish(self) -> None:
        """Go away before the end: at once, in the queue, or after some tokens."""
        events = self.target.stream(
            "/v1/completions", self.body(stream=True, max_tokens=400, ignore_eos=True)
        )
        after = self.rng.choice((0, 0, 1, 5, 20))
        async with aclosing(events):
            if not after:
                try:
                    async with asyncio.timeout(self.rng.random() * 0.3):
                        await anext(events)
                except TimeoutError:
                    return
            async for _ in events:
                after -= 1
                if after <= 0:
                    return

    async def whole(self) -> None:
        answer = await self.target.post("/v1/completions", self.body())
        self.tokens += answer["usage"]["completion_tokens"]

    async def form(self) -> None:
        body = self.body(structured_outputs={"regex": "[a-z]{3,9}( [a-z]{3,9}){2}"}, max_tokens=60)
        await self.target.post("/v1/completions", body)

    async def malformed(self) -> None:
        path, body, status = self.rng.choice(MALFORMED)
        try:
            if body is None:
                reader, writer = await asyncio.open_connection(*address(self.target.url))
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
                writer.write(head.encode() + b"abc")
                answered = int((await reader.read()).split()[1])
                writer.close()
                raise AnswerError(answered, "")
            await self.target.post(path, body)
        except AnswerError as error:
            if error.status not in (status, 503):
                raise


def address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


# --- the server's process ---------------------------------------------------------------------------------


def process(pid: int) -> dict[str, int]:
    """Threads, open files and resident memory of a process (Linux)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "threads": int(status["Threads"]),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "rss_mib": int(status["VmRSS"].split()[0]) >> 10,
    }


async def metrics(target: Target) -> dict[str, float]:
    reader, writer = await asyncio.open_connection(*address(target.url))
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#") and not name.endswith("_created"):
            name = name.partition("{")[0]
            try:
                found[name] = found.get(name, 0.0) + float(value)
            except ValueError:
                continue
    return found


BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting", "kuiper:kv_blocks_used")


async def settled(target: Target, pid: int, seconds: float = 30) -> dict[str, float]:
    """The process when nothing is under way any more."""
    until = time.monotonic() + seconds
    while True:
        found = await metrics(target)
        if not any(found[name] for name in BUSY) or time.monotonic() > until:
            await asyncio.sleep(1)  # connections close
            return {name: found[name] for name in BUSY} | process(pid)
        await asyncio.sleep(0.1)


async def run(options: argparse.Namespace, target: Target, pid: int) -> dict[str, Any]:
    warm = Load(target, time.monotonic() + options.warm_up, options.seed + 1)
    await asyncio.gather(*(warm.client() for _ in range(options.clients)))
    before = await settled(target, pid)
    load = Load(target, time.monotonic() + 60 * options.minutes, options.seed)
    peaks: Counter[str] = Counter()

    async def watch() -> None:
        while True:
            for name, value in process(pid).items():
                peaks[name] = max(peaks[name], value)
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    started = time.monotonic()
    await asyncio.gather(*(load.client() for _ in range(options.clients)))
    seconds = time.monotonic() - started
    watching.cancel()
    after = await settled(target, pid)
    return {
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "outcomes": dict(load.outcomes),
        "unexpected": dict(load.unexpected),
        "output_tokens_per_s_of_ended_streams": round(load.tokens / seconds, 1),
        "first_token_ms": summary(load.first_ms),
        "before": before,
        "peaks": dict(peaks),
        "after": after,
    }


def problems(found: dict[str, Any]) -> list[str]:
    """What must not be."""
    before, after = found["before"], found["after"]
    wrong = [f"unexpected: {count} x {what}" for what, count in found["unexpected"].items()]
    wrong += [f"{name} is {after[name]:g} at the end" for name in BUSY if after[name]]
    wrong += [
        f"{name}: {before[name]} before, {after[name]} after"
        for name in ("threads", "files")
        if after[name] > before[name] + 2
    ]
    if after["rss_mib"] > before["rss_mib"] * 1.1 + 32:
        wrong.append(f"memory: {before['rss_mib']} MiB before, {after['rss_mib']} after")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--warm-up", type=float, default=15, help="seconds before anything is counted")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "kuiperllm", "serve", "-m", options.model, "--port", str(options.port)]
    command += ["--max-num-seqs", str(options.max_num_seqs), "--max-waiting", "200"]
    target = Target(f"http://127.0.0.1:{options.port}")
    with TemporaryDirectory() as folder:
        template, log = Path(folder) / "chat.jinja", Path(folder) / "log"
        template.write_text(TEMPLATE)
        with log.open("w") as stderr:
            server = subprocess.Popen([*command, "--chat-template", str(template)], stderr=stderr)
        try:
            while "serving at" not in log.read_text():
                if server.poll() is not None:
                    print(log.read_text(), file=sys.stderr)
                    return 1
                time.sleep(0.1)
            found = asyncio.run(run(options, target, server.pid))
            server.terminate()
            found["exit_code"] = server.wait(60)
            found["complaints"] = [line for line in log.read_text().splitlines() if " ERROR " in line][:10]
        finally:
            server.kill()
    found["problems"] = problems(found)
    print(json.dumps(found, indent=2))
    return 1 if found["problems"] or found["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
