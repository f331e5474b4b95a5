"""WebShop: recordings of the original, step by step; its quirks; goals that stay; data that is wrong."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.webshop import catalogue as webshop_catalogue
from envs.webshop import reward as webshop_reward
from envs.webshop.catalogue import open_catalogue, prepare
from envs.webshop.generate import ensure_catalogue, generate_listing
from envs.webshop.goals import MOST, Goal, Product, combinations, price_limit
from envs.webshop.reward import heuristic_nouns, normal_colour, score_purchase, similar
from envs.webshop.world import MODES, WebShop, parse
from tests.support.hand_shop import ATTRIBUTES, PRODUCTS, WRITTEN, options, product, write_shop

DATA = os.environ.get("WEBSHOP_DATA")
GOLDEN = "golden_{}.jsonl.gz"
needs_golden = pytest.mark.skipif(
    not DATA or not all((Path(DATA) / GOLDEN.format(mode)).is_file() for mode in MODES),
    reason="no recordings of the original in $WEBSHOP_DATA",
)
CHAIR_TASK = "human/B000000003-06e52937"


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> str:
    return str(ensure_catalogue(tmp_path_factory.mktemp("generated") / "shop"))


def play(world: WebShop, *actions: str, task_id: str = CHAIR_TASK):
    """The result of the last action."""
    world.reset(task_id)
    return [world.step(action) for action in actions][-1]


# ---- the original ----------------------------------------------------------------------------------------------------


def episodes(mode: str) -> list[dict]:
    with gzip.open(Path(DATA) / GOLDEN.format(mode), "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.data
@needs_golden
@pytest.mark.parametrize("mode", MODES)
def test_every_recorded_step_is_the_originals(mode):
    world = WebShop(DATA, mode=mode, nouns="whitespace", prices=str(Path(DATA) / "prices.json"))
    purchases = 0
    for episode in episodes(mode):
        opening = world.start(msgspec.convert(episode["goal"], Goal))
        assert (opening.text, world.available()) == (episode["first_observation"], episode["first_available"])
        for step in episode["steps"]:
            result = world.step(step["action"])
            assert result.observation == step["observation"] and result.done == step["done"]
            assert result.reward == pytest.approx(step["reward"], abs=1e-9)
            assert result.done or world.available() == step["available"]
            purchases += result.done
    assert purchases > 200


@pytest.mark.data
@needs_golden
def test_goals_and_their_numbers_are_the_originals():
    """All but the drawn price limit, in the original's shuffled order."""
    shop = WebShop(DATA)
    goals = [
        shop._shop.goal(task_id) for split in shop._shop.splits if split != "human" for task_id in shop.tasks(split)
    ]
    by_number = {goal.number: goal for goal in goals}
    for episode in (*episodes("text"), *episodes("text_rich")):
        goal, recorded = by_number[episode["goal_index"]], episode["goal"]
        for field in ("asin", "attributes", "goal_options", "category", "query", "name", "product_category"):
            assert getattr(goal, field) == recorded[field]
        assert goal.instruction_text.split(", and price")[0] == recorded["instruction_text"].split(", and price")[0]


@pytest.mark.data
@needs_golden
def test_the_product_that_a_goal_was_made_from_is_what_is_wanted_but_for_colours_within_words():
    """Bought "sunflowers" count as "sunflower", which ("color", "sunflowers") is not: its own product does not do."""
    world, short = WebShop(DATA), 0
    for task_id in world.tasks("small_valid"):
        goal = world._shop.goal(task_id)
        bought = world._shop.product(world._shop.find(goal.asin))
        score = score_purchase(bought, goal, bought.price, goal.goal_options, by_heuristic)
        assert (score.r_type, score.attributes, score.price) == (1.0, len(goal.attributes), True), task_id
        short += score.options < len(goal.goal_options)
    assert 0 < short < 0.1 * len(world.tasks("small_valid"))


# ---- pages and actions -----------------------------------------------------------------------------------------------


