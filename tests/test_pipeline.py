"""The whole pipeline in a temporary folder, killed and resumed, with the tiny base on a few games."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

import actre
import evaluate
import rollout
import train_pg
from agent.server import Server
from artifacts.json_io import read_json
from artifacts.render import reason_line
from artifacts.scores import directory_name
from artifacts.stage import StageError, round_directory
from artifacts.trajectory import read_trajectories, to_line
from lora.tokenizer import load_tokenizer
from models import publish
from tests.support.helpers import write_tiny_model

ROOT = Path(__file__).parent.parent
SMALL = {"slots": 8, "context": 1024, "max_turns": 14}


@pytest.fixture(autouse=True)
def generated_games(monkeypatch):
    """Generated games everywhere, whatever is set outside, and the project's folder as the current one."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)


def play_round(run: Path, number: int, **changes) -> None:
    rollout.main(rollout.Args(run=run, limit=10, temperature=0.3, **SMALL))
    actre.main(actre.Args(run=run, budget=2, **SMALL))
    train_pg.main(train_pg.Args(run=run, epochs=(2,), batch_rows=2, **changes))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Two rounds by `rollout && actre && train_pg` with no round given, then all rounds evaluated."""
    run = tmp_path_factory.mktemp("run")
    before = os.environ.pop("ALFWORLD_DATA", None)
    os.chdir(ROOT)
    for number in range(2):
        play_round(run, number)
    evaluate.main(evaluate.Args(run=run, limit=6, **SMALL))
    if before:
        os.environ["ALFWORLD_DATA"] = before
    return run


def test_two_rounds_leave_every_artifact(unbroken):
    for number in range(2):
        for stage in ("rollout", "actre", "train_pg", "evaluate"):
            directory = round_directory(unbroken, number) / stage
            config, done = read_json(directory / "config.json"), read_json(directory / "done.json")
            assert config["args"]["seed"] == 0 and done["seconds"] >= 0
    assert (round_directory(unbroken, 0) / "actre/trajectories.jsonl").read_bytes() == b""
    rows = list(read_trajectories(round_directory(unbroken, 1) / "rollout/trajectories.jsonl"))
    assert len(rows) == 10 and {t.round for t in rows} == {1} and all(t.ids and sum(t.sampled) for t in rows)
    types = read_json(round_directory(unbroken, 1) / "rollout/done.json")["types"].values()
    assert sum(t["n"] for t in types) == 10 and sum(t["success"] for t in types) == sum(t.success for t in rows)
    composed = list(read_trajectories(round_directory(unbroken, 1) / "actre/trajectories.jsonl"))
    failed = {t.task_id for t in rows if not t.success}
    assert {t.task_id for t in composed} == failed and len(composed) == 2 * len(failed)
    scores = read_json(round_directory(unbroken, 1) / "evaluate/scores.json")
    (panel,) = scores.values()
    assert panel["n"] == 6 == sum(t["n"] for t in panel["types"].values())


def test_packed_npz_is_what_was_trained_on(unbroken):
    directory = round_directory(unbroken, 1) / "train_pg"
    packed = np.load(directory / "packed.npz")
    for line in (directory / "packed.jsonl").read_text().split("\n")[:-1]:
        place = json.loads(line)
        source = list(read_trajectories(unbroken / place["file"]))[place["line"] - 1]
        where = packed["segments_NL"][place["row"]] == place["segment"]
        assert packed["ids_NL"][place["row"]][where].tolist() == source.ids
        weights = np.unique(packed["weights_NL"][place["row"]][where])
        expected = sorted(place["weight"] * share for share in (1.0, train_pg.Args().world_weight))
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
        assert (place["weight"] > 0) == source.success
    done = read_json(directory / "done.json")
    assert len((directory / "metrics.jsonl").read_text().split("\n")) == done["steps"] + 1


def test_the_same_seed_gives_the_same_files(unbroken, tmp_path):
    rollout.main(rollout.Args(run=tmp_path, limit=10, temperature=0.3, **SMALL))
    first = round_directory(unbroken, 0) / "rollout/trajectories.jsonl"
    assert (round_directory(tmp_path, 0) / "rollout/trajectories.jsonl").read_bytes() == first.read_bytes()


def copy_of_round_0(run: Path, to: Path) -> Path:
    """A run that has come to the end of round 0."""
    shutil.copytree(run / "round_0", to / "round_0", ignore=shutil.ignore_patterns("evaluate", "checkpoints"))
    shutil.copy(run / "run.json", to / "run.json")
    return to


def test_shards_join_to_what_one_process_plays(unbroken, tmp_path, capsys):
    """Two processes at once, one of them killed and resumed; then compositions and an evaluation in shards."""
    run, there = copy_of_round_0(unbroken, tmp_path / "run"), round_directory(unbroken, 1)
    flags = ["--run", str(run), "--limit", "10", "--temperature", "0.3", "--slots", "8", "--max-turns", "14"]
    commands = [["rollout.py", *flags, "--context", "1024", "--shard", f"{index}/2"] for index in (1, 2)]
    shard = run / "round_1/shards/rollout.1-of-2"
    other = subprocess.Popen([sys.executable, *commands[1]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    kill_when(commands[0], shard / "trajectories.jsonl", 1)
    assert "not yet 1/2" in other.communicate(timeout=240)[0] and not (run / "round_1/rollout").exists()
    assert not (shard / "done.json").exists()
    subprocess.run([sys.executable, *commands[0]], cwd=ROOT, check=True, capture_output=True, timeout=240)
    for index in (2, 1):
        actre.main(actre.Args(run=run, budget=2, shard=f"{index}/2", **SMALL))
    for stage in ("rollout", "actre"):
        here = run / "round_1" / stage
        assert (here / "trajectories.jsonl").read_bytes() == (there / stage / "trajectories.jsonl").read_bytes()
        ours, whole = (read_json(folder / stage / "done.json") for folder in (run / "round_1", there))
        same = ours.keys() - {"seconds", "asked", "rates", "sampler", "shards"}
        assert {name: ours[name] for name in same} == {name: whole[name] for name in same}
        assert sorted(ours["shards"]) == [f"{stage}.1-of-2", f"{stage}.2-of-2"]
    capsys.readouterr()
    for index in (1, 2, 2):
        evaluate.main(evaluate.Args(run=run, round=0, limit=6, shard=f"{index}/2", **SMALL))
    assert "evaluate: finished already" in capsys.readouterr().out
    scores = [read_json(round_directory(each, 0) / "evaluate/scores.json") for each in (run, unbroken)]
    assert scores[0] == scores[1]


def test_a_shard_of_other_settings_is_not_joined_nor_is_a_fault(unbroken, tmp_path):
    run = copy_of_round_0(unbroken, tmp_path / "run")
    rollout.main(rollout.Args(run=run, limit=2, shard="1/2", **SMALL))
    with pytest.raises(StageError, match="rollout.1-of-2 was played with other settings.*temperature"):
        rollout.main(rollout.Args(run=run, limit=2, shard="2/2", temperature=0.5, **SMALL))
    assert (run / "round_1/shards/rollout.2-of-2/done.json").exists()  # nothing is lost
    shutil.rmtree(run / "round_1/shards/rollout.2-of-2")
    shard = run / "round_1/shards/rollout.1-of-2/trajectories.jsonl"
    [played] = read_trajectories(shard)
    shard.write_bytes(to_line(msgspec.structs.replace(played, end="env_error", ids=[], sampled=[])))
    rollout.main(rollout.Args(run=run, limit=2, shard="2/2", **SMALL))
    joined = {t.key: t for t in read_trajectories(run / "round_1/rollout/trajectories.jsonl")}
    assert len(joined) == 2 and joined[played.key] == played  # a fault is played again
    for wrong in ("0/2", "3/2", "1", "1/2/3", "-1/2", "a/b", "1/0"):
        with pytest.raises(ValueError, match="expected the number of this share"):
            rollout.Args(run=run, shard=wrong).check()


def kill_when(command: list[str], path: Path, lines: int) -> None:
    """Starts a stage and sends SIGKILL as soon as `path` has so many lines."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 240
    while process.poll() is None and time.time() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL, "the stage ended before it could be killed"


