"""Perturbed wordings undo exactly what they do, and a perturbed game is the same game."""

from __future__ import annotations

import json
import os
import pickle
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.render import opening_text
from envs.alfworld.demonstrator import Demonstrator
from envs.alfworld.engine import COMMANDS
from envs.alfworld.generate import generate_games
from envs.alfworld.world import AlfWorld
from envs.make import make_world
from envs.wording import PERTURBATIONS, Perturbed, TellCommands, Wording, form, numbered
from tests.support.hand_game import write_game
from tests.support.hand_shop import write_shop

REWORDED = {  # original: under P1, P2, P3, P4, P5
    "clean mug 1 with sinkbasin 12": (
        "clean mug 1 using sinkbasin 12",
        None,
        None,
        "clean mug1 with sinkbasin12",
        "do(clean mug 1 with sinkbasin 12)",
    ),
    "go to fridge 1": (None, "move to fridge 1", None, "go to fridge1", "do(go to fridge 1)"),
    "take mug 1 from desk 2": (
        None,
        None,
        "from desk 2 take mug 1",
        "take mug1 from desk2",
        "do(take mug 1 from desk 2)",
    ),
    "move mug 1 to desk 2": (None, None, None, "move mug1 to desk2", "do(move mug 1 to desk 2)"),
    "look": (None, None, None, None, "do(look)"),
}


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """A folder of generated games, one of each kind at least, and the ids of their split."""
    folder = tmp_path_factory.mktemp("games")
    for task_id, game, traj in generate_games(5, "gen_valid", 24):
        place = folder / "json_2.1.1" / task_id
        place.mkdir(parents=True)
        (place / "game.tw-pddl").write_text(json.dumps(game))
        (place / "traj_data.json").write_text(json.dumps(traj))
    return str(folder)


@pytest.mark.parametrize("number", range(5))
def test_what_each_perturbation_says(number):
    wording = Wording(COMMANDS["0.4"], PERTURBATIONS[number])
    for original, all_five in REWORDED.items():
        perturbed = all_five[number] or original
        assert wording.perturbed(original) == perturbed
        assert wording.original(perturbed) == original
        assert perturbed == original or wording.original(original) == ""


def test_places_of_a_template_keep_their_names():
    assert Wording(["take {object} from {place}"], "P3").commands == ["from {place} take {object}"]
    assert Wording(["slice {object} with {object}"], "P1").commands == ["slice {object} using {object}"]


def test_a_command_that_two_templates_fit_takes_the_longer_one():
    """ "use {object}" fits "use key with door" too: taken so, the original wording would pass."""
    wording = Wording(["use {object}", "use {object} with {object}"], "P1")
    assert wording.perturbed("use key with door") == "use key using door"
    assert wording.original("use key using door") == "use key with door"
    assert wording.original("use key with door") == ""


FORMS = ["take {0} from {1}", "do(slice {0} with {1})", "from {1} take {0}", "search[{0}]", "a{0}{1} b {2}", "look"]