def test_a_purchase_tells_its_components_and_ends_the_task(tmp_path):
    world = WebShop(**write_shop(tmp_path))
    result = play(world, "search[red chair]", "click[b000000003]", "click[red]", "click[buy now]")
    assert (result.reward, result.progress, result.success, result.done) == (1.0, 1.0, True, True)
    score = world.purchase
    assert (score.r_type, score.attributes, score.options, score.price) == (1.0, 1, 1, True)
    assert "Your score (min 0.0, max 1.0) [SEP] 1.0" in result.observation and world.actions() == []
    result = play(world, "search[red chair]", "click[b000000003]", "click[buy now]")
    assert (result.reward, result.success, result.done) == (2 / 3, False, True)


def test_progress_is_the_best_that_buying_would_have_brought(tmp_path):
    world = WebShop(**write_shop(tmp_path))
    world.reset(CHAIR_TASK)
    steps = [
        "search[chair]",
        "click[b000000003]",
        "click[red]",
        "click[navy | white]",
        "click[< prev]",
        "search[tea]",
        "click[b000000004]",
        "click[buy now]",
    ]
    results = [world.step(step) for step in steps]
    assert [round(result.progress, 3) for result in results] == [0, 0.667, 1, 1, 1, 1, 1, 1]
    assert results[-1].reward == 0 and not results[-1].success  # not one noun in common


def test_a_click_on_the_search_button_or_beside_the_page_changes_nothing(tmp_path):
    world = WebShop(**write_shop(tmp_path))
    world.reset(CHAIR_TASK)
    assert world.actions() == ["search["] and world.available()["clickables"] == ["search"]
    for action in (
        "click[search]",
        "click[buy now]",
        "search[]",
        "search[",
        "click[]",
        "Search[chair]",
        " search[chair]",
        "buy now",
        "search[<r>]",
        "search[<a> red]",
        "search[<q> chairs]",
        "search[<c> garden]",
        "search[" + " ".join(f"w{i}" for i in range(1100)) + "]",
    ):
        result = world.step(action)
        assert not result.valid and result.observation.endswith("[SEP] Search"), action
    assert world.step("think[anything at all] then").valid and world.actions() == ["search["]
    assert world.step("search[chair] and more").valid and "click[b000000003]" in world.actions()


@given(st.text("a[]\n\u2028"))
def test_an_action_is_read_as_the_originals_pattern_reads_it(action):
    match = re.match(r"(.+)\[(.+)\]", action)
    assert parse(action) == (match and (match[1], match[2]))


@pytest.mark.parametrize("filler", ["[", "]", "[]", "][", "a[", "\U0001f1e9", "\U0001f1e9\u200d"])
def test_a_quarter_of_a_million_brackets_or_flags_are_an_action_in_linear_time(tmp_path, filler):
    """Quadratic time would be minutes or hours."""
    world = WebShop(**write_shop(tmp_path))
    world.reset(CHAIR_TASK)
    for action in (filler * 2**18, f"search[{filler * 2**18}", f"search[{filler * 2**18}]"):
        assert world.step(action).observation and not world._done


def test_search_works_on_every_page_and_clears_the_options(tmp_path):
    world = WebShop(**write_shop(tmp_path), mode="text_rich")
    play(world, "search[chair]", "click[b000000003]", "click[red]", "click[features]")
    assert "click[buy now]" not in world.actions()
    assert "[clicked button] red" in world.step("click[< prev]").observation  # kept over the features page
    found = world.step("search[chair]").observation
    assert "\n[clicked button] B000000003 [clicked button_]\n" in found  # seen before
    assert "[clicked button] red" not in world.step("click[b000000003]").observation


def test_pages_go_on_for_ever(tmp_path):
    records = [product(f"C{number:09d}", "Chair") for number in range(60)]
    world = WebShop(**write_shop(tmp_path, records, {"C000000000": ATTRIBUTES["B000000002"]}, {}))
    world.reset(
        next(iter(world.tasks("small_test" if "small_test" in world._shop.splits else [*world._shop.splits][0])))
    )
    texts = [world.step("search[chair]").observation, *(world.step("click[next >]").observation for _ in range(6))]
    assert all("(Total results: 50)" in text for text in texts) and "< Prev" not in texts[0]
    assert [text.count("Chair") for text in texts] == [10, 10, 10, 10, 10, 0, 0]
    assert "Page 6 " in world.step("click[< prev]").observation


