"""The small engine's server: each token and its log-probability are fixed functions of the tokens before it."""

from __future__ import annotations

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VOCABULARY = 8192  # the reference model's
SLOTS = 50_000  # of a 16-bit cache


def likely(prefix: list[int]) -> int:
    return (sum(prefix) * 7 + prefix[0] * 13 + len(prefix)) % VOCABULARY


def score(prefix: list[int], token: int) -> float:
    return -(0.5 + len(prefix) % 7 / 10) - (0 if token == likely(prefix) else 5)


class Handler(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def reply(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        gauges = f"tiny_said_total {self.server.said}\ntiny_fill 0.5\n".encode()
        self.reply({"/gauges": gauges, "/about": json.dumps(self.server.about).encode()}.get(self.path, b"0"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        if self.path == "/forget":
            return self.reply(b"")
        prompt: list[int] = body["prompt"]
        said: list[int] = []
        for _ in range(body["say"]):
            said.append(likely(prompt + said))
        self.server.said += len(said)
        if self.path == "/say":
            whole, first = prompt + said, body["score_from"]
            scores = [score(whole[:at], whole[at]) for at in range(1, len(whole))]
            read = [] if first is None else scores[first : len(prompt) - 1]
            answer = {"said": said, "read_scores": read, "said_scores": scores[len(prompt) - 1 :]}
            return self.reply(json.dumps(answer).encode())
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        time.sleep(0.01 + len(prompt) / 20_000)  # well above what two cores could do
        for at, token in enumerate(said):
            time.sleep(0.002)
            event = {"name": body["name"], "token": token, "read": len(prompt), "done": at == len(said) - 1}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights")
    parser.add_argument("--store")
    parser.add_argument("--read-stored", action="store_true")
    parser.add_argument("--at", type=int)
    given = parser.parse_args()
    content = json.loads(Path(given.store).read_text()) if given.store else None
    sizes = content["storage"] if content else {"bytes_per_token": 1, "bytes_per_token_16bit": 1}
    server: Any = ThreadingHTTPServer(("127.0.0.1", given.at), Handler)
    server.daemon_threads = True
    server.said = 0
    server.about = {
        "release": "1.0", "weights": given.weights, "profile": content and content["digest"], "read_stored": given.read_stored,
        "slots": SLOTS * sizes["bytes_per_token_16bit"] // sizes["bytes_per_token"],
    }  # fmt: skip
    server.serve_forever()


if __name__ == "__main__":
    main()