@given(
    st.sampled_from(FORMS),
    st.lists(st.sampled_from(["take ", " from ", "do(slice ", " with ", ")", "from ", "\n"] + [*"a ]b"])),
)
def test_a_form_matches_as_if_every_division_of_the_text_were_tried(template, pieces):
    parts = re.split(r"\{(\d)\}", template)
    slow = "".join(f"(?P<p{part}>.+?)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
    for text in ("".join(pieces), parts[0] + "".join(pieces), parts[0] + "".join(pieces) + parts[-1]):
        expected, found = re.fullmatch(slow, text), form(template).fullmatch(text)
        assert (found and found.groupdict()) == (expected and expected.groupdict())


def test_a_form_takes_linear_time_of_any_text():
    """Quadratic time would be hours."""
    for template in ("take {object} from {place}", "do(take {object} from {place})", "use {a} on {b} with {c}"):
        start, end = template.split("{")[0], "" if template.endswith("}") else ")"
        for filler in (" from ", " on ", "x", " ", ")"):
            assert not form(numbered(template)).fullmatch(start + filler * 2**18 + "\n" + end)


def test_quoted_commands_are_told_and_prose_is_not():
    def told(name: str, text: str) -> str:
        return Wording(COMMANDS["0.4"], name).told(text, lambda: ["go to fridge 1", "look", "take mug 1 from desk 1"])

    assert told("P2", "You can go to fridge 1 soon: go to fridge 1, look.") == (
        "You can go to fridge 1 soon: move to fridge 1, look."
    )
    assert told("P3", "Try 'take mug 1 from desk 1' or take mug 2 from desk 1.") == (
        "Try 'from desk 1 take mug 1' or take mug 2 from desk 1."
    )
    assert told("P5", "You can look, go to fridge 1.") == "You can do(look), do(go to fridge 1)."
    assert told("P5", "  open (receptacle):   open a receptacle\n") == "  do(open (receptacle)):   open a receptacle\n"
    assert told("P4", "a wall 2 steps away, a mug 12, and a desk 1.") == "a wall 2 steps away, a mug12, and a desk1."


def test_help_explains_the_perturbed_commands(tmp_path):
    write_game(tmp_path)
    for name, line in {
        "P1": "heat (object) using (receptacle):  heat an object using",
        "P2": "move to (receptacle): ",
        "P3": "from (receptacle) take (object):",
        "P5": "do(go to (receptacle)):   ",
    }.items():
        world = make_world("alfworld", data=str(tmp_path), perturb=name)
        world.reset(world.tasks("hand")[0])
        assert line in world.step("do(help)" if name == "P5" else "help").observation


def check_same_game(root: str, task_id: str, name: str, grammar: str = "0.4") -> None:
    """Plays one game twice, in both wordings: the same states, and all actions undone, at every step."""
    plain = AlfWorld(data=root, grammar=grammar)
    perturbed = make_world("alfworld", data=root, grammar=grammar, perturb=name)
    opening = plain.reset(task_id)
    reworded = perturbed.reset(task_id)
    assert reworded.task == opening.task and reworded.task in reworded.text
    wording = perturbed._wording
    player = Demonstrator(opening.text)
    rng = random.Random(task_id)
    for _ in range(20):
        both = dict(zip(plain.actions(), map(wording.perturbed, plain.actions()), strict=True))
        assert perturbed.actions() == sorted(both.values()) and len(set(both.values())) == len(both)
        for original, new in both.items():
            assert wording.original(new) == original
            if new != original:  # the wording of before is none now, and changes nothing
                before = pickle.dumps(perturbed._world._game)
                refused = perturbed.step(original)
                assert (refused.observation, refused.valid) == ("Nothing happens.", False)
                assert pickle.dumps(perturbed._world._game) == before
        own = player.decide()[1]
        action = rng.choice(sorted(both)) if rng.random() < 0.2 or grammar == "0.3" else own
        result, again = plain.step(action), perturbed.step(wording.perturbed(action))
        player.observe(action, result.observation)
        assert pickle.dumps(plain._game) == pickle.dumps(perturbed._world._game)
        assert again.observation == wording.told(result.observation, plain.actions)
        if name == "P4":  # its texts can be read back too
            assert re.sub(r"([a-z])(\d)", r"\1 \2", again.observation) == result.observation
        assert (again.valid, again.progress, again.done) == (result.valid, result.progress, result.done)
        if result.done:
            return


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbed_game_is_the_same_game(games, name):
    for task_id in AlfWorld(data=games).tasks("gen_valid"):
        check_same_game(games, task_id, name)
        check_same_game(games, task_id, name, grammar="0.3")


@pytest.mark.data
@pytest.mark.skipif("ALFWORLD_DATA" not in os.environ, reason="ALFWORLD_DATA is not set")
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbed_real_game_is_the_same_game(name):
    root = os.environ["ALFWORLD_DATA"]
    for task_id in AlfWorld(data=root).tasks("valid_seen")[::7]:
        check_same_game(root, task_id, name)


def test_commands_are_told_in_one_paragraph_after_the_opening(tmp_path):
    write_game(tmp_path)
    world = make_world("alfworld", data=str(tmp_path), perturb="P3", tell_commands=True)
    plain = AlfWorld(data=str(tmp_path))
    task_id = plain.tasks("hand")[0]
    opening, told = plain.reset(task_id), world.reset(task_id)
    assert told.text.startswith(f"{opening.text}\n\nYou can: go to {{receptacle}}, ")
    assert "from {receptacle} take {object}, " in told.text and told.text.endswith(", look, inventory, help.")
    assert told.task == opening.task and opening_text(told.text, told.task).count("You can: ") == 1
    assert world.facts == {**plain.facts, "perturbation": "P3", "commands": "told"}


def test_a_wording_that_changes_or_undoes_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shop = make_world("webshop", **write_shop(tmp_path))
    task_id = shop.tasks("small_test")[0]
    with pytest.raises(ValueError, match="cannot be undone.*search"):  # a call's bracket would close after the words'
        Perturbed(shop, "P5").require_change([task_id])
    with pytest.raises(ValueError, match="P1 changes no command of this world: search"):
        Perturbed(shop, "P1").require_change([task_id])
    with pytest.raises(ValueError, match="P9.*P1"):
        make_world("webshop", perturb="P9", **write_shop(tmp_path))
    assert "You can: search[{words}], click[{button}]." in TellCommands(shop).reset(task_id).text