def test_a_killed_rollout_resumes_to_the_same_file(unbroken, tmp_path):
    directory = round_directory(tmp_path, 0) / "rollout"
    path = directory / "trajectories.jsonl"
    flags = ["--limit", "10", "--temperature", "0.3", "--slots", "8", "--context", "1024", "--max-turns", "14"]
    kill_when(["rollout.py", "--run", str(tmp_path), *flags], path, 3)
    assert not (directory / "done.json").exists() and (directory / "config.json").exists()
    with open(path, "ab") as file:
        file.write(b'{"schema":1,"env":"alfw')  # and its last line was cut
    with pytest.raises(StageError, match="not finished"):
        actre.main(actre.Args(run=tmp_path, **SMALL))
    with pytest.raises(StageError, match="args.seed"):
        rollout.main(rollout.Args(run=tmp_path, limit=10, temperature=0.3, seed=5, **SMALL))
    rollout.main(rollout.Args(run=tmp_path, limit=10, temperature=0.3, **SMALL))
    assert path.read_bytes() == (round_directory(unbroken, 0) / "rollout/trajectories.jsonl").read_bytes()


def test_a_resumed_stage_plays_again_what_ended_in_a_fault(unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(round_directory(unbroken, 0) / "rollout", round_directory(run, 0) / "rollout")
    directory = round_directory(run, 0) / "rollout"
    config = read_json(directory / "config.json")
    config["args"] |= {"run": str(run), "deadline": 0.0}  # a deadline may change
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / "trajectories.jsonl"
    rows = list(read_trajectories(path))
    for row, end in zip(rows[2:5], ("llm_error", "timeout", "env_error"), strict=True):
        row.end, row.turns, row.ids, row.sampled = end, [], [], []
    path.write_bytes(b"".join(map(to_line, rows)))
    rollout.main(rollout.Args(run=run, limit=10, temperature=0.3, **SMALL))
    assert path.read_bytes().count(b"llm_error") == 1  # a finished stage is finished
    (directory / "done.json").unlink()
    rollout.main(rollout.Args(run=run, limit=10, temperature=0.3, **SMALL))
    assert path.read_bytes() == (round_directory(unbroken, 0) / "rollout/trajectories.jsonl").read_bytes()


def test_trials_lost_to_faults_are_composed_again():
    args = actre.Args(budget=3, force=2)
    assert actre.next_trials(args, {}) == [0, 1]
    assert actre.next_trials(args, {1: False, 2: False}) == [0]
    assert actre.next_trials(args, {0: False, 1: False}) == [2]
    assert actre.next_trials(args, {0: False, 1: False, 2: False}) == actre.next_trials(args, {0: False, 1: True}) == []
    assert actre.next_trials(actre.Args(budget=4, force=1), {0: False, 2: False, 3: False}) == [1]


def test_rates_are_kept(unbroken):
    directory = round_directory(unbroken, 1)
    for stage in ("rollout", "actre"):
        rates = read_json(directory / stage / "done.json")["rates"]
        assert rates["trajectories_per_hour"] > 0 and rates["tokens_per_second"] > 0
        assert 0 <= rates["waiting_for_worlds"] < 0.5 < rates["waiting_for_model"] <= 1
    sent = computed = 0
    for row in read_trajectories(directory / "rollout/trajectories.jsonl"):
        asks = [i for i in range(1, len(row.ids)) if row.sampled[i] and not row.sampled[i - 1]]
        sent += sum(asks)
        computed += row.sampled[: asks[-1]].count(0)
    assert read_json(directory / "rollout/done.json")["rates"]["prefix_reuse"] == round(1 - computed / sent, 4) > 0.8
    assert 0 < read_json(round_directory(unbroken, 0) / "evaluate/done.json")["rates"]["prefix_reuse"] < 1


def copy_inputs(run: Path, to: Path, number: int) -> None:
    for earlier in range(number + 1):
        for stage in ("rollout", "actre"):
            directory = round_directory(to, earlier) / stage
            directory.mkdir(parents=True)
            for name in ("trajectories.jsonl", "done.json"):
                (directory / name).write_bytes((round_directory(run, earlier) / stage / name).read_bytes())


def test_actre_is_tuned_to_its_form_and_explains_with_its_own_adapter(unbroken, tmp_path):
    run = copy_of_round_0(unbroken, tmp_path / "run")
    rows = [t for t in read_trajectories(run / "round_0/rollout/trajectories.jsonl") if t.success]
    tuned = train_pg.Args(run=tmp_path / "actre", inputs=(run / "round_0/rollout",), form="actre", world_weight=0.0)
    train_pg.main(dataclasses.replace(tuned, epochs=(1,), learning_rate=5e-2))
    with np.load(tmp_path / "actre/round_0/train_pg/packed.npz") as packed:
        learnt = load_tokenizer("models/tiny-alfworld").decode(packed["ids_NL"][packed["weights_NL"] > 0])
    reasons = [reason_line(turn.thought) for row in rows for turn in row.turns if turn.thought]
    assert sorted(learnt) == sorted("".join(reasons))
    shutil.copytree(unbroken / "round_1/rollout", run / "round_1/rollout")
    adapter = tmp_path / "actre/round_0/train_pg/adapter"
    args = actre.Args(run=run, budget=1, probability=1.0, actre_adapter=adapter, **SMALL | {"max_turns": 4})
    actre.main(args)
    reasons = [turn.thought for t in read_trajectories(run / "round_1/actre/trajectories.jsonl") for turn in t.turns]
    frozen = dataclasses.replace(args, actre_adapter=None)
    with pytest.raises(StageError, match=r"facts\.actre_adapter: there .*, now None"):
        actre.main(frozen)
    shutil.rmtree(run / "round_1/actre")
    actre.main(frozen)
    assert reasons != [t.thought for r in read_trajectories(run / "round_1/actre/trajectories.jsonl") for t in r.turns]
    with pytest.raises(ValueError, match="--actre-adapter: expected ActRe to be the base"):
        dataclasses.replace(args, actre_server=Server(url="http://localhost:1", model="m")).check()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        dataclasses.replace(args, actre_adapter=tmp_path).check()


def test_a_published_adapter_plays_and_its_card_says_where_it_comes_from(unbroken, tmp_path):
    args = publish.Args(run=unbroken, round=1, out=tmp_path / "household")
    publish.main(args)
    folder = round_directory(unbroken, 1) / "train_pg"
    before, after = (load_file(f / "adapter_model.safetensors") for f in (folder / "adapter", args.out))
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values.astype(ml_dtypes.bfloat16))
    evaluate.main(evaluate.Args(run=tmp_path / "run", adapter=args.out, limit=6, **SMALL))
    scores = tmp_path / "run/adapter/evaluate/scores.json"
    publish.main(dataclasses.replace(args, scores=(scores,)))
    card, score = (args.out / "README.md").read_text(), read_json(scores)["gen_valid-100"]
    config, done = read_json(folder / "config.json"), read_json(folder / "done.json")
    for fact in (
        config["facts"]["base"],
        config["git"]["commit"],
        f"{done['sequences']} trajectories ({done['sequences_failed']} failures)",
        "--batch-rows 2",
        f"| gen_valid-100 | 6 | {100 * score['rate']:.1f} % [",
    ):
        assert fact in card, fact


