"""TokensPolicy against a scripted vLLM: the ids of records, limits, adapters, restarts, and servers that lie.

And against `vllm serve` (slow), if the environment variable VLLM names its command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import actre
import evaluate
import refine
import rollout
from agent.attempt import Job
from agent.local import LocalPolicy
from agent.loop import PlayLoop
from agent.policy import Ask
from agent.server import Server
from agent.vllm import TOLERANCE, TokensPolicy, served_name
from artifacts.cli import parse
from artifacts.json_io import read_json, write_json
from artifacts.stage import StageError
from artifacts.tokens import read_codec, tokens_of
from artifacts.trajectory import read_trajectories
from lora.adapter import save_adapter
from lora.linear import LoRAConfig
from lora.load import load_model
from models.tokenizer import byte_tokenizer
from tests.support.helpers import logits_of, next_line, with_random_adapter, write_tiny_model
from tests.support.published import write_model
from tests.support.rooms import OPENING, TASK, Room
from tests.support.vllm import VLLM
from tests.test_agent import settings
from tests.test_play_tokenizers import LIMIT, check_all, played

ROOT = Path(__file__).parent.parent
BASE = ROOT / "models/tiny-alfworld"


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    """A random model with a tokenizer in which a newline shares tokens with other text, and an end token."""
    return write_model("hand", tmp_path_factory.mktemp("models") / "hand")


@pytest.fixture
def serve(monkeypatch):
    """Starts scripted servers of a folder, which end with the test."""
    monkeypatch.setattr("agent.server.FIRST_PAUSE", 0.01)
    with contextlib.ExitStack() as servers:

        def start(folder: Path, **how) -> VLLM:
            server = VLLM(folder, **how)
            servers.callback(server.server_close)
            servers.callback(server.shutdown)
            return server

        yield start


def policy_of(server: VLLM, model_dir: Path, path: Path, **changes) -> TokensPolicy:
    how = {"context": 512, "max_new_tokens": LIMIT, "adapter": None, "weights": path / "server.json"}
    to = {name: changes.pop(name) for name in ("retries", "extra", "concurrency", "model") if name in changes}
    address = Server(**{"url": server.url, "model": "base", "api": "tokens", "retries": 2, "timeout": 20.0} | to)
    return TokensPolicy(address, path / "replies.sqlite", model_dir=model_dir, **how | changes)


def adapter_in(folder: Path, base: Path) -> Path:
    save_adapter(folder, with_random_adapter(load_model(base, weights="nf4", lora=LoRAConfig(rank=2))), base)
    return folder


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_the_records_are_those_of_the_local_model(serve, tmp_path):
    """The server decodes the same base greedily, from the ids that it is sent. The tokenizer puts <s> before a text,
    there is an example before the session, and the context is filled."""
    base = write_tiny_model(tmp_path / "base")
    tokenizer = byte_tokenizer(250)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 250)])
    tokenizer.save(str(base / "tokenizer.json"))
    model = load_model(base, weights="nf4")

    def draw(prompt, body):
        ids = []
        while len(ids) < body["max_tokens"] and ids[-1:] not in [[stop] for stop in body["stop_token_ids"]]:
            padded = np.zeros((1, 256), np.int32)
            padded[0, : len(prompt) + len(ids)] = prompt + ids
            ids.append(int(logits_of(model, padded)[0, len(prompt) + len(ids) - 1].argmax()))
        return ids

    server, how = serve(base, draw=draw), {"context": 235, "max_new_tokens": LIMIT, "prompt": "An example.\n\n"}
    local = LocalPolicy(base, slots=1, drafts=0, **how)
    remote = policy_of(server, base, tmp_path, concurrency=1, **how)
    [ours], [theirs] = (list(PlayLoop([Job(TASK, 0)], settings(max_turns=20), Room, p)) for p in (local, remote))
    assert ours == theirs and len(theirs.turns) > 1 and theirs.end == "context_full"
    assert server.asked()[0]["prompt"].count(250) == 1


def test_every_record_is_spelled_by_its_ids_however_its_replies_end(hand, serve, tmp_path):
    server = serve(hand)
    policy = policy_of(server, hand, tmp_path)
    rows = played(policy, Room, "alfworld", [f"{TASK}/{i}" for i in range(24)], tmp_path / "trajectories.jsonl")
    endings = check_all(rows, hand)
    assert len(endings) == 6 and min(endings.values()) > 1, endings
    spelling = policy._spelling
    for body in server.asked():
        assert body["model"] == "base" and body["temperature"] == 1.0 and body["return_token_ids"]
        assert set(body["stop_token_ids"]) == spelling.stops and body["max_tokens"] <= LIMIT
        assert (body["top_k"], body["min_p"], body["repetition_penalty"], body["top_p"]) == (-1, 0.0, 1.0, 1.0)


def test_nothing_is_asked_without_room_and_a_reply_that_the_context_cuts_is_no_line(hand, serve, tmp_path):
    server = serve(hand, draw=lambda prompt, body: [0] * body["max_tokens"])
    opening = len(policy_of(server, hand, tmp_path)._begin(OPENING).ids)
    for room in (0, 1, LIMIT - 1, LIMIT):
        server.bodies.clear()
        policy = policy_of(server, hand, tmp_path, context=opening + room)
        session = policy.open(OPENING)
        line = next_line(policy, session)
        assert [body["max_tokens"] for body in server.asked()] == [room] * (room > 0)
        if room == LIMIT:
            assert isinstance(line, str) and next_line(policy, session) is None  # the harness's newline has no room
            assert len(policy.close(session)[0]) == opening + LIMIT + 1 and len(server.asked()) == 1
        else:
            assert line is None and len(policy.close(session)[0]) == opening


def test_a_reply_is_asked_for_once_and_what_is_kept_without_ids_again(hand, serve, tmp_path):
    server = serve(hand)
    first, again = (policy_of(server, hand, tmp_path) for _ in range(2))
    session = first.open(OPENING)
    line = next_line(first, session)
    other = again.open(OPENING)
    assert next_line(again, other) == line and first.close(session) == again.close(other)
    assert len(server.asked()) == 1 == again.counts["from_cache"]
    with again._replies._opened() as database:
        database.execute("UPDATE replies SET reply = ?", ('{"text": "act[look]"}',))
    assert next_line(again, again.open(OPENING)) == line and len(server.asked()) == 2


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, hand):
    """Two of the same weights, scaled differently."""
    first = adapter_in(tmp_path_factory.mktemp("adapters") / "first", hand)
    second = shutil.copytree(first, first.with_name("second"))
    config = json.loads((first / "adapter_config.json").read_text())
    write_json(second / "adapter_config.json", config | {"lora_alpha": 5})
    return [first, second]


def test_an_adapter_is_loaded_by_a_name_of_its_content_once(hand, adapters, serve, tmp_path):
    server = serve(hand)
    policies = [policy_of(server, hand, tmp_path, adapter=adapter) for adapter in (*adapters, adapters[0])]
    lines = {policy._name: next_line(policy, policy.open(OPENING)) for policy in policies}
    assert len(lines) == 2 == len(server.adapters)
    assert set(server.adapters.values()) == {str(adapter.absolute()) for adapter in adapters}
    assert {body["model"] for body in server.asked()} == set(lines)


def test_a_server_that_was_restarted_is_given_the_adapter_again_by_one_of_its_threads(hand, adapters, serve, tmp_path):
    server = serve(hand)
    policy = policy_of(server, hand, tmp_path, adapter=adapters[0], concurrency=8)
    for restart in (1, 2):
        server.adapters.clear()
        sessions = [policy.open(f"{OPENING} {i}") for i in range(8)]
        for session in sessions:
            policy.submit(Ask(session, 1.0, restart))
        lines, deadline = {}, time.time() + 60
        while len(lines) < 8 and time.time() < deadline:
            lines |= dict(policy.poll())
        assert len(lines) == 8 and all(isinstance(line, str) for line in lines.values())
        assert policy.counts["adapter_loads"] == 1 + restart == len(server.asked("/v1/load_lora_adapter"))


def test_an_adapter_that_cannot_be_loaded_is_one_sentence_that_says_how_to_start_vllm(hand, adapters, serve, tmp_path):
    server, words = serve(hand), r"--enable-lora --max-lora-rank 2 and VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    for answer in ((404, "Not Found"), (400, "LoRA rank 2 is greater than max_lora_rank 1."), (500, "no LoRA")):
        server.change = lambda path, body, given, answer=answer: answer if "lora" in path else given
        with pytest.raises(ValueError, match=rf"does not load the adapter .*{re.escape(answer[1])}.*{words}"):
            policy_of(server, hand, tmp_path, adapter=adapters[1], retries=0)
    other = write_tiny_model(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on another base than"):
        policy_of(serve(other), other, tmp_path / "run", adapter=adapters[0])
    assert not list(tmp_path.glob("*.sqlite"))


def test_a_server_that_forgets_the_adapter_again_and_again_stops_the_run(hand, adapters, serve, tmp_path):
    server = serve(hand)
    policy = policy_of(server, hand, tmp_path, adapter=adapters[0])
    server.adapters.clear()
    server.change = lambda path, body, answer: server.adapters.clear() or answer
    with pytest.raises(ValueError, match=f"refuses model '{policy._name}'.*does not exist"):
        next_line(policy, policy.open(OPENING))


# ---- servers that are not what they should be ------------------------------------------------------------------------


def changed(**fields):
    """A change of the first choice of a reply; functions are of the choice."""

    def change(path, body, answer):
        if path == "/v1/completions" and "logprobs" not in body:
            [choice] = answer["choices"]
            choice |= {name: value(choice) if callable(value) else value for name, value in fields.items()}
        return answer

    return change


def read_fewer(path, body, answer):
    if "usage" in answer:
        answer["usage"]["prompt_tokens"] -= 1
    return answer


LIES = {
    "no ids": (changed(token_ids=None), "gives no token_ids"),
    "ids as text": (changed(token_ids=["act"]), "gives no token_ids"),
    "empty ids": (changed(token_ids=[]), "gives no token_ids"),
    "ids beyond the vocabulary": (changed(token_ids=[10**6]), "gives id 1000000; expected less than"),
    "negative ids": (changed(token_ids=[-1]), "gives id -1"),
    "another text": (changed(text="act[look]\n"), r"gives the text 'act\[look\]\\n' with ids that .* reads as"),
    "more ids than asked for": (changed(token_ids=lambda choice: choice["token_ids"] + [0] * LIMIT), "does not end a"),
    "past the line": (changed(token_ids=lambda choice: [choice["token_ids"][-1], 0]), "does not end a reply at"),
    "cut within the line": (changed(token_ids=[0, 0], finish_reason="length"), r"within its line \(length\).*-len of"),
    "a prompt cut": (read_fewer, r"read \d+ ids of the \d+ that it was sent"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_whose_ids_cannot_be_what_was_played_stops_the_run_at_once_and_nothing_is_kept(
    hand, serve, tmp_path, lie
):
    change, words = LIES[lie]
    newline = sorted(read_codec(hand).newlines)[0]
    server = serve(hand, draw=lambda prompt, body: [0, newline])
    policy = policy_of(server, hand, tmp_path)
    server.change = change
    with pytest.raises(ValueError, match=words):
        next_line(policy, policy.open(OPENING))
    assert len(server.asked()) == 1 and not list(tmp_path.iterdir())


def test_an_error_that_says_the_context_is_full_is_the_server_s_fault(hand, serve, tmp_path):
    server = serve(hand)
    policy = policy_of(server, hand, tmp_path)
    server.max_model_len = 20
    with pytest.raises(ValueError, match=r"has no room for \d+ ids.*--max-model-len of at least 512"):
        next_line(policy, policy.open(OPENING))


def figures_off_by(nats: float):
    def change(path, body, answer):
        if "logprobs" in (body or {}):
            for choice in answer["choices"]:
                choice["logprobs"]["token_logprobs"][0] -= nats
        return answer

    return change


def at(path: str, answer):
    """A change that answers so on a path."""
    return lambda to, body, given: answer if to == path else given


STRANGERS = {
    "another name": (at("/v1/models", {"data": []}), "serves nothing; expected"),
    "an adapter": (
        at("/v1/models", {"data": [{"id": "base", "parent": "x"}]}),
        "serves base; expected .*, a base",
    ),
    "no length": (at("/v1/models", {"data": [{"id": "base"}]}), "takes None ids.*--max-model-len of at least 512"),
    "another tokenizer": (at("/tokenize", {"tokens": [1, 2]}), "has another tokenizer than"),
    "no tokenizer": (at("/tokenize", (404, "Not Found")), "does not take the request: HTTP 404"),
    "no figures": (at("/v1/completions", {"choices": []}), r"gives 0 log-probabilities for \d+ prompts"),
    "figures of another kind": (
        at("/v1/completions", {"choices": [{"text": ""}]}),
        r"answers /completions with .*missing required field.*expected vLLM",
    ),
    "another base": (
        figures_off_by(2 * TOLERANCE),
        r"another base as 'base' than the server that played before.*0\.20 nats",
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_server_than_the_run_s_is_refused_before_anything_is_asked(hand, serve, tmp_path, stranger):
    before = serve(hand)
    policy = policy_of(before, hand, tmp_path)
    assert not (tmp_path / "server.json").exists()  # a server that never played decides nothing
    next_line(policy, policy.open(OPENING))
    kept = (tmp_path / "server.json").read_bytes()
    server, (change, words) = serve(hand), STRANGERS[stranger]
    server.change = change
    with pytest.raises(ValueError, match=words):
        policy_of(server, hand, tmp_path, retries=0)
    assert not server.asked() and (tmp_path / "server.json").read_bytes() == kept


def test_a_model_length_that_just_suffices_and_small_differences_of_the_base_pass(hand, serve, tmp_path):
    policy = policy_of(serve(hand), hand, tmp_path)
    next_line(policy, policy.open(OPENING))
    needed = 512 + len(policy_of(serve(hand), hand, tmp_path, prompt="An example.\n\n")._spelling.prefix)

    server = serve(hand, max_model_len=needed)
    server.change = figures_off_by(TOLERANCE / 2)
    policy_of(server, hand, tmp_path, prompt="An example.\n\n")
    server.max_model_len -= 1
    with pytest.raises(ValueError, match=f"takes {needed - 1} ids, .*--max-model-len of at least {needed}"):
        policy_of(server, hand, tmp_path, prompt="An example.\n\n")


def test_another_base_after_a_restart_is_noticed_when_the_adapter_is_loaded_again(hand, adapters, serve, tmp_path):
    server = serve(hand)
    policy = policy_of(server, hand, tmp_path, adapter=adapters[0])
    server.adapters.clear()
    server.change = figures_off_by(2 * TOLERANCE)
    with pytest.raises(ValueError, match="has another base as 'base'"):
        next_line(policy, policy.open(OPENING))
    assert not (tmp_path / "replies.sqlite").exists()


def test_settings_that_token_ids_do_not_have_are_refused(hand, serve, tmp_path):
    for name in ("model", "prompt", "max_tokens"):
        with pytest.raises(ValueError, match=f"--server.extra has '{name}', which --server.api tokens decides"):
            policy_of(serve(hand), hand, tmp_path, extra=json.dumps({name: None}))
    with pytest.raises(ValueError, match="--server.api is tokens; expected chat or completions"):
        parse(refine.Args, "", ["--server.api", "tokens"])


def test_a_fault_is_asked_again_and_a_server_that_stays_away_stops_the_run(hand, serve, tmp_path):
    server = serve(hand)
    policy = policy_of(server, hand, tmp_path)
    faults = iter([(503, "loading"), (500, "oops")])
    server.change = lambda path, body, answer: next(faults, answer)
    assert isinstance(next_line(policy, policy.open(OPENING)), str) and len(server.asked()) == 3
    server.down = True
    with pytest.raises(ValueError, match="does not answer.*Is it up"):
        next_line(policy, policy.open(OPENING), seed=1)
    with pytest.raises(ValueError, match="does not answer.*Is it up"):
        policy_of(server, hand, tmp_path)


# ---- a run -----------------------------------------------------------------------------------------------------------


def spelled(path: Path, base: Path = BASE) -> list:
    """The records of a file, all of which have ids that spell them."""
    rows, codec = list(read_trajectories(path)), read_codec(base)
    for row in rows:
        tokens = tokens_of(row, codec)
        assert row.ids and any(row.sampled) and tokens.ids == row.ids[: len(tokens.ids)]
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return adapter_in(tmp_path_factory.mktemp("trained") / "adapter", BASE)


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A run whose round 0 is trained, on generated games."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    shutil.copytree(trained, tmp_path / "round_0/train_pg/adapter")
    write_json(tmp_path / "round_0/train_pg/done.json", {})
    return tmp_path


def test_a_server_that_dies_stops_the_run_which_ends_with_the_same_records_and_asks_nothing_twice(serve, run):
    server = serve(BASE)
    how = {"limit": 5, "max_turns": 4, "temperature": 1.0, "context": 400, "max_new_tokens": 8, "round": 1}
    to = {"model": "base", "api": "tokens", "retries": 0, "concurrency": 1}
    path = run / "round_1/rollout/trajectories.jsonl"
    rollout.main(rollout.Args(run=run, server=Server(url=server.url, **to), **how))
    whole, asked = path.read_bytes(), server.asked()
    record = read_json(run / "run.json")
    assert record["model"] == "models/tiny-alfworld" and {"base", "tokenizer", "config"} <= record.keys()
    assert read_json(path.parent / "done.json")["asked"]["adapter_loads"] == 1
    for file in path.parent.iterdir():
        file.unlink()
    replies = 0

    def dies(path, body, answer):
        nonlocal replies
        replies += "seed" in (body or {})
        return None if replies > 12 else answer

    server.change = dies
    server.bodies.clear()
    with pytest.raises(ValueError, match="does not answer"):
        rollout.main(rollout.Args(run=run, server=Server(url=server.url, **to), **how))
    answered = server.asked()[:12]
    server.change = lambda path, body, answer: answer
    server.bodies.clear()
    server.adapters.clear()  # it was restarted
    rollout.main(rollout.Args(run=run, server=Server(url=server.url, **to), **how))
    assert path.read_bytes() == whole and len(spelled(path)) == 5
    assert not [body for body in answered if body in server.asked()]
    assert len(answered) + len(server.asked()) == len(asked)


def test_actre_is_the_base_on_the_agent_s_server_and_all_stages_know_the_base(serve, run):
    server = serve(BASE)
    how = {"limit": 3, "max_turns": 3, "temperature": 1.0, "context": 400, "max_new_tokens": 8}
    args = {"run": run, "round": 1, "server": Server(url=server.url, model="base", api="tokens")}
    rollout.main(rollout.Args(**args, **how))
    server.bodies.clear()
    how.pop("limit")
    actre.main(actre.Args(**args, probability=0.5, budget=1, **how))
    name = served_name(run / "round_0/train_pg/adapter")
    assert {body["model"] for body in server.asked()} == {"base", name}
    rows = spelled(run / "round_1/actre/trajectories.jsonl")
    assert {turn.thought_by for row in rows for turn in row.turns} == {"react", "actre"}
    facts = read_json(run / "round_1/actre/config.json")["facts"]
    assert facts["base"] == facts["explainer"]["base"] == read_json(run / "run.json")["base"]
    evaluate.main(evaluate.Args(run=run, server=args["server"], round=0, panels=("gen_valid-100",), **how, limit=2))
    evaluate.main(evaluate.Args(run=run, server=args["server"], base=True, panels=("gen_valid-100",), **how, limit=2))
    assert [body["model"] for body in server.asked()][-1] == "base"
    with pytest.raises(StageError, match="is another run.*base is"):
        rollout.main(rollout.Args(**args | {"round": 0}, model=ROOT / "models/tiny-neutral", **how))


# ---- vLLM ------------------------------------------------------------------------------------------------------------


class Served:
    """`vllm serve` of a folder as "base", in a process group of its own, on one port over all its starts."""

    def __init__(self, model_dir: Path, length: int, log: Path):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://localhost:{self.port}/v1", log
        flags = f"--served-model-name base --dtype float32 --enforce-eager --max-model-len {length} --port {self.port}"
        self.command = [*shlex.split(os.environ["VLLM"]), "serve", str(model_dir), *flags.split(), "--enable-lora"]
        self.start()

    def start(self) -> None:
        env = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "HF_HUB_OFFLINE": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=env, start_new_session=True)

    def wait(self) -> None:
        deadline = time.time() + 600
        while time.time() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/models", timeout=5):
                return
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-5000:])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
@pytest.mark.skipif("VLLM" not in os.environ, reason="the environment variable VLLM does not name vLLM's command")
def test_vllm_plays_two_rounds_is_killed_and_started_again_and_every_record_is_spelled(tmp_path, monkeypatch):
    """VLLM is the command that starts vLLM, in an environment of its own: VLLM=/opt/vllm/bin/vllm, or with variables
    for it alone, VLLM="env VLLM_CPU_KVCACHE_SPACE=1 /opt/vllm/bin/vllm". Ten minutes on two busy cores of a CPU.

    The tiny base in float32 plays two rounds of run.sh; vLLM is killed while it plays round 1 with the first adapter.
    Both rounds, greedy, are compared with the local model's.
    """
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    vllm, run = Served(BASE, 1024, tmp_path / "vllm.log"), tmp_path / "run"
    try:
        vllm.wait()
        env = os.environ | {"SERVER": vllm.url, "RUN": str(run), "ROUNDS": "2", "BUDGET": "1"}
        env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
        words = "--play.max-turns 8 --play.server.retries 90 --train.epochs 4 --train.learning-rate 0.01"
        words += " --rollout.limit 8 --actre.probability 0.5 --evaluate.limit 8"
        loop = subprocess.Popen(["./run.sh", "tiny", *words.split()], env=env)
        while not (run / "round_1/rollout/replies.sqlite").exists() and loop.poll() is None:
            time.sleep(0.01)
        vllm.kill()
        vllm.start()
        assert loop.wait() == 0
    finally:
        vllm.kill()
    for stage in ("round_0/rollout", "round_0/evaluate", "round_1/rollout", "round_1/actre", "round_1/evaluate"):
        rows = spelled(run / stage / "trajectories.jsonl")
        asked = read_json(run / stage / "done.json").get("asked")
        print(f"{stage}: {len(rows)} records, won {sum(row.success for row in rows)}; {asked}")
        assert rows and {row.end for row in rows} <= {"success", "finished", "stuck", "max_turns", "context_full"}
    assert read_json(run / "round_1/rollout/done.json")["asked"]["adapter_loads"] == 2  # and after the restart
    assert read_json(run / "round_1/actre/done.json")["asked"]["actre"]["requests"]
    local, rounds = tmp_path / "here", []
    for index in range(2):
        rollout.main(rollout.Args(run=local, round=index, limit=8, max_turns=8, weights="fp32"))
        shutil.copytree(run / f"round_{index}/train_pg", local / f"round_{index}/train_pg")
        here, there = (spelled(of / f"round_{index}/rollout/trajectories.jsonl") for of in (local, run))
        alike = sum(a == b for a, b in zip(here, there, strict=True))
        print(f"round {index}: {alike} of {len(here)} records alike here and there, ids included")
        assert alike >= len(here) - 1
        rounds.append([row.ids for row in there])
    assert rounds[0] != rounds[1]  # else the adapter may be lost on the server
