"""The scripted customer: it buys what is wanted, reads only what is shown, and goes on wherever it is put."""

from __future__ import annotations

import random

import pytest

from envs.webshop.demonstrator import Demonstrator, play, read_nodes, split_options
from envs.webshop.generate import ensure_catalogue
from envs.webshop.world import MODES, WebShop
from tests.support.hand_shop import write_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> str:
    return str(ensure_catalogue(tmp_path_factory.mktemp("generated") / "shop"))


def test_it_buys_what_is_wanted_and_a_careless_one_does_not(shop):
    world = WebShop(shop)
    tasks = random.Random(0).sample(world.tasks("gen_demo"), 60)
    successes = [sum(play(world, task_id, 20, careless) == 1 for task_id in tasks) for careless in (False, True)]
    assert successes[0] >= 48 and successes[1] <= 12


def test_every_action_of_its_own_is_valid_and_the_mode_makes_no_difference(shop):
    worlds = [WebShop(shop, mode=mode) for mode in MODES]
    for task_id in (*worlds[0].tasks("gen_demo")[::150], *worlds[0].tasks("human")[::12]):
        openings = [world.reset(task_id).text for world in worlds]
        players = [Demonstrator(opening) for opening in openings]
        for _ in range(20):
            decided = [player.decide() for player in players]
            assert decided[0] == decided[1] and decided[0][0].endswith(".")
            results = [world.step(decided[0][1]) for world in worlds]
            assert results[0].valid, decided
            if results[0].done:
                break
            for player, result in zip(players, results, strict=True):
                player.observe(decided[0][1], result.observation)


@pytest.mark.parametrize("seed", range(4))
def test_displaced_it_goes_on_and_explains_every_action(shop, seed):
    world, rng = WebShop(shop, mode=MODES[seed % 2]), random.Random(seed)
    bought = 0
    for task_id in rng.sample(world.tasks("gen_demo"), 12):
        player = Demonstrator(world.reset(task_id).text)
        player.careless = rng.random() < 0.3
        for _ in range(60):
            actions = [action + "red chair]" if action.endswith("[") else action for action in world.actions()]
            thoughts = [player.explain(action) for action in (*actions, "click[nothing]", "search[<r>]", "", "look")]
            assert all(thought.endswith(".") and "\n" not in thought for thought in thoughts)
            action = player.decide()[1]
            if rng.random() < 0.4:
                action = rng.choice([*actions, "search[tea]", "search[<r>]", "search[zzz]", "click[x]", "", "think[x]"])
            result = world.step(action)
            bought += result.done
            if result.done:
                break
            player.observe(action, result.observation)
    assert bought == 12


def test_its_own_reason_is_its_thought(tmp_path):
    world = WebShop(**write_shop(tmp_path))
    player = Demonstrator(world.reset(world.tasks("small_test")[0]).text)
    thought, action = player.decide()
    assert player.explain(action) == thought


HEAD = "Instruction: [SEP] Find me lamps [SEP] Back to Search [SEP] "
LISTED = "WebShop [SEP] Instruction: [SEP] Find me lamps with color: red, and fit: big, and size: 8{} [SEP] Search"
RESULTS = HEAD + "Page 1 (Total results: 1) [SEP] B000000001 [SEP] Lamp [SEP] $1.00"
ITEM = HEAD + "< Prev [SEP] color [SEP] red [SEP] fit [SEP] big{} [SEP] Lamp [SEP] Price: $1.00 [SEP] Buy Now"


def shopping(item: str, price: str = "", careless: bool = False) -> list[tuple[str, str]]:
    """What a hasty player decides on that product's page until it buys."""
    player = Demonstrator(LISTED.format(price), hasty=True)
    player.careless = careless
    for page in (RESULTS, item):
        player.observe(player.decide()[1], page)
    decided = []
    while not decided or decided[-1][1] != "click[buy now]":
        decided.append(player.decide())
        player.observe(decided[-1][1], item)
    return decided


