"""ServerPolicy against a scripted HTTP server on loopback: every fault that a server is known for, and a killed run.

And against `transformers serve` (slow)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import actre
import rollout
import train_pg
from agent.policy import Ask, NoReply
from agent.server import Server, ServerPolicy
from artifacts.stage import read_json
from artifacts.trajectory import read_trajectories
from lora import convert

ROOT = Path(__file__).parent.parent


def completion(text, tokens=3, **details) -> bytes:
    """A chat reply and a completion in one; `details` are the usage's of the prompt's tokens."""
    choice = {"index": 0, "finish_reason": "stop", "text": text, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
    if details:
        usage["prompt_tokens_details"] = details
    reply = {"id": "x", "object": "x", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(reply).encode()


@pytest.fixture
def server():
    """`server.answers` are given one after the other, the last one ever after: bytes, (status, headers, bytes), "drop",
    "hang", or a function of the request; `server.requests` are the bodies that came."""
    requests, stop = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body | {"path": self.path})
            answer = http.answers.pop(0) if len(http.answers) > 1 else http.answers[0]
            answer = answer(body) if callable(answer) else answer
            if answer == "hang":
                stop.wait(20)
            if answer in ("drop", "hang"):
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, data = answer if isinstance(answer, tuple) else (200, {}, answer)
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": len(data)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            """Nothing is printed."""

    http = ThreadingHTTPServer(("localhost", 0), Handler)
    http.answers, http.requests = [completion("act[look]")], requests
    http.url = f"http://localhost:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    stop.set()
    http.shutdown()
    http.server_close()


def line_of(policy: ServerPolicy, text: str = "Observation: a room.\nAction:", seed: int = 0):
    session = policy.open(text)
    policy.submit(Ask(session, 0.0, seed))
    deadline = time.time() + 60
    while time.time() < deadline:
        for of, line in policy.poll():
            assert of == session
            return line
    raise TimeoutError


def policy_of(server, path: Path, **changes) -> ServerPolicy:
    how = {name: changes.pop(name) for name in ("prompt", "top_p") if name in changes}
    settings = {"url": server.url, "model": "m", "retries": 2, "timeout": 2.0} | changes
    return ServerPolicy(Server(**settings), path / "replies.sqlite", **how)


FAULTS = {
    "429": (429, {"Retry-After": "1"}, b"{}"),
    "500": (500, {}, b"oops"),
    "503": (503, {}, b""),
    "hang": "hang",
    "dropped": "drop",
    "no JSON": b'{"choices": [',
    "a page": (200, {"Content-Type": "text/html"}, b"<html>"),
    "no choice": b'{"choices": []}',
    "null": b"null",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_asked_again(server, tmp_path, fault):
    server.answers[:0] = [FAULTS[fault]]
    start = time.time()
    assert line_of(policy_of(server, tmp_path)) == " act[look]\n"
    assert len(server.requests) == 2
    assert fault != "429" or time.time() - start >= 1


@pytest.mark.parametrize("fault", ["500", "no JSON", "dropped"])
def test_a_fault_that_stays_is_no_reply_and_is_not_kept(server, tmp_path, fault):
    policy = policy_of(server, tmp_path, retries=1)
    line_of(policy)
    server.answers[:] = [lambda body: completion("OK.") if "Say OK." in str(body) else FAULTS[fault]]
    assert isinstance(line_of(policy, "another"), NoReply)
    assert len(server.requests) == 4  # twice, and whether it answers anything
    server.answers[:] = [completion("act[wait]")]
    assert line_of(policy, "another") == " act[wait]\n"


def test_a_server_that_answers_nothing_stops_the_run(server, tmp_path):
    server.answers[:] = [(500, {}, b"")]
    with pytest.raises(ValueError, match="does not answer: InternalServerError.*Is it up"):
        line_of(policy_of(server, tmp_path, retries=0))
    with pytest.raises(ValueError, match="localhost:1/v1 does not answer: APIConnectionError"):
        line_of(policy_of(server, tmp_path, retries=0, url="http://localhost:1/v1"))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_never_work_stops_the_run_and_says_what_to_check(server, tmp_path, status):
    server.answers[:] = [(status, {}, b'{"error": {"message": "the model `m` does not exist"}}')]
    with pytest.raises(ValueError, match=r"refuses model 'm' with the key in \$OPENAI_API_KEY.*does not exist"):
        line_of(policy_of(server, tmp_path))
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 422])
def test_a_context_that_is_full_and_other_bad_requests(server, tmp_path, status):
    policy = policy_of(server, tmp_path)
    server.answers[:] = [(status, {}, b'{"error": {"message": "maximum context length is 4096 tokens"}}')]
    assert line_of(policy) is None
    server.answers[:] = [(status, {}, b'{"error": {"message": "seed is not supported"}}')]
    with pytest.raises(ValueError, match=r"does not take the request.*seed is not supported.*--server\.extra"):
        line_of(policy)
    server.answers[:] = [(status, {}, b'{"error": {"message": "content filter"}}'), completion("OK.")]
    assert isinstance(line_of(policy), NoReply)  # one session that is refused stops nothing


def test_parameters_are_added_and_taken_out(server, tmp_path):
    extra = '{"max_tokens": null, "temperature": null, "seed": null, "max_completion_tokens": 99, "top_k": 5}'
    line_of(policy_of(server, tmp_path, extra=extra, top_p=0.9))
    assert server.requests[0].keys() == {"path", "model", "messages", "max_completion_tokens", "top_k", "top_p"}
    line_of(policy_of(server, tmp_path))
    assert server.requests[1].keys() == {"path", "model", "messages", "max_tokens", "temperature", "seed"}
    with pytest.raises(ValueError, match=r"--server\.extra is 'top_k=5'.*expected a JSON object"):
        policy_of(server, tmp_path, extra="top_k=5")


@pytest.mark.parametrize(
    "said, line",
    [
        ("", " \n"),
        (None, " \n"),
        ("\n\n  Action: act[look]\nObservation: x", " act[look]\n"),
        ("Reason for the action: [It is dark.]", " [It is dark.]\n"),
        ("<think>A desk.\nact[x]</think>\n\nact[look]", " act[look]\n"),
        ("think[I\rwait.]", " think[I\n"),
        ("x" * 200_000, f" {'x' * 2048}\n"),
    ],
)
def test_whatever_is_said_is_one_line_of_bounded_length(server, tmp_path, said, line):
    server.answers[:] = [completion(said)]
    policy = policy_of(server, tmp_path)
    assert line_of(policy) == line
    policy.extend(1, "Observation: OK.\nAction:")
    policy.submit(Ask(1, 0.0, 0))
    while not policy.poll():
        pass
    text = server.requests[1]["messages"][1]["content"]
    assert text == f"Observation: a room.\nAction:{line}Observation: OK.\nAction:"


def test_a_request_is_paid_once_and_told_apart_by_seed_and_prompt(server, tmp_path):
    first = policy_of(server, tmp_path)
    assert [line_of(first), line_of(first)] == [" act[look]\n"] * 2
    assert first.counts == {"requests": 1, "from_cache": 1, "prompt_tokens": 10, "completion_tokens": 3}
    again = policy_of(server, tmp_path)
    line_of(again), line_of(again, seed=1)
    assert again.counts["from_cache"] == 1 and len(server.requests) == 2
    with_prompt = policy_of(server, tmp_path, prompt="An example.\n\n", api="completions")
    line_of(with_prompt)
    assert server.requests[2]["prompt"] == "An example.\n\nObservation: a room.\nAction:"
    assert server.requests[2]["stop"] == "\n" and server.requests[2]["path"] == "/v1/completions"


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_what_the_server_had_in_its_cache_is_counted_where_it_says_so(server, tmp_path, api):
    said = [
        completion("x"),
        completion("x", audio_tokens=0),
        completion("x", cached_tokens=0),
        completion("x", cached_tokens=7),
    ]
    server.answers = said
    policy, counts = policy_of(server, tmp_path, api=api), []
    for seed in range(len(said)):
        line_of(policy, seed=seed)
        counts.append(policy.counts.get("cached_tokens"))
    assert counts == [None, None, 0, 7] and policy.counts["prompt_tokens"] == 40
    line_of(policy, seed=3)  # known, and asked of nobody
    assert policy.counts["cached_tokens"] == 7


def test_a_session_closed_before_its_reply_comes_leaves_the_reply_for_later(server, tmp_path):
    policy = policy_of(server, tmp_path)
    session = policy.open("Observation: a room.\nAction:")
    policy.submit(Ask(session, 0.0, 0))
    policy.close(session)
    deadline = time.time() + 60
    while not policy.counts["requests"] and time.time() < deadline:
        assert policy.poll() == []
    assert line_of(policy) == " act[look]\n" and policy.counts["from_cache"] == 1 == len(server.requests)


def test_settings_that_cannot_be(server, tmp_path):
    for changes in ({"concurrency": 0}, {"retries": -1}, {"timeout": 0.0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match="must be positive, retries not negative"):
            policy_of(server, tmp_path, **changes)
    with pytest.raises(ValueError, match="needs the name of its model"):
        policy_of(server, tmp_path, model="")


def flags(server, run: Path) -> list[str]:
    return [
        "--run",
        str(run),
        "--trials",
        "2",
        "--limit",
        "100",
        "--max-turns",
        "3",
        "--temperature",
        "1",
        "--server.url",
        server.url,
        "--server.model",
        "m",
        "--server.concurrency",
        "8",
    ]


def test_a_killed_run_loses_nothing_and_asks_nothing_twice(server, tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    server.answers[:] = [lambda body: completion("think[I look.]" if body["seed"] % 3 else "act[look]")]
    path = tmp_path / "round_0/rollout/trajectories.jsonl"
    command = [sys.executable, "rollout.py", *flags(server, tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= 60:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    assert 60 <= path.read_bytes().count(b"\n") < 200
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = list(read_trajectories(path))
    assert len(rows) == 200 == len({row.key for row in rows}) and {row.end for row in rows} == {"max_turns"}
    asked = Counter(json.dumps(request, sort_keys=True) for request in server.requests)
    assert sum(asked.values()) - len(asked) <= 8  # those that were under way when it was killed
    assert read_json(path.parent / "done.json")["asked"]["requests"] > 0


def test_a_server_that_goes_down_stops_the_run_which_goes_on_as_if_nothing_had_been(server, tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    server.answers[:] = [completion("act[look]")] * 6 + [(500, {}, b"")]
    args = rollout.Args(run=tmp_path, limit=6, server=Server(url=server.url, model="m", retries=0, concurrency=1))
    path = tmp_path / "round_0/rollout/trajectories.jsonl"
    with pytest.raises(ValueError, match=r"does not answer: InternalServerError.*run again to resume"):
        rollout.main(args)
    assert [row.end for row in read_trajectories(path)] == ["stuck"]
    server.answers[:] = [completion("act[look]")]
    rollout.main(args)
    assert [row.end for row in read_trajectories(path)] == ["stuck"] * 6
    assert len(server.requests) == 6 * 4 + 2  # those that failed: one of a game, and whether it answers anything


def test_a_game_that_a_server_cannot_answer_is_no_failure_of_the_agent(server, tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    server.answers[:] = [lambda body: (500, {}, b"") if "keychain" in str(body) else completion("act[look]")]
    args = rollout.Args(run=tmp_path, limit=10, server=Server(url=server.url, model="m", retries=0))
    rollout.main(args)
    ends = {row.task: row.end for row in read_trajectories(tmp_path / "round_0/rollout/trajectories.jsonl")}
    assert set(ends.values()) == {"llm_error", "stuck"}
    assert all((end == "llm_error") == ("keychain" in task) for task, end in ends.items()), ends


def test_an_interrupted_run_does_not_wait_for_a_server_that_hangs(server, tmp_path):
    server.answers[:] = ["hang"]
    command = [sys.executable, "rollout.py", *flags(server, tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    deadline = time.time() + 60
    while len(server.requests) < 8 and time.time() < deadline:  # all that may be under way: nothing left but to wait
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert len(server.requests) == 8
    assert process.wait(timeout=60) != 0  # the server would let it wait for more than two minutes


@pytest.fixture
def transformers_serve(tmp_path):
    """The address of `transformers serve` on the CPU: the model of a request is any folder of weights."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu", "--port", str(port)]
    with open(tmp_path / "serve.log", "w") as log:
        alone = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # threads of torch wait for busy cores
        process = subprocess.Popen(command, stdout=log, stderr=log, env=alone)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.1)
    assert process.poll() is None, (tmp_path / "serve.log").read_text()
    yield f"http://localhost:{port}/v1"
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_transformers_serve_plays_and_explains_as_the_local_model_does(transformers_serve, tmp_path, monkeypatch):
    """Round 0 by the base, round 1 by an exported merged model, ActRe by the base, and the base after an example, each
    from the server and here.

    All is greedy, in float32, with the same draws of sampled actions, so that only rounding can tell them apart.
    """
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    base, merged = Path("models/tiny-alfworld"), tmp_path / "merged"

    def at(model: Path) -> Server:
        return Server(url=transformers_serve, model=str(model.absolute()), api="completions", concurrency=4)

    def games(run: Path, agent: Server, explainer: Server, **how) -> None:
        how |= {"run": run, "weights": "fp32", "temperature": 0.0}
        rollout.main(rollout.Args(server=agent, limit=6, **how))
        actre.main(actre.Args(server=agent, actre_server=explainer, probability=0.3, budget=1, **how))

    here, there = tmp_path / "here", tmp_path / "there"
    games(here, Server(), Server())
    train_pg.main(train_pg.Args(run=here, weights="fp32", epochs=(4,), learning_rate=0.01))
    adapter = here / "round_0/train_pg/adapter"
    convert.main(convert.Args(model=base, adapter=adapter, weights="fp32", out=merged))
    games(here, Server(), Server())
    games(there, at(base), at(base))
    shutil.copytree(adapter.parent, there / "round_0/train_pg")
    games(there, at(merged), at(base))
    example = {"prompt": Path("prompts/alfworld_react.txt"), "limit": 3, "weights": "fp32"}
    rollout.main(rollout.Args(run=here / "prompted", **example))
    rollout.main(rollout.Args(run=there / "prompted", server=at(base), **example))
    played = {}
    for stage in ("prompted/round_0/rollout", "round_0/rollout", "round_1/rollout", "round_1/actre"):
        ours, theirs = (list(read_trajectories(run / stage / "trajectories.jsonl")) for run in (here, there))
        assert [row.key for row in ours] == [row.key for row in theirs] != []
        played[stage] = [row.turns for row in theirs]
        alike = sum((a.turns, a.end) == (b.turns, b.end) for a, b in zip(ours, theirs, strict=True))
        asked = read_json(there / stage / "done.json")["asked"]
        print(
            f"{stage}: {alike} of {len(ours)} games alike, won {sum(row.success for row in ours)} here and "
            f"{sum(row.success for row in theirs)} there; {asked}"
        )
        assert alike >= len(ours) - 1
    assert played["round_0/rollout"] != played["round_1/rollout"]  # else the adapter may be lost in the export
    written = [turn for row in theirs for turn in row.turns if turn.thought_by == "actre"]
    assert written and all(turn.thought and turn.action_by == "sampled" for turn in written)