def test_both_modes_are_one_world(generated):
    """Random walks with broken actions among them: nothing raises, and the modes differ in their words alone."""
    worlds = [WebShop(generated, mode=mode) for mode in MODES]
    rng = random.Random(5)
    pieces = [
        "search",
        "click",
        "think",
        "[",
        "]",
        "buy now",
        "< prev",
        "\n",
        "\ud800",
        "<r>",
        "\x00",
        "red",
        " ",
        "][",
    ]
    bought = 0
    for task_id in rng.sample(worlds[0].tasks("gen_demo"), 40):
        words = worlds[0].reset(task_id).task.split()
        worlds[1].reset(task_id)
        for _ in range(40):
            kind = rng.random()
            if kind < 0.7:
                action = rng.choice(worlds[0].actions())
                action += " ".join(rng.sample(words, 3)) + "]" if action.endswith("[") else ""
            elif kind < 0.8:
                action = f"search[{rng.choice(words)}]"
            else:
                action = "".join(rng.choices(pieces, k=rng.randrange(8)))
            before, state = worlds[0].available(), pickle.dumps(worlds[0])
            one, other = (world.step(action) for world in worlds)
            assert worlds[0].available() == worlds[1].available()
            assert (one.reward, one.progress, one.done, one.valid) == (
                other.reward,
                other.progress,
                other.done,
                other.valid,
            )
            assert one.valid or (worlds[0].available() == before and pickle.dumps(worlds[0]) == state)
            bought += one.done
            if one.done:
                break
    assert bought > 5


@pytest.mark.parametrize(
    "value", ['20" x 20"', "Größe [A", "caf\u00e9", "a]b", "Features", "Buy Now", "x\ny", "<b>&'", "next >"]
)
def test_options_with_odd_characters(tmp_path, value):
    records = [product("B000000003", "Red Oak Chair", customization_options=options(Size=[value, "small"]))]
    world = WebShop(**write_shop(tmp_path, records), mode="text_rich")
    play(world, "search[chair]", "click[b000000003]")
    shown = value.lower()
    assert f"  [button] {shown} [button_]\n" in world._render() and shown in world.available()["clickables"]
    said = parse(f"click[{shown}]") == ("click", shown)
    assert (f"click[{shown}]" in world.actions()) == said
    result = world.step(f"click[{shown}]")
    assert result.valid == said
    clicked = said and shown.isascii() and not set(shown) & set('"\n') and shown not in ("features", "buy now")
    assert (f"[clicked button] {shown} [" in result.observation) == clicked
    assert result.done == (shown == "buy now")


def test_one_value_under_two_names_is_the_last_ones(tmp_path):
    records = [
        product("B000000003", "Red Oak Chair", customization_options=options(Color=["red"], Trim=["red", "blue"]))
    ]
    world = WebShop(**write_shop(tmp_path, records), mode="text_rich")
    text = play(world, "search[chair]", "click[b000000003]", "click[red]").observation
    assert text.count("[clicked button] red") == 2 and world._options == {"trim": "red"}


def test_a_link_to_a_product_that_is_not_there_is_not_valid(tmp_path):
    """The original raises the letters of the link, so an asin in small letters is lost."""
    world = WebShop(**write_shop(tmp_path, [*PRODUCTS, product("b00000000a", "Lost Chair")]))
    play(world, "search[lost chair]")
    before = pickle.dumps(world)
    assert not world.step("click[b00000000a]").valid and pickle.dumps(world) == before


def test_a_copy_is_small_whatever_the_catalogue(generated):
    world = WebShop(generated)
    play(world, "search[women's dresses]", task_id=world.tasks("gen_valid")[0])
    assert len(pickle.dumps(world)) < 4000


# ---- reward ----------------------------------------------------------------------------------------------------------


def made(**changes) -> Product:
    fields = {
        "asin": "B1",
        "name": "Red Oak Chair",
        "description": "Soft",
        "bullets": ["Easy Clean"],
        "price_tag": "$5",
        "price": 5.0,
        "options": {},
        "attributes": ["solid wood"],
        "category": "garden",
        "query": "chairs",
        "product_category": "Home › Chairs › Oak",
    }
    return Product(**(fields | changes))


