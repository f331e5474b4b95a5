"""The parts of vLLM's API that agent/vllm.py uses, scripted, on loopback."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from agent.transcript import Spelling


class VLLM(ThreadingHTTPServer):
    """Serves a folder's base as "base", and the adapters that were loaded.

    `draw`: (prompt ids, body) -> the ids of a reply, cut to `max_tokens`; else they are drawn at random. `change`:
    (path, body, answer) -> another answer, or a status and words in place of one. `down`: drops every connection.
    `bodies`: (path, body) of all requests.
    """

    daemon_threads = True

    def __init__(self, model_dir: Path, max_model_len: int = 4096, draw: Callable | None = None):
        super().__init__(("localhost", 0), Handler)
        self.spelling = Spelling(model_dir, context=16, max_new_tokens=16)
        self.max_model_len, self.draw = max_model_len, draw or self.draw_at_random
        self.change: Callable[[str, Any, Any], Any] = lambda path, body, answer: answer
        self.adapters: dict[str, str] = {}
        self.bodies: list[tuple[str, Any]] = []
        self.down = False
        self.lock = threading.Lock()
        self.url = f"http://localhost:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def asked(self, path: str = "/v1/completions") -> list[Any]:
        """The bodies of requests of a path; of completions, those that were not asked for the base's figures."""
        return [body for at, body in self.bodies if at == path and "logprobs" not in body]

    def draw_at_random(self, prompt: list[int], body: dict[str, Any]) -> list[int]:
        """Up to a stop or to the limit; the same for the same prompt and seed."""
        drawn, ids = random.Random(f"{prompt[-9:]} {len(prompt)} {body['seed']} {body['model']}"), []
        newlines, ends = sorted(self.spelling.newlines), sorted(self.spelling.ends)
        others = sorted(set(self.spelling.tokenizer.get_vocab().values()) - self.spelling.stops)
        while len(ids) < body["max_tokens"] and not (ids and ids[-1] in self.spelling.stops):
            chance = drawn.random()
            ids.append(drawn.choice(newlines if chance < 0.15 else ends if chance < 0.18 and ends else others))
        return ids

    def answer(self, path: str, body: Any) -> Any:
        """The JSON of a 200, or (status, words)."""
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None, "max_model_len": self.max_model_len}]
            return {"data": cards + [{"id": name, "parent": "base"} for name in self.adapters]}
        if path == "/tokenize":
            return {"tokens": self.spelling.tokenizer.encode(body["prompt"], add_special_tokens=False).ids}
        if path == "/v1/load_lora_adapter":
            name, folder = body["lora_name"], body["lora_path"]
            if name in self.adapters:
                return 400, f"The lora adapter '{name}' has already been loaded."
            if not (Path(folder).is_absolute() and (Path(folder) / "adapter_config.json").exists()):
                return 404, f"Loading lora {name} failed: No adapter found for {folder}"
            self.adapters[name] = folder
            return f"Success: LoRA adapter '{name}' added successfully."
        if path != "/v1/completions":
            return 404, "Not Found"
        if body["model"] not in ("base", *self.adapters):
            return 404, f"The model `{body['model']}` does not exist."
        if "logprobs" in body:
            figures = [{"token_logprobs": [-(sum(ids) % 7) / 2]} for ids in body["prompt"]]
            return {"choices": [{"index": i, "logprobs": at} for i, at in enumerate(figures)][::-1]}
        if len(body["prompt"]) >= self.max_model_len:
            return 400, "max_tokens must be at least 1, got 0."
        return self.complete(body)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, room = body["prompt"], self.max_model_len - len(body["prompt"])
        ids = self.draw(prompt, body)[: min(body["max_tokens"], room)]
        ended = ids[-1] in body.get("stop_token_ids", ())
        choice = {
            "index": 0,
            "text": self.spelling.tokenizer.decode(ids, skip_special_tokens=False),
            "token_ids": ids,
            "finish_reason": "stop" if ended else "length",
        }
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}}


class Handler(BaseHTTPRequestHandler):
    server: VLLM

    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: Any) -> None:
        server = self.server
        with server.lock:
            server.bodies.append((self.path, body))
            answer = None if server.down else server.change(self.path, body, server.answer(self.path, body))
        if answer is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, answer = answer if isinstance(answer, tuple) else (200, answer)
        data = json.dumps(answer if status == 200 else {"error": {"message": answer, "code": status}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Nothing is printed."""