def test_options_are_chosen_in_the_instructions_order_and_lead_from_one_to_the_next():
    whole = ITEM.format(" [SEP] size [SEP] 8")
    decided = shopping(whole, ", and price lower than 9.00 dollars")
    assert decided == [
        ("I need color: red, here. I choose red.", "click[red]"),
        ("I have chosen red, and fit: big, here. I choose big.", "click[big]"),
        ("I have chosen big, and size: 8, here. I choose 8.", "click[8]"),
        ("I have chosen 8, and price comes last. I buy it.", "click[buy now]"),
    ]
    assert shopping(whole)[-1] == ("I have chosen 8, and nothing more. I buy it.", "click[buy now]")


def test_a_missing_option_is_left_in_haste_and_a_careless_one_chooses_nothing():
    last = shopping(ITEM.format(""))[-1]
    assert last == ("I have chosen big, and size: 8, missing. I leave 8, and nothing more. I buy it.", "click[buy now]")
    none = ITEM.format("").replace("red", "blue")
    assert shopping(none) == [
        ("I need color: red, missing. I leave red, and fit: big, here. I choose big.", "click[big]"),
        last,
    ]
    assert shopping(none, careless=True) == [("This will do. I buy it.", "click[buy now]")]
    plain = Demonstrator("WebShop [SEP] Instruction: [SEP] Find me lamps [SEP] Search", hasty=True)
    plain.careless = True
    for page in (RESULTS, none):
        plain.observe(plain.decide()[1], page)
    assert plain.decide() == ("There is nothing to choose. I buy it.", "click[buy now]")


def test_without_haste_a_missing_option_sends_it_back_and_one_passed_over_is_chosen_in_the_end():
    player = Demonstrator(LISTED.format(""))
    whole = ITEM.format(" [SEP] size [SEP] 8")
    for page in (RESULTS, ITEM.format("")):
        player.observe(player.decide()[1], page)
    assert player.decide() == ("I need size: 8, missing. I go back.", "click[< prev]")
    hasty = Demonstrator(LISTED.format(""), hasty=True)
    for action, page in (("search[lamps]", RESULTS), ("click[B000000001]", whole), ("click[big]", whole)):
        hasty.observe(action, page)
    assert hasty.decide() == ("I have chosen big, and size: 8, here. I choose 8.", "click[8]")
    hasty.observe("click[8]", whole)
    assert hasty.decide() == ("I have chosen 8, and color: red, here. I choose red.", "click[red]")


@pytest.mark.parametrize(
    ("wish", "head", "options"),
    [
        (
            'soft pillows with color: navy | white, and size: 2" x 2"',
            "soft pillows",
            {"color": "navy | white", "size": '2" x 2"'},
        ),
        ("lamps with bronze finish for living room", "lamps with bronze finish for living room", {}),
        ("lamps with usb port with style: with clip", "lamps with usb port", {"style": "with clip"}),
        ("snacks with flavor name: salt, and pepper: hot", "snacks", {"flavor name": "salt", "pepper": "hot"}),
        ("shirts with color: red, and fit: big, and size: 8", "shirts", {"color": "red", "fit": "big", "size": "8"}),
    ],
)
def test_options_are_split_from_the_wish_in_their_order(wish, head, options):
    found = split_options(wish)
    assert found == (head, options) and list(found[1]) == list(options)


def test_pages_read_the_same_in_both_modes(tmp_path):
    data = write_shop(tmp_path)
    worlds = [WebShop(**data, mode=mode) for mode in MODES]
    for world in worlds:
        world.reset(world.tasks("human")[0])
    for action in ("search[chair]", "click[b000000003]", "click[red]", "click[features]"):
        one, other = (read_nodes(world.step(action).observation) for world in worlds)
        assert one == other


def test_an_opening_without_an_instruction_is_refused():
    with pytest.raises(ValueError, match="no instruction in 'You are in a room"):
        Demonstrator("You are in a room")
