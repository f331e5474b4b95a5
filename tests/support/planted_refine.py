"""Hand-made scripts with turns for the verifier: three clean pairs of different domains, and faulty ones.

A fault is (name, which clean pair, what is changed in it, rule, turn); `planted()` applies them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


def player(number: int, thought: str, action: str) -> dict:
    return {"turn": number, "role": "Player", "Thought": thought, "Action": action}


def dm(number: int, observation: str, error: str = "") -> dict:
    flags = {f"{kind}_error": kind == error for kind in ("parameter", "place", "logic")}
    return {"turn": number, "role": "DM", "Thought": "The player goes on.", "Observation": observation} | flags


def action(code: str, **parameters: list) -> dict:
    return {"verification code": code, "parameters": parameters}


def shell() -> tuple[dict, list]:
    """A directory tree: the paper's own example of a world."""
    script = {
        "Environment": {"home": {"documents": {"config.cfg": {"content": "mode=off"}}, "notes.txt": {}}},
        "Goal": "Set mode=on in config.cfg.",
        "Completion Conditions": ["config.cfg contains mode=on"],
        "Available Actions": {
            "cd {path}": action(r"^\s*cd\s+(.*?)\s*$", path=["home", "documents", ".."]),
            "ls": action(r"^ls$"),
            "edit {file} line {number} to {text}": action(
                r"^edit (\S+) line (\d+|\{number\}) to (.+)$",
                file=["config.cfg", "notes.txt"],
                number=[1, 2],
                text=["mode=on", "mode=off"],
            ),
        },
    }
    turns = [
        dm(0, "You are in home. There is a folder called documents."),
        player(1, "I look into the folder.", "ls documents"),
        dm(2, "Error: ls takes no path.", "parameter"),
        player(3, "ls takes no path, so I go there first.", "cd documents"),
        dm(4, "You are in documents."),
        player(5, "Now I edit the second line.", "edit config.cfg line 2 to mode=on"),
        dm(6, "config.cfg has one line only.", "logic"),
        player(7, "It must be line 1.", "edit config.cfg line 1 to mode=on"),
        dm(8, "config.cfg now says mode=on. Task completed."),
    ]
    return script, turns


def kitchen() -> tuple[dict, list]:
    """Cooking: two parameters in one action, values of several words, an optional word."""
    script = {
        "Environment": {"kitchen": {"counter": ["red onion", "knife"], "stove": ["pot"]}, "player": {"hands": 1}},
        "Goal": "Put the chopped red onion in the pot.",
        "Completion Conditions": ["the onion is chopped", "the onion is in the pot"],
        "Available Actions": {
            "walk to {place}": action(r"walk (?:over )?to (?:the )?(.+)", place=["counter", "stove"]),
            "chop {food} with {tool}": action(r"^chop (.+) with (.+)$", food=["red onion"], tool=["knife"]),
            "put {food} in {vessel}": action(r"^put (?P<x>.+) in (?P<y>.+)$", food=["red onion"], vessel=["pot"]),
        },
    }
    turns = [
        dm(0, "You stand at the kitchen door. You see a counter and a stove."),
        player(1, "The onion will be on the counter.", "walk over to the counter"),
        dm(2, "You are at the counter: a red onion, a knife."),
        player(3, "I chop it.", "chop onion with knife"),
        dm(4, "There is no 'onion', only a red onion.", "parameter"),
        player(5, "It is called red onion.", "chop red onion with knife"),
        dm(6, "The red onion lies in pieces."),
        player(7, "Into the pot with it.", "put red onion in pot"),
        dm(8, "The pot is on the stove, you are at the counter.", "place"),
        player(9, "I have to be at the stove.", "walk to the stove"),
        dm(10, "You are at the stove: a pot."),
        player(11, "Now it is here.", "put red onion in pot"),
        dm(12, "The pieces fall into the pot. Task completed!"),
    ]
    return script, turns


def clinic() -> tuple[dict, list]:
    """A vet's practice: mistakes one after the other, an action without parameters, letters beyond ASCII."""
    script = {
        "Environment": {"waiting room": {"animals": ["Zoë", "Rex"]}, "store": {"drugs": {"dewormer": 3}}},
        "Goal": "Give Zoë one dewormer tablet.",
        "Completion Conditions": ["Zoë has had the dewormer"],
        "Available Actions": {
            "call {animal}": action(r"^call (.*)$", animal=["Zoë", "Rex"]),
            "unlock store": action(r"^unlock store$"),
            "give {animal} {drug}": action(r"^give (\S+) (\S+)$", animal=["Zoë", "Rex"], drug=["dewormer"]),
        },
    }
    turns = [
        dm(0, "Two animals wait. The store is locked."),
        player(1, "I start with the tablet.", "give Zoë dewormer"),
        dm(2, "Zoë is still in the waiting room.", "place"),
        player(3, "She must come in.", "summon Zoë"),
        dm(4, "You do not know how to do that.", "parameter"),
        player(5, "The command is call.", "call Zoë"),
        dm(6, "Zoë trots in."),
        player(7, "Now the tablet.", "give Zoë dewormer"),
        dm(8, "The tablets are in the locked store.", "logic"),
        player(9, "I unlock it.", "unlock store"),
        dm(10, "The store is open."),
        player(11, "And now.", "give Zoë dewormer"),
        dm(12, "Zoë swallows it. Task completed."),
    ]
    return script, turns


