"""A run knows what it is: stages of another world or base are refused, and no score answers another question."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import actre
import evaluate
import rollout
import train_pg
from agent.args import Player, make_policy
from agent.scripted import ScriptedPolicy
from artifacts.json_io import read_json, write_json
from artifacts.scores import table
from artifacts.stage import StageError, read_run
from artifacts.trajectory import read_trajectories
from models import demonstrations
from tests.support.helpers import write_tiny_model

ROOT = Path(__file__).parent.parent


class Look:
    """Looks round forever."""

    def extend(self, text: str) -> None: ...

    def reply(self) -> str:
        return " act[look]\n"


@pytest.fixture(autouse=True, scope="module")
def a_policy_without_a_model():
    """What a run is does not depend on how well it is played. Generated tasks everywhere, whatever is set outside."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ALFWORLD_DATA", "WEBSHOP_DATA"):
            patch.delenv(name, raising=False)
        patch.chdir(ROOT)
        for stage in (rollout, actre, evaluate):
            patch.setattr(stage, "make_policy", lambda *_: ScriptedPolicy(lambda _: Look()))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory, a_policy_without_a_model) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "base")


SMALL = {"limit": 2, "max_turns": 2}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model) -> Path:
    """A run whose base was evaluated on two tasks."""
    run = tmp_path_factory.mktemp("evaluated")
    evaluate.main(evaluate.Args(run=run, base=True, model=model, **SMALL))
    return run


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"limit": 3}, r"facts\.tasks\.gen_valid-100: there 2, now 3"),
        ({"temperature": 1.0}, r"args\.temperature: there 0\.0, now 1\.0"),
        ({"tell_commands": True}, r"args\.tell_commands: there False, now True"),
        ({"panels": ("gen_train-120",)}, r"facts\.panels\.gen_train-120: there None"),
        ({"prompt": Path("prompts/alfworld_react.txt")}, r"facts\.prompt: there None"),
    ],
)
def test_a_finished_evaluation_never_answers_another_question(evaluated, tmp_path, model, changes, named):
    run = copy_of(evaluated, tmp_path)
    with pytest.raises(StageError, match=named):
        evaluate.main(evaluate.Args(**({"run": run, "base": True, "model": model} | SMALL | changes)))


def test_another_evaluation_has_a_name_of_its_own(evaluated, tmp_path, model, capsys):
    run = copy_of(evaluated, tmp_path)
    evaluate.main(evaluate.Args(run=run, base=True, model=model, name="three", **SMALL | {"limit": 3}))
    assert (run / "base" / "evaluate_three" / "scores.json").exists()
    assert "0/3" in capsys.readouterr().out.replace("   ", " ")


def test_the_same_evaluation_has_nothing_to_play_wherever_the_run_was_moved(evaluated, tmp_path, model, capsys):
    """Nor is the base asked for again: the run knows it; a default that is given by hand is the same."""
    run = copy_of(evaluated, tmp_path)
    evaluate.main(evaluate.Args(run=run, base=True, slots=3, context=1024, panels=("gen_valid-100",), **SMALL))
    assert "nothing to play: all of these evaluations are finished" in capsys.readouterr().out


def test_a_table_marks_what_was_played_with_other_settings(evaluated, tmp_path):
    run = copy_of(evaluated, tmp_path)
    for round_index in range(2):  # two trained rounds, of which the first was evaluated otherwise
        shutil.copytree(run / "base" / "evaluate", run / f"round_{round_index}" / "evaluate")
        (run / f"round_{round_index}" / "train_pg").mkdir()
        write_json(run / f"round_{round_index}" / "train_pg" / "done.json", {})
    shutil.rmtree(run / "base")
    assert "other settings" not in table(run, "evaluate")
    config = read_json(run / "round_0" / "evaluate" / "config.json")
    config["args"]["temperature"] = 0.7
    write_json(run / "round_0" / "evaluate" / "config.json", config)
    shown = table(run, "evaluate")
    assert " 0* " in shown and "* round 0 was played with other settings: args.temperature 0.7 (else 0.0)" in shown


def test_a_run_that_does_not_exist_or_is_not_trained_is_said_so(tmp_path, model):
    with pytest.raises(StageError, match="no such run"):
        evaluate.main(evaluate.Args(run=tmp_path / "nope", model=model))
    (tmp_path / "begun").mkdir()
    with pytest.raises(StageError, match=r"round 0 of .* is not trained \(0 rounds are\)"):
        evaluate.main(evaluate.Args(run=tmp_path / "begun", model=model))
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_a_run_plays_one_world_and_one_base(tmp_path, model):
    run = tmp_path / "run"
    rollout.main(rollout.Args(run=run, model=model, **SMALL))
    record = read_run(run)
    assert record["env"] == "alfworld" and record["world"]["engine"] == "ours" and len(record["base"]) == 64
    with pytest.raises(StageError, match=r"env is 'alfworld' there, 'webshop' now \(--env\)"):
        actre.main(actre.Args(run=run, env="webshop", model=model))
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(StageError, match=r"base is .* \(--model\)"):
        actre.main(actre.Args(run=run, model=other))
    with pytest.raises(StageError, match=r"base is .* \(--model\)"):
        evaluate.main(evaluate.Args(run=run, base=True, model=other))
    actre.main(actre.Args(run=run))  # the run's base
    with pytest.raises(StageError, match=r"base is .* \(--model\)"):
        train_pg.main(train_pg.Args(run=run, model=other))
    assert sorted(path.name for path in (run / "round_0").iterdir()) == ["actre", "rollout"]