def wanted(**changes) -> Goal:
    fields = {
        "asin": "B2",
        "instruction_text": "",
        "attributes": ["solid wood"],
        "price_upper": 10.0,
        "goal_options": [],
        "category": "garden",
        "query": "chairs",
        "name": "Red Oak Chair",
        "product_category": "Home › Chairs › Oak",
    }
    return Goal(**(fields | changes))


def by_heuristic(asin: str, name: str) -> tuple[str, ...]:
    return heuristic_nouns(name)


@pytest.mark.parametrize(
    ("bought", "goal", "r_type"),
    [
        ({}, {}, 1.0),
        ({"query": "x", "product_category": "x"}, {}, 1.0),  # the name alone
        ({"query": "x", "product_category": "x", "name": "oak"}, {"name": "oak b c d e".replace(" ", "a ")}, 0.0),
        ({"query": "x", "product_category": "x", "name": "oak"}, {"name": "oak bb cc dd ee ff"}, 0.5),
        ({"name": "oak"}, {"name": "oak " + " ".join(f"w{c}" for c in "abcdefghijk")}, 0.1),  # though all else matches
        ({"name": "tea"}, {"name": "oak chair"}, 0.0),
        ({"query": "x", "product_category": "Home › x", "name": "tea"}, {"name": "of the"}, 0.5),  # no noun: 0.2
        ({"query": "x", "product_category": "Oak › Home", "name": "oak"}, {"name": "oak bb cc dd ee ff"}, 1.0),
    ],
)
def test_type(bought, goal, r_type):
    assert score_purchase(made(**bought), wanted(**goal), 5.0, {}, by_heuristic).r_type == r_type


@pytest.mark.parametrize(
    ("attribute", "found"),
    [
        ("solid wood", 1),
        ("wood solid", 1),
        ("easy clean", 1),
        ("soft", 1),
        ("oak", 1),
        ("Soft", 0),
        ("velvet", 0),
    ],
)
def test_attributes_are_found_in_the_list_or_verbatim_in_the_text(attribute, found):
    assert score_purchase(made(), wanted(attributes=[attribute]), 5.0, {}, by_heuristic).attributes == found


def test_options_are_compared_by_colour_and_by_words():
    values = ["dark red", "tailored", "xl", ("color", "red"), ("color", "dark red")]
    assert list(map(normal_colour, values)) == ["dark", "red", "xl", "red", ("color", "dark red")]
    assert similar("pack of 2", "2 pack") and not similar("red", "blue")
    assert similar("10 inch", "12 inch") and not similar("small", "medium")  # the original's: one word of two will do
    for goal_options, chosen, matched in (
        (["red"], {"color": "bright red"}, 1),
        ({"color": "red"}, {"color": "bright red"}, 1),
        ({"color": "sunflowers"}, {"color": "sunflowers"}, 0),
        ({"size": "7 wide"}, {"size": "7 wide"}, 1),
        (["red"], {}, 0),
    ):
        score = score_purchase(made(), wanted(goal_options=goal_options), 5.0, chosen, by_heuristic)
        assert score.options == matched, (goal_options, chosen)
        assert score.reward == pytest.approx((1 + matched + 1) / 3)


def test_the_price_may_equal_the_limit():
    assert [score_purchase(made(), wanted(), price, {}, by_heuristic).price for price in (10.0, 10.01)] == [True, False]


def test_noun_backends_are_named_in_the_facts(tmp_path, monkeypatch):
    data = write_shop(tmp_path)
    assert WebShop(**data).facts["nouns"] == WebShop(**data, nouns="heuristic").facts["nouns"] == "heuristic"
    assert heuristic_nouns("The 2-Pack of Red-Oak Chairs, XL") == ("pack", "red", "oak", "chairs", "xl")
    webshop_reward.nouns_named.cache_clear()
    file = tmp_path / "nouns.json"
    file.write_text(json.dumps({record["asin"]: ["chair"] for record in PRODUCTS}))
    world = WebShop(**data)
    assert world.facts["nouns"].startswith("file:")
    assert play(world, "search[tea]", "click[b000000004]", "click[buy now]").reward == 1 / 3  # only the price fits


def test_an_installed_spacy_model_comes_first(tmp_path):
    """In a process of its own, which must not keep the model: one that takes words in capitals for nouns."""
    if importlib.util.find_spec("spacy") is None:
        pytest.skip("spaCy is not installed")
    package = tmp_path / "site" / "en_core_web_sm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("""