CLEAN = {"shell": shell, "kitchen": kitchen, "clinic": clinic}
CONDITIONS, ACTIONS, CODE = "Completion Conditions", "Available Actions", "verification code"


class Planted(NamedTuple):
    name: str
    script: Any
    turns: Any
    rule: str
    turn: int | None


def without(*path: Any) -> Callable:
    """Removes what lies at the path: ("turns", 3, "Action") or ("script", "Goal")."""

    def change(pair):
        *there, last = path
        for step in there:
            pair = pair[step]
        del pair[last]

    return change


def put(*path: Any) -> Callable:
    """Puts the last argument at the path before it."""

    def change(pair):
        *there, last, value = path
        for step in there:
            pair = pair[step]
        pair[last] = value

    return change


def insert(at: int, turn: dict) -> Callable:
    return lambda pair: pair["turns"].insert(at, turn)


def several(*changes: Callable) -> Callable:
    return lambda pair: [change(pair) for change in changes]


def unflag(*turns: int) -> Callable:
    return several(
        *(put("turns", turn, f"{kind}_error", False) for turn in turns for kind in ("parameter", "place", "logic"))
    )


CD = ("script", ACTIONS, "cd {path}")
FAULTS: list[tuple[str, str, Callable, str, int | None]] = [
    # the script's keys and types
    ("script is a list", "shell", put("script", []), "keys", None),
    ("script is null", "clinic", put("script", None), "keys", None),
    ("no environment", "shell", without("script", "Environment"), "keys", None),
    ("no goal", "kitchen", without("script", "Goal"), "keys", None),
    ("no conditions", "clinic", without("script", CONDITIONS), "keys", None),
    ("no actions", "shell", without("script", ACTIONS), "keys", None),
    (
        "a key in lower case",
        "kitchen",
        several(without("script", "Goal"), put("script", "goal", "Cook.")),
        "keys",
        None,
    ),
    ("environment is prose", "kitchen", put("script", "Environment", "A kitchen."), "keys", None),
    ("goal is a list", "shell", put("script", "Goal", ["Set mode=on."]), "keys", None),
    ("conditions are prose", "shell", put("script", CONDITIONS, "mode=on"), "keys", None),
    ("actions are a list", "shell", put("script", ACTIONS, ["cd {path}", "ls"]), "keys", None),
    ("actions are none", "clinic", put("script", ACTIONS, {}), "keys", None),
    ("an action is its code alone", "shell", put(*CD, "^cd (.*)$"), "keys", None),
    ("an action without code", "shell", without(*CD, CODE), "keys", None),
    ("an action without parameters", "shell", without(*CD, "parameters"), "keys", None),
    ("a code that is null", "shell", put(*CD, CODE, None), "keys", None),
    ("parameters are a list", "shell", put(*CD, "parameters", ["home", "documents"]), "keys", None),
    ("values are one string", "shell", put(*CD, "parameters", "path", "home"), "keys", None),
    ("a value is an object", "shell", put(*CD, "parameters", "path", [{"name": "home"}]), "keys", None),
    ("a value is a boolean", "shell", put(*CD, "parameters", "path", [True]), "keys", None),
    ("a placeholder without values", "shell", put(*CD, "parameters", {"directory": ["home"]}), "keys", None),
    # codes
    ("open bracket", "shell", put(*CD, CODE, r"^cd (.*$"), "regex_invalid", None),
    ("open class", "kitchen", put("script", ACTIONS, "look", action("^[a-$")), "regex_invalid", None),
    ("nothing to repeat", "clinic", put("script", ACTIONS, "wait", action("*wait")), "regex_invalid", None),
    ("unknown escape", "shell", put(*CD, CODE, r"^cd\y(.*)$"), "regex_invalid", None),
    ("repeat from more to fewer", "shell", put(*CD, CODE, r"^cd (.{5,2})$"), "regex_invalid", None),
    (
        "one group name twice",
        "clinic",
        put("script", ACTIONS, "give {animal} {drug}", CODE, r"^give (?P<x>\S+) (?P<x>\S+)$"),
        "regex_invalid",
        None,
    ),
    ("lookbehind of any width", "shell", put(*CD, CODE, r"^cd (.*)(?<= +)$"), "regex_invalid", None),
    (
        "nested repeats of thousands",
        "shell",
        put(*CD, CODE, r"((a{9999}){9999}){9999}|cd (.*)"),
        "regex_invalid",
        None,
    ),
    (
        "nested repeats without an upper end",
        "shell",
        put(*CD, CODE, r"(?:(?:a{1000,}){1000,}){1000,}|cd (.*)"),
        "regex_invalid",
        None,
    ),
    (
        "a number of thousands of digits",
        "shell",
        put(*CD, CODE, f"cd (.*)|(a)(?({'1' * 5000})b)"),
        "regex_invalid",
        None,
    ),
    ("brackets too deep", "shell", put(*CD, CODE, "(" * 5000 + ")" * 5000), "regex_invalid", None),
    (
        "catastrophic on an action",
        "shell",
        several(put("script", ACTIONS, "count", action(r"(a|aa)+$|count")), put("turns", 3, "Action", "a" * 60 + "b")),
        "regex_invalid",
        None,
    ),
    # a code and its own name
    ("code of another verb", "shell", put(*CD, CODE, r"^chdir (.*)$"), "regex_self", None),
    (
        "code that only a fuzzy engine matches",
        "shell",
        several(
            put("script", ACTIONS, "look", action(r"(?:look){e}")), put("turns", 3, "Action", "destroy everything")
        ),
        "regex_self",
        None,
    ),
    ("code in capitals", "shell", put(*CD, CODE, r"^CD (.*)$"), "regex_self", None),
    ("code lists values", "shell", put(*CD, CODE, r"^cd (home|documents)$"), "regex_self", None),
    (
        "code takes word characters",
        "clinic",
        put("script", ACTIONS, "call {animal}", CODE, r"^call (\w+)$"),
        "regex_self",
        None,
    ),
    ("code matches the beginning only", "shell", put(*CD, CODE, r"^cd"), "regex_self", None),
    ("code without a group", "shell", put(*CD, CODE, r"^cd .*$"), "regex_self", None),
    (
        "one group for two placeholders",
        "kitchen",
        put("script", ACTIONS, "chop {food} with {tool}", CODE, r"^chop (.+)$"),
        "regex_self",
        None,
    ),
    (
        "code of an action without parameters",
        "clinic",
        put("script", ACTIONS, "unlock store", CODE, r"^open store$"),
        "regex_self",
        None,
    ),
    ("empty code", "shell", put("script", ACTIONS, "ls", CODE, ""), "regex_self", None),
    # a turn's keys and types
    ("turns are an object", "shell", put("turns", {}), "keys", None),
    ("a turn is a string", "shell", put("turns", 3, "cd documents"), "keys", 3),
    ("a turn is null", "kitchen", put("turns", 0, None), "keys", 0),
    ("Player without thought", "shell", without("turns", 3, "Thought"), "keys", 3),
    ("Player without action", "clinic", without("turns", 11, "Action"), "keys", 11),
    ("DM without thought", "kitchen", without("turns", 6, "Thought"), "keys", 6),
    ("DM without observation", "kitchen", without("turns", 12, "Observation"), "keys", 12),
    ("DM without a flag", "shell", without("turns", 4, "place_error"), "keys", 4),
    ("first DM without flags", "clinic", without("turns", 0, "logic_error"), "keys", 0),
    ("no number", "shell", without("turns", 5, "turn"), "keys", 5),
    ("no role", "shell", without("turns", 2, "role"), "keys", 2),
    ("unknown role", "shell", put("turns", 3, "role", "Hero"), "keys", 3),
    ("role in lower case", "clinic", put("turns", 4, "role", "dm"), "keys", 4),
    ("an unknown key", "shell", put("turns", 7, "Reflection", "Hm."), "keys", 7),
    ("flags on a Player", "shell", put("turns", 1, "logic_error", False), "keys", 1),
    ("an action on a DM", "kitchen", put("turns", 8, "Action", "walk to stove"), "keys", 8),
    ("flag is a word", "shell", put("turns", 6, "logic_error", "true"), "keys", 6),
    ("flag is a number", "shell", put("turns", 6, "logic_error", 1), "keys", 6),
    ("flag is null", "shell", put("turns", 4, "parameter_error", None), "keys", 4),
    ("number is a word", "shell", put("turns", 4, "turn", "4"), "keys", 4),
    ("number is a fraction", "shell", put("turns", 4, "turn", 4.5), "keys", 4),
    ("number is a boolean", "shell", put("turns", 1, "turn", True), "keys", 1),
    ("action is a list", "clinic", put("turns", 5, "Action", ["call", "Zoë"]), "keys", 5),
    ("observation is null", "clinic", put("turns", 6, "Observation", None), "keys", 6),
    # order
    ("no turns", "shell", put("turns", []), "order", 0),
    ("Player first", "shell", without("turns", 0), "order", 0),
    ("DM twice at the start", "shell", insert(0, dm(0, "Welcome.")), "order", 1),
    ("DM twice", "kitchen", insert(7, dm(6, "The onion makes you cry.")), "order", 7),
    ("Player twice", "clinic", insert(6, player(5, "Please.", "call Zoë")), "order", 6),
    ("a DM's answer missing", "shell", without("turns", 4), "order", 4),
    ("a Player's turn missing", "shell", without("turns", 5), "order", 5),
    ("Player last", "shell", without("turns", 8), "order", 7),
    (
        "Player after the end",
        "kitchen",
        lambda pair: pair["turns"].append(player(13, "Done.", "walk to stove")),
        "order",
        13,
    ),
    # mistakes that the DM lets pass
    ("an unknown verb passes", "shell", put("turns", 3, "Action", "chdir documents"), "unflagged", 3),
    ("an unknown value passes", "shell", put("turns", 3, "Action", "cd music"), "unflagged", 3),
    ("a value in capitals passes", "shell", put("turns", 3, "Action", "cd Documents"), "unflagged", 3),
    ("a flag forgotten", "shell", unflag(2), "unflagged", 1),
    ("a flag forgotten on another value", "kitchen", unflag(4), "unflagged", 3),
    ("a flag forgotten on another verb", "clinic", unflag(4), "unflagged", 3),
    (
        "values of two parameters exchanged",
        "kitchen",
        put("turns", 5, "Action", "chop knife with red onion"),
        "unflagged",
        5,
    ),
    ("the second value is wrong", "kitchen", put("turns", 11, "Action", "put red onion in pan"), "unflagged", 11),
    ("an argument too many", "clinic", put("turns", 9, "Action", "unlock store now"), "unflagged", 9),
    ("an argument too few", "clinic", put("turns", 11, "Action", "give Zoë"), "unflagged", 11),
    ("the template itself passes", "shell", put("turns", 3, "Action", "cd {path}"), "unflagged", 3),
    ("an empty action passes", "shell", put("turns", 3, "Action", ""), "unflagged", 3),
    ("two actions in one pass", "clinic", put("turns", 9, "Action", "unlock store\nwait"), "unflagged", 9),
    (
        "a number out of the list passes",
        "shell",
        put("turns", 7, "Action", "edit config.cfg line 3 to mode=on"),
        "unflagged",
        7,
    ),
    ("the last action is none", "shell", put("turns", 7, "Action", "finish"), "unflagged", 7),
    (
        "only the turn after the next flags it",
        "shell",
        several(put("turns", 3, "Action", "cd music"), put("turns", 6, "logic_error", True)),
        "unflagged",
        3,
    ),
    # the whole
    ("no mistake is flagged", "shell", several(unflag(2, 6), put("turns", 1, "Action", "ls")), "refinements", 8),
    ("one mistake alone", "shell", unflag(6), "refinements", 8),
    ("one mistake alone, of place", "kitchen", unflag(8), "refinements", 12),
    (
        "one mistake of three, the first",
        "clinic",
        several(unflag(8, 4), put("turns", 3, "Action", "call Zoë")),
        "refinements",
        12,
    ),
    (
        "the second mistake is the last turn",
        "shell",
        lambda pair: pair.update(turns=pair["turns"][:7]),
        "refinements",
        6,
    ),
    (
        "flags of the first DM turn do not count",
        "shell",
        several(unflag(6), put("turns", 0, "logic_error", True)),
        "refinements",
        8,
    ),
    ("a DM alone", "shell", lambda pair: pair.update(turns=pair["turns"][:1]), "refinements", 0),
    ("cut before the end", "kitchen", lambda pair: pair.update(turns=pair["turns"][:11]), "incomplete", 10),
    ("never said to be completed", "shell", put("turns", 8, "Observation", "It says mode=on."), "incomplete", 8),
    ("said in another case", "clinic", put("turns", 12, "Observation", "task completed"), "incomplete", 12),
    (
        "said by the thought only",
        "shell",
        several(put("turns", 8, "Observation", "Saved."), put("turns", 8, "Thought", "Task completed.")),
        "incomplete",
        8,
    ),
    (
        "said too early",
        "kitchen",
        several(put("turns", 10, "Observation", "Task completed"), put("turns", 12, "Observation", "It boils.")),
        "incomplete",
        12,
    ),
]


def planted() -> Iterator[Planted]:
    for name, which, change, rule, turn in FAULTS:
        script, turns = copy.deepcopy(CLEAN[which]())
        pair = {"script": script, "turns": turns}
        change(pair)
        yield Planted(name, pair["script"], pair["turns"], rule, turn)
