"""The campaigns of bench/: small runs of both, and that they find what they look for."""

from __future__ import annotations

import functools
import json
import time

import numpy as np
import pytest

from bench import chaos, fuzz
from bench.fuzzing.demands import LIMIT, Broken, accepted, require
from bench.fuzzing.mutations import spoil_bytes, spoil_json, spoil_text

STAGE = """
import fcntl, os, sys, time
import artifacts.interrupts
artifacts.interrupts.install()
os.makedirs("run", exist_ok=True)
lock = open("run/.lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("stage.py: another process is at work", file=sys.stderr)
    sys.exit(2)
if os.path.exists("run/done.json"):
    print("finished already")
    sys.exit()
artifacts.interrupts.advice = "interrupted; run it again"
try:
    with open("run/rows", "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\\n") + 1)
        file.seek(0)
        for index in range(len(file.readlines()), 50):
            file.write(b"%d " % index * 500 + b"\\n")
            file.flush()
            time.sleep(0.005)
    open("run/done.json.tmp", "w").close()
    os.replace("run/done.json.tmp", "run/done.json")
except OSError as error:
    print(f"stage.py: {error.strerror}", file=sys.stderr)
    sys.exit(2)
"""


def counts_of(run, args, capsys) -> dict:
    """The last line of a campaign. Whether it exits as 1 must agree with it."""
    status = 0
    try:
        run(args)
    except SystemExit as end:
        status = end.code
    out = capsys.readouterr().out
    print(out)  # pytest shows it if the test fails
    counts = json.loads(out.splitlines()[-1])
    assert status == (counts["failures"] > 0)
    return counts


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Writes a small stage, which then is all that chaos.py knows."""

    def write(text: str) -> None:
        path = tmp_path / "stage.py"
        path.write_text(text)
        monkeypatch.setattr(chaos, "CHAINS", ((("small", str(path)),),))

    return write


def test_a_stage_that_resumes_well_is_killed_in_all_ways_without_a_failure(stage, capsys):
    stage(STAGE)
    counts = counts_of(chaos.main, chaos.Args(kills=8, pairs=2, stages=("small",)), capsys)
    assert counts["failures"] == 0 and counts["small"] == 8 and counts["killed_twice"] == 3 and counts["pairs"] == 2
    assert sum(counts[kind] for kind in chaos.STATUS) == 8 + 3


@pytest.mark.parametrize(
    ("right", "wrong", "kills", "pairs"),
    [
        ("range(len(file.readlines()), 50)", "range(50)", 2, 0),
        ("fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", 0, 1),
        ("except OSError as error", "except KeyError as error", 4, 0),
    ],
    ids=["writes rows again", "has no lock", "shows a traceback"],
)
def test_a_stage_with_a_fault_is_found(stage, capsys, right, wrong, kills, pairs):
    assert right in STAGE
    stage(STAGE.replace(right, wrong))
    assert counts_of(chaos.main, chaos.Args(kills=kills, pairs=pairs, stages=("small",)), capsys)["failures"]


@pytest.mark.slow
def test_refine_is_killed_resumed_and_refused_to_a_second_process(capsys):
    counts = counts_of(chaos.main, chaos.Args(kills=4, pairs=1, stages=("refine",)), capsys)
    assert counts["failures"] == 0 and counts["refine"] == 4


def test_files_are_compared_without_what_a_clock_wrote(tmp_path):
    for run, seconds in (("a", 1.0), ("b", 2.0)):
        stage = tmp_path / run / "rollout"
        stage.mkdir(parents=True)
        (stage / "done.json").write_text(json.dumps({"trajectories": 3, "seconds": seconds}))
        (stage / "metrics.jsonl").write_text(json.dumps({"loss": 0.5, "tokens_per_s": seconds}) + "\n")
        (stage / ".lock").write_text(run)
    chaos.compare(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/rollout/metrics.jsonl").write_text(json.dumps({"loss": 0.6}) + "\n")
    (tmp_path / "a/rollout/scores.json.7.tmp").write_text("{")
    with pytest.raises(chaos.Wrong, match="rollout/metrics.jsonl, rollout/scores.json.7.tmp$"):
        chaos.compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (1, "Traceback ...\nrefine.py: interrupted"),
        (143, ""),
        (143, "KeyboardInterrupt"),
        (-15, "refine.py: interrupted"),
    ],
)
def test_an_end_without_its_sentence_or_status_is_found(status, said):
    chaos.check_end(("refine.py",), 143, "\nrefine.py: interrupted; go on\n", 143, "interrupted")
    with pytest.raises(chaos.Wrong, match="ends as"):
        chaos.check_end(("refine.py",), status, said, 143, "interrupted")


def test_a_few_cases_of_each_kind_end_in_a_sentence(capsys):
    counts = counts_of(fuzz.main, fuzz.Args(actions=60, records=8, folders=4, replies=4), capsys)
    assert counts["failures"] == 0 and counts["actions"] == 60
    assert (counts["records"], counts["folders"], counts["replies"]) == (8, 4, 4)


def test_a_refusal_must_name_its_file():
    assert accepted("x.json", json.loads, "[1]") == [1]
    with pytest.raises(Broken, match="JSONDecodeError without 'x.json'"):
        accepted("x.json", json.loads, "[")


class Case:
    """A case that does what it is given."""

    clock, limit = time.monotonic, LIMIT

    def __init__(self, act):
        self.act = act

    def __call__(self, rng):
        self.act()
        return {}


class Panic(BaseException):
    """As a library's panic is: no Exception."""


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("act", "complaint"),
    [
        (functools.partial(fail, KeyError("r")), "KeyError: 'r'"),
        (functools.partial(fail, Panic("at the disco")), "Panic: at the disco"),
        (functools.partial(fail, SystemExit(0)), "SystemExit: 0"),
        (functools.partial(require, False, "a row was lost"), "a row was lost"),
        (lambda: None, ""),
    ],
)
def test_whatever_else_a_case_raises_is_a_failure(act, complaint):
    assert fuzz.once(Case(act), np.random.default_rng(0))[1].strip().endswith(complaint)


def test_a_slow_case_is_found():
    class Slow(Case):
        limit = 0.0

    assert fuzz.once(Slow(lambda: None), np.random.default_rng(0))[1].startswith("takes ")


def test_damage_is_drawn_from_the_generator_alone():
    draws = [
        (spoil_text("go to desk 1", ["look"], rng), spoil_json('{"a": [1, {"b": 2}]}', rng), spoil_bytes(b"abc", rng))
        for rng in (np.random.default_rng(seed) for seed in (3, 3, 4))
    ]
    assert draws[0] == draws[1] != draws[2]