def test_a_killed_training_resumes_to_the_same_adapter(unbroken, tmp_path):
    copy_inputs(unbroken, tmp_path, 0)
    directory = round_directory(tmp_path, 0) / "train_pg"
    steps = read_json(round_directory(unbroken, 0) / "train_pg/done.json")["steps"]
    flags = ["--epochs", "2", "--batch-rows", "2", "--checkpoint-minutes", "0"]
    kill_when(["train_pg.py", "--run", str(tmp_path), *flags], directory / "metrics.jsonl", steps // 2 + 1)
    assert not (directory / "adapter").exists()
    train_pg.main(train_pg.Args(run=tmp_path, epochs=(2,), batch_rows=2))
    for name in ("adapter/adapter_model.safetensors", "packed.npz"):
        assert (directory / name).read_bytes() == (round_directory(unbroken, 0) / "train_pg" / name).read_bytes(), name


def test_bad_input_is_named(unbroken, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="json_2.1.1"):
        rollout.main(rollout.Args(run=tmp_path / "a", data=str(tmp_path), panel="gen_train-120", **SMALL))
    copy_inputs(unbroken, tmp_path, 0)
    path = round_directory(tmp_path, 0) / "rollout/trajectories.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"trajectories\.jsonl:10: the line is cut off"):
        train_pg.main(train_pg.Args(run=tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not valid JSON"):
        load_tokenizer(tmp_path)


def test_an_adapter_of_another_base_is_refused(unbroken, tmp_path):
    other = write_tiny_model(tmp_path / "other")
    trained = round_directory(tmp_path / "run", 0) / "train_pg"
    shutil.copytree(round_directory(unbroken, 0) / "train_pg", trained)
    with pytest.raises(ValueError, match="base"):
        evaluate.main(evaluate.Args(run=tmp_path / "run", round=0, model=other, limit=6, **SMALL))
    assert not (round_directory(tmp_path / "run", 0) / "evaluate/done.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(unbroken, tmp_path):
    copy_inputs(unbroken, tmp_path, 0)
    with pytest.raises(ValueError, match="step [0-9]+: loss .*--learning-rate"):
        train_pg.main(train_pg.Args(run=tmp_path, epochs=(4,), batch_rows=2, learning_rate=1e30))
    assert not (round_directory(tmp_path, 0) / "train_pg/done.json").exists()


def run_twice(command: list[str]) -> tuple[list[int], list[str]]:
    """Runs a stage in two processes that know of each other. Returns their exit statuses and what they printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"COORDINATOR": address, "PROCESSES": "2", "PROCESS": str(number)},
        )
        for number in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], printed


def test_two_processes_train_as_one_does(unbroken, tmp_path):
    copy_inputs(unbroken, tmp_path, 0)
    command = ["train_pg.py", "--run", str(tmp_path), "--epochs", "2", "--mesh", "1", "2", "1"]
    codes, printed = run_twice([*command, "--checkpoint-minutes", "0"])
    assert codes == [0, 0], printed
    one, two = (round_directory(run, 0) / "train_pg" for run in (unbroken, tmp_path))
    lines = [(directory / "metrics.jsonl").read_text().splitlines() for directory in (one, two)]
    losses = [[json.loads(line)["loss"] for line in of_run] for of_run in lines]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert read_json(two / "done.json")["steps"] == len(losses[0])
    adapters = [load_file(directory / "adapter/adapter_model.safetensors") for directory in (one, two)]
    assert {k: x.shape for k, x in adapters[0].items()} == {k: x.shape for k, x in adapters[1].items()}
    assert "train_pg round 0" in printed[0] and "train_pg round 0" not in printed[1]
    codes, printed = run_twice([*command, "--round", "0", "--learning-rate", "0.5"])  # the second would wait forever
    assert codes == [2, 1] and "args.learning_rate" in printed[0], printed
    assert "another process failed" in printed[1] and "args.learning_rate" in printed[1]


def test_two_processes_play_as_one_does(unbroken, tmp_path):
    flags = ["--run", str(tmp_path), "--limit", "10", "--temperature", "0.3", "--slots", "8", "--context", "1024"]
    codes, printed = run_twice(["rollout.py", *flags, "--max-turns", "14"])
    assert codes == [0, 0], printed
    first = round_directory(unbroken, 0) / "rollout/trajectories.jsonl"
    assert (round_directory(tmp_path, 0) / "rollout/trajectories.jsonl").read_bytes() == first.read_bytes()


@pytest.mark.slow
def test_eight_devices_play_as_one_does(tmp_path):
    played = []
    for devices in ("1", "8"):
        run = tmp_path / devices
        flags = ["--run", str(run), "--limit", "16", "--temperature", "0.7", "--slots", "64", "--max-turns", "10"]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": devices}
        subprocess.run([sys.executable, "rollout.py", *flags], cwd=ROOT, env=environment, check=True)
        played.append((round_directory(run, 0) / "rollout/trajectories.jsonl").read_bytes())
    assert played[0] == played[1]


def test_six_wordings_are_played_scored_and_resumed(unbroken, tmp_path, capsys):
    """Of an adapter that another run trained; what was played in a wording says so in its texts."""
    adapter = round_directory(unbroken, 0) / "train_pg/adapter"
    args = evaluate.Args(
        run=tmp_path,
        adapter=adapter,
        limit=2,
        perturb="all",
        best_of=2,
        temperature=1.0,
        tell_commands=True,
        slots=8,
        context=1024,
        max_turns=3,
    )
    evaluate.main(args)
    (panel,) = (found := read_json(tmp_path / "evaluate_all_best_of_2.json")["adapter"])
    assert list(found[panel]["success"]) == ["none", "P1", "P2", "P3", "P4", "P5", "mean", "std"]
    for name, word in {"none": "go to {receptacle}", "P2": "move to {receptacle}", "P4": "desk1"}.items():
        folder = tmp_path / "adapter" / directory_name("alfworld", name, 2)
        rows = list(read_trajectories(folder / "trajectories.jsonl"))
        assert len(rows) == len({row.key for row in rows}) == 4 and {row.trial for row in rows} == {0, 1}
        assert all("You can: " in row.first_observation for row in rows)
        assert any(word in row.first_observation for row in rows)
        score = read_json(folder / "scores.json")[panel]
        assert (score["n"], score["best_of"]["n"], score["best_of"]["trials"]) == (4, 2, 2)
        assert score["best_of"]["rate"] >= score["rate"] and score["best_of"]["progress"] >= score["progress"]
        assert score["world"].get("perturbation", "none") == name
    folder = tmp_path / "adapter/evaluate_P4_best_of_2"  # killed after three of four
    whole = (folder / "trajectories.jsonl").read_bytes()
    (folder / "trajectories.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"schema":1,"env')
    (folder / "done.json").unlink()
    capsys.readouterr()
    evaluate.main(args)
    assert (folder / "trajectories.jsonl").read_bytes() == whole
    assert capsys.readouterr().out.count("finished already") == 5
    with pytest.raises(ValueError, match="P[1-5] c.*choose another perturbation"):
        evaluate.main(evaluate.Args(run=tmp_path / "shop", env="webshop", base=True, perturb="all"))
    assert not (tmp_path / "shop").exists()  # refused before anything is played
    with pytest.raises(ValueError, match="temperature 0"):
        evaluate.Args(run=tmp_path, base=True, best_of=2).check()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        evaluate.main(evaluate.Args(run=tmp_path, adapter=tmp_path))
    with pytest.raises(ValueError, match="more than one"):
        evaluate.Args(run=tmp_path, adapter=adapter, base=True).check()


def test_webshop_goes_through_the_stages(tmp_path, monkeypatch):
    """A model that writes garbage buys nothing; the shop takes sampled actions; the score names the shop."""
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    model, run = write_tiny_model(tmp_path / "model"), tmp_path / "run"
    small = {"run": run, "model": model, "env": "webshop", "slots": 4, "context": 2048, "max_turns": 3}
    rollout.main(rollout.Args(limit=3, max_new_tokens=4, **small))
    (run / "round_0/train_pg").mkdir()
    (run / "round_0/train_pg/done.json").write_text("{}")
    shutil.copytree(run / "round_0/rollout", run / "round_1/rollout")  # composed for, as if played in round 1
    monkeypatch.setattr(actre, "adapter_of_round", lambda run, number: None)
    actre.main(actre.Args(round=1, budget=1, probability=1.0, reason="template", max_new_tokens=4, **small))
    composed = list(read_trajectories(run / "round_1/actre/trajectories.jsonl"))
    turns = [turn for t in composed for turn in t.turns]
    assert len(composed) == 3 and all(turn.valid and turn.action_by == "sampled" for turn in turns)
    assert any(turn.action.startswith("search[") for turn in turns)
    evaluate.main(evaluate.Args(base=True, limit=2, max_new_tokens=4, **small))
    (panel,) = read_json(run / "base/evaluate_webshop/scores.json").values()
    assert (panel["n"], panel["success"], panel["types"]) == (2, 0, {})
    assert panel["world"]["nouns"] and panel["world"]["products"] == 1000