def test_an_edited_tokenizer_or_configuration_is_another_base(tmp_path, model):
    run, edited = tmp_path / "run", Path(shutil.copytree(model, tmp_path / "edited"))
    rollout.main(rollout.Args(run=run, model=model, **SMALL))
    config = read_json(edited / "config.json")
    for form in (config, config["rope_parameters"]):
        form["rope_theta"] = 5e5
    write_json(edited / "config.json", config)
    with pytest.raises(StageError, match=r"config is .* \(--model\)"):
        actre.main(actre.Args(run=run, model=edited))


def test_each_world_names_its_base_and_a_base_its_world(tmp_path):
    rollout.main(rollout.Args(run=tmp_path, env="webshop", limit=1, max_turns=1))
    assert read_run(tmp_path)["model"] == "models/tiny-webshop"
    config = read_json(tmp_path / "round_0" / "rollout" / "config.json")
    assert config["args"]["context"] == 3072
    with pytest.raises(ValueError, match="models/tiny-alfworld"):
        rollout.main(rollout.Args(run=tmp_path / "wrong", env="webshop", model=Path("models/tiny-alfworld"), limit=1))
    assert not (tmp_path / "wrong").exists()


def test_a_run_begun_by_hand_and_by_run_sh_is_one(tmp_path, model):
    """run.sh gives the round, the seed, the base and absolute paths; by hand they are left out."""
    run = tmp_path / "run"
    by_hand = rollout.Args(run=run, model=model, **SMALL)
    given = rollout.Args(run=run.resolve(), model=model.resolve(), round=0, seed=0, panel="gen_train-120", **SMALL)
    rollout.main(by_hand)
    rows = [t.key for t in read_trajectories(run / "round_0" / "rollout" / "trajectories.jsonl")]
    (run / "round_0" / "rollout" / "done.json").unlink()
    rollout.main(given)
    assert [t.key for t in read_trajectories(run / "round_0" / "rollout" / "trajectories.jsonl")] == rows


def test_demonstrations_in_the_place_of_round_0_s_rollout_are_what_it_trains_on(tmp_path, model):
    """Their games are in no panel and in no folder, so that nobody could play them again."""
    run = tmp_path / "run"
    demonstrations.main(demonstrations.Args(out=run / "round_0" / "rollout", count=3))
    actre.main(actre.Args(run=run, model=model))
    assert read_json(run / "round_0" / "actre" / "done.json")["composed"] == 0
    examples, _ = train_pg.collect(train_pg.Args(run=run, model=model), 0)
    assert examples and {example.trajectory.source for example in examples} == {"demo"}


def test_a_file_with_a_task_twice_is_refused_by_every_reader(tmp_path, model):
    run = tmp_path / "run"
    rollout.main(rollout.Args(run=run, model=model, **SMALL))
    path = run / "round_0" / "rollout" / "trajectories.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    for stage in (actre, train_pg):
        with pytest.raises(ValueError, match="a second row of"):
            stage.main(stage.Args(run=run, model=model))


def test_two_prompts_of_one_name_are_told_apart(tmp_path, model):
    """By their content, and by whom they are for."""
    run, folders = tmp_path / "run", [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        (folder / "prompt.txt").write_text(f"an example of {folder.name}")
    first, second = (folder / "prompt.txt" for folder in folders)
    rollout.main(rollout.Args(run=run, model=model, prompt=first, **SMALL))
    with pytest.raises(StageError, match=r"facts\.prompt: there"):
        rollout.main(rollout.Args(run=run, model=model, prompt=second, **SMALL))
    actre.main(actre.Args(run=run, prompt=first, actre_prompt=second))
    with pytest.raises(StageError, match=r"facts\.actre_prompt: there .*facts\.prompt: there"):
        actre.main(actre.Args(run=run, prompt=second, actre_prompt=first))


def test_a_prompt_that_cannot_be_read_or_does_not_fit_is_refused(tmp_path, model):
    prompt = tmp_path / "prompt.txt"
    args = rollout.Args(run=tmp_path / "run", model=model, prompt=prompt, context=4000)
    with pytest.raises(ValueError, match="--prompt .*prompt.txt cannot be read as text"):
        rollout.main(args)
    prompt.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="--prompt .*prompt.txt cannot be read as text"):
        rollout.main(args)
    prompt.write_text("x" * 200)
    with pytest.raises(
        ValueError, match=r"20\d tokens of --prompt need more than the 4096 positions .* at most 38\d\d"
    ):
        make_policy(args, Player(args.server, None, prompt), tmp_path / "replies.sqlite")
    assert not (tmp_path / "run").exists()