class Token:
    def __init__(self, text):
        self.text, self.pos_ = text, "PROPN" if text.isupper() else "ADJ"

class Model:
    meta = {"version": "3.8.0"}
    def __call__(self, text):
        return [Token(word) for word in text.split()]

def load(**settings):
    assert settings["disable"] == ["parser", "ner"]
    return Model()
""")
    about = tmp_path / "site" / "en_core_web_sm-3.8.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: en_core_web_sm\nVersion: 3.8.0\n")
    data = write_shop(tmp_path / "data")
    (tmp_path / "data" / "nouns.json").write_text("not read")
    code = f"""
from envs.webshop.world import WebShop
world = WebShop({data["data"]!r})
print(world.facts["nouns"], world._nouns_backend()[1]("", "red OAK Chair"))"""
    paths = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert run.stdout == "spacy:en_core_web_sm-3.8.0 ('oak',)\n", run.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "nouns.json is not valid JSON"),
        ('{"B000000001": "x"}', "nouns.json: Expected `array`, got `str`"),
        ('{"B000000001": []}', "has no nouns for B000000002"),
    ],
)
def test_bad_noun_files_are_refused(tmp_path, content, message):
    (tmp_path / "nouns.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        WebShop(**write_shop(tmp_path), nouns="file")


def test_unknown_choices_name_the_known_ones(tmp_path):
    data = write_shop(tmp_path)
    with pytest.raises(ValueError, match="unknown mode 'html': expected one of .*text_rich"):
        WebShop(**data, mode="html")
    with pytest.raises(ValueError, match="unknown nouns 'x': expected auto, spacy"):
        WebShop(**data, nouns="x")
    with pytest.raises(ValueError, match="no .*nouns.json"):
        WebShop(**data, nouns="file")


# ---- goals and splits ------------------------------------------------------------------------------------------------


def test_goals_are_the_same_whatever_the_global_generator_did(tmp_path):
    facts = []
    for seed in (1, 2):
        random.seed(seed)
        facts.append(WebShop(**write_shop(tmp_path / str(seed))).facts)
    assert facts[0] == facts[1] and facts[0]["goals"] == 4


def test_price_limits_are_the_larger_of_two_of_the_next_four_tens():
    limits = {price_limit(f"A{number}", 0, 19.99)[0] for number in range(200)}
    assert limits == {30.0, 40.0, 50.0}
    assert price_limit("A", 0, 20.0)[1].endswith(" dollars") and price_limit("A", 0, 985.0) == (1_000_000.0, "")


def test_goals_combine_options_in_the_originals_order():
    choices = {"size": ["s", "m", "l"], "color": ["red", "blue"], "style": ["x", "y"]}
    values = itertools.product(choices["color"], choices["size"], choices["style"])
    assert [tuple(options.values()) for options in combinations(choices, "A1")] == list(values)
    assert list(combinations({}, "A1")) == [{}] and list(combinations({"color": [], "size": ["s"]}, "A1")) == []


def test_of_millions_of_combinations_of_options_a_thousand_are_drawn_and_no_more_are_built():
    for names in (5, 60):  # 3.2 million, and more than could be counted
        choices = {f"option {name:02d}": [f"value {value}" for value in range(20)] for name in range(names)}
        drawn = list(combinations(choices, "A1"))
        assert drawn == list(combinations(choices, "A1")) != list(combinations(choices, "A2"))
        assert len(drawn) == len({tuple(options.values()) for options in drawn}) == MOST == 1000
        assert all(list(options) == list(choices) for options in drawn)
        assert all({options[name] for options in drawn} == set(choices[name]) for name in choices)  # spread


def test_a_product_with_millions_of_combinations_is_a_product_like_any_other(tmp_path):
    wide = options(**{f"Option{name}": [f"value {value}" for value in range(20)] for name in range(5)})
    records = [product("B000000003", "Red Oak Chair", customization_options=wide), PRODUCTS[2]]
    world = WebShop(**write_shop(tmp_path, records, written={}))
    assert world.facts["goals"] == MOST + 1  # and the bench's
    [split] = [split for split, ids in world._shop.splits.items() if len(ids) >= MOST]
    task_id = world.tasks(split)[500]
    wanted = world._shop.goal(task_id).goal_options
    clicks = [f"click[{value}]" for value in wanted.values()]
    result = play(world, "search[chair]", "click[b000000003]", *clicks, "click[buy now]", task_id=task_id)
    assert result.done and result.reward > 0


def test_goals_of_the_same_name_are_told_apart_by_what_they_and_the_products_say(tmp_path):
    def fingerprint(name: str, **changes) -> str:
        world = WebShop(**write_shop(tmp_path / name, **changes))
        ids = [task_id for split in world._shop.splits for task_id in world.tasks(split)]
        assert world.fingerprint(reversed(ids)) == world.fingerprint(ids)
        return world.fingerprint([CHAIR_TASK])

    first = fingerprint("first")
    assert fingerprint("same") == first
    others = [
        {"products": [PRODUCTS[0], product("B000000001", "Blue Oak Chair", pricing="$15.01$25.00"), *PRODUCTS[2:]]},
        {"products": [*PRODUCTS[:3], PRODUCTS[3] | {"customization_options": options(Size=["one"])}]},
        {"attributes": ATTRIBUTES | {"B000000004": {"attributes": ["organic"]}}},
        {"products": [PRODUCTS[0] | {"query": "seats"}, *PRODUCTS[1:]]},
    ]
    found = {fingerprint(str(number), **other) for number, other in enumerate(others)}
    assert len(found) == len(others) and first not in found


def test_no_product_is_wanted_in_two_splits(generated):
    catalogue = open_catalogue(prepare(generated))
    products = {
        split: {task_id.split("/")[1].split("-")[0] for task_id in ids} for split, ids in catalogue.splits.items()
    }
    products.pop("human")
    assert set(products) == {"gen_train", "gen_demo", "gen_valid", "gen_test"}
    assert sum(map(len, products.values())) == len(set.union(*products.values()))
    assert len(catalogue) == 1000 and 5000 < sum(len(ids) for ids in catalogue.splits.values()) < 12000


def test_12087_written_instructions_are_the_official_splits(tmp_path):
    one = WRITTEN["B000000003"][0]
    written = {
        record["asin"]: [one | {"instruction": f"chair {number}."} for number in range(count)]
        for record, count in zip(PRODUCTS, (5000, 5000, 2087, 0), strict=True)
    }
    world = WebShop(**write_shop(tmp_path, written=written))
    assert {split: len(ids) for split, ids in world._shop.splits.items()} == {"eval": 1000, "test": 500, "train": 10587}
    order = [(record["asin"], number) for record in PRODUCTS for number in range(len(written[record["asin"]]))]
    random.Random(233).shuffle(order)
    for place in (0, 499, 500, 1499, 1500, 12086):
        split = "test" if place < 500 else "eval" if place < 1500 else "train"
        goal = world._shop.goal(f"{split}/{place:05d}")
        assert (goal.asin, goal.instruction_text.split(",")[0]) == (order[place][0], f"chair {order[place][1]}")
    written["B0LOSTLOST"] = [written["B000000002"].pop()]  # 12,087 still, but one product is not in the data
    short = WebShop(**write_shop(tmp_path / "short", written=written))
    with pytest.raises(ValueError, match="no split 'test'.*expected one of human"):
        short.tasks("test")


# ---- the files -------------------------------------------------------------------------------------------------------


def test_a_price_of_none_is_a_hundred_dollars_and_a_range_may_come_the_wrong_way_round(tmp_path):
    records = [
        product("A1", "Chair", pricing=None),
        product("A2", "Chair", pricing=""),
        product("A3", "Chair", pricing="$1,000.50$20"),
        product("A4", "Chair", pricing="$3$4$5"),
    ]
    catalogue = open_catalogue(prepare(write_shop(tmp_path, records)["data"]))
    made = [catalogue.product(number) for number in range(4)]
    assert [one.price_tag for one in made] == ["$100.0", "$100.0", "$1000.5 to $20.0", "$3.0 to $4.0"]
    assert made[0].price == 100 and 20 <= made[2].price <= 1000.5 and 3 <= made[3].price <= 4


def test_odd_records_are_skipped_or_filled_as_in_the_original(tmp_path):
    records = [
        product("nan", "Chair"),
        product("TOOLONGASIN", "Chair"),
        product("A1", "First"),
        product("A1", "Second"),
        product("A2", "Chair", customization_options={"Size": None, "Color": []}),
    ]
    world = WebShop(**write_shop(tmp_path, records, {"A2": {}, "A9": {"attributes": []}}, {"A8": []}))
    assert world.facts["products"] == 2 and world._shop.product(0).name == "First" and world.facts["goals"] == 0
    assert world._shop.product(0).attributes == ["DUMMY_ATTR"] and world._shop.product(1).options == {"color": []}
    with pytest.raises(ValueError, match=r"no split 'human'.*\(none\)"):
        world.tasks("human")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"products": json.dumps(PRODUCTS)[:900]}, "items_shuffle_1000.json breaks off in record 1"),
        ({"products": "{}"}, "begins with '{}': expected a JSON list"),
        ({"products": ""}, "begins with ''"),
        ({"products": "[]"}, "holds no product"),
        ({"products": "[1]"}, r"record 0 \(not an object\)"),
        ({"products": [{"name": "Chair"}]}, r"record 0 \(no asin\): .*asin"),
        ({"products": [product("A1", None)]}, r"record 0 \(A1\): Expected `str`, got `null` - at `\$.name`"),
        ({"products": [PRODUCTS[0], product("A1", "Chair", pricing="free")]}, r"record 1 \(A1\): pricing is 'free'"),
        ({"products": [product("A1", "Chair", pricing="$1.2.3")]}, "pricing is"),
        ({"products": [product("A1", "Chair", pricing=f"${'9' * 400}")]}, r"record 0 \(A1\): pricing is '.9+'"),
        ({"products": [product("A1", "Chair", pricing=float("nan"))]}, r"record 0 \(A1\): .*got `float`.*pricing"),
        (
            {"products": [PRODUCTS[0], product("caf\u00e9", "Chair")]},
            r"items_shuffle_1000.json, record 1 \(caf\u00e9\): the asin is 'caf\u00e9': expected printable ASCII",
        ),
        ({"products": [product("A\n1", "Chair")]}, r"the asin is 'A\\n1': expected printable ASCII"),
        ({"products": [product("A1", "\ud800")]}, "items_shuffle_1000.json, A1: .*surrogates not allowed.*UTF-8"),
        ({"products": f"[{json.dumps(PRODUCTS[0])}, {'[' * 10_000}"}, "json: record 1 is nested too deeply"),
        ({"products": '[{"asin": 1' + "0" * 5000}, "breaks off in record 0"),
        ({"attributes": "[" * 10_000}, "items_ins_v2_1000.json is not|items_ins_v2_1000.json: Expected"),
        ({"attributes": '{"A1": {"attributes": [NaN]}}'}, "items_ins_v2_1000.json is not valid JSON"),
        ({"products": [product("A1", "Chair", customization_options={"Size": [{"x": 1}]})]}, r"record 0 \(A1\).*value"),
        ({"attributes": "[]"}, "items_ins_v2_1000.json: Expected `object`, got `array`"),
        ({"attributes": json.dumps(ATTRIBUTES)[:50]}, "items_ins_v2_1000.json is not valid JSON .*restore it"),
        (
            {"attributes": {"B000000003": {"attributes": [], "instruction": "x"}}},
            "B000000003 has an instruction without",
        ),
        (
            {"written": {"B000000003": [{"instruction": "x"}]}},
            "items_human_ins.json: Object missing required field `instruction_attributes`",
        ),
    ],
)
def test_bad_files_are_named_and_leave_nothing_behind(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        WebShop(**write_shop(tmp_path, **files))
    assert not list(tmp_path.glob(".*"))
    assert WebShop(**write_shop(tmp_path)).facts["products"] == 4


def test_a_product_file_in_another_encoding_is_named(tmp_path):
    data = write_shop(tmp_path)
    text = json.dumps([product("A1", "caf\u00e9"), *PRODUCTS], ensure_ascii=False)
    (tmp_path / "items_shuffle_1000.json").write_bytes(text.encode("latin-1", "replace"))
    with pytest.raises(ValueError, match="items_shuffle_1000.json is not UTF-8 .*download the file again"):
        WebShop(**data)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither items_shuffle.json nor items_shuffle_1000.json"):
        WebShop(str(tmp_path))
    data = write_shop(tmp_path)
    (tmp_path / "items_human_ins.json").unlink()
    assert "human" not in WebShop(**data)._shop.splits
    assert WebShop(str(tmp_path / "items_shuffle_1000.json")).facts["products"] == 4
    (tmp_path / "items_ins_v2_1000.json").unlink()
    with pytest.raises(FileNotFoundError, match="no .*items_ins_v2_1000.json"):
        WebShop(**data)


def test_a_long_file_is_read_a_chunk_at_a_time(tmp_path, monkeypatch):
    """Chunks end within strings, numbers and escapes."""
    file = tmp_path / "items.json"
    items = [{"a": '\u00e9\\"\n], [', "b": [1.5e3, -2, None]}, {"x": "}" * 40}, {}, {"end": [{}]}]
    file.write_text(json.dumps(items, indent=1))
    for chunk in range(1, 60):
        monkeypatch.setattr(webshop_catalogue, "CHUNK", chunk)
        assert list(webshop_catalogue.stream_array(file)) == items


def test_prepared_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    data = write_shop(tmp_path)["data"]
    folder = prepare(data)
    assert folder.parent == tmp_path
    monkeypatch.setattr(webshop_catalogue, "_write", None)
    assert prepare(data) == folder  # nothing is written
    monkeypatch.undo()
    write_shop(tmp_path, [*PRODUCTS, product("A1", "Chair")])
    changed = prepare(data)
    assert changed != folder and open_catalogue(changed).facts["products"] == 5
    file = tmp_path / "items_shuffle_1000.json"
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system has steps
        file.write_text(file.read_text().replace("Blue Oak", "Pale Oak"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as an archive does when it is unpacked
    assert file.stat().st_size == before.st_size and prepare(data) != changed


def test_a_killed_preparation_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    data = write_shop(tmp_path)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(webshop_catalogue, "name_goals", killed)
        with pytest.raises(KeyboardInterrupt):
            WebShop(**data)
    (tmp_path / ".building-x").mkdir()  # what a power cut leaves
    assert WebShop(**data).facts["goals"] == 4


def test_a_folder_that_is_marked_read_only_is_prepared_elsewhere(tmp_path):
    data = write_shop(tmp_path / "data")["data"]
    os.chmod(data, 0o555)
    folder = prepare(data)
    os.chmod(data, 0o755)
    assert folder.parent == tmp_path / "home" / ".cache" / "a3t" and prepare(data) == folder


def test_processes_that_prepare_at_once_agree(tmp_path):
    data = write_shop(tmp_path, [product(f"C{number:09d}", "Chair") for number in range(300)])["data"]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(prepare, [data] * 3))) == 1
    assert [path.name[:13] for path in tmp_path.glob(".*")] == [".a3t_webshop-"]


# ---- the generator ---------------------------------------------------------------------------------------------------


def test_a_product_is_a_function_of_seed_and_number():
    assert generate_listing(1, 7) == generate_listing(1, 7) != generate_listing(2, 7)
    assert len({generate_listing(1, number).record["asin"] for number in range(500)}) == 500


def test_a_folder_made_otherwise_is_refused(tmp_path):
    folder = ensure_catalogue(tmp_path / "shop", products=5)
    assert ensure_catalogue(folder, products=5) == folder
    with pytest.raises(ValueError, match="holds .*'products': 5.* expected .*'products': 6"):
        ensure_catalogue(folder, products=6)
    with pytest.raises(ValueError, match="no record of how it was made"):
        ensure_catalogue(tmp_path)


def test_generated_goals_can_be_met(generated):
    world = WebShop(generated)
    for task_id in [*world.tasks("gen_test")[::100], *world.tasks("human")[::10]]:
        goal = world._shop.goal(task_id)
        values = goal.goal_options.values() if isinstance(goal.goal_options, dict) else goal.goal_options
        world.start(goal)
        world._product, world._page = world._shop.find(goal.asin), "item"  # a search may not show it at once
        for value in values:
            assert world.step(f"click[{value}]").valid
        assert world.step("click[buy now]").success, task_id
