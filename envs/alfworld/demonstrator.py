"""A scripted ALFWorld player that reads only the text, so that a model can imitate it.

It remembers the contents of each receptacle it has seen, and searches the others in the order of how often their type
holds the wanted object (`hold_rates`, counted over games that are not evaluated on). Every turn has a short thought,
which names the wanted object before it says whether that is in sight: what follows a name just read can be copied,
which a small model learns long before it learns to compare a list with a goal. If another action is taken than its own,
it continues from the new state; `explain` writes a reason for that action afterwards, the text that ActRe learns from.
A careless player takes the shortcut of its task type (no cleaning, heating or cooling; one object instead of two;
looking without the lamp) and believes that it is done.

Left out: slicing (no task of the six types needs it). Used by models/corpus/alfworld.py and agent/scripted.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

GOALS = (  # (pattern, treatment, count)
    (r"put a (clean|hot|cool) (?P<object>\w+) in (?P<place>\w+)", None, 1),
    (r"(clean|heat|cool) some (?P<object>\w+) and put it in (?P<place>\w+)", None, 1),
    (r"(?:put|find) two (?P<object>\w+)(?: and put them)? in (?P<place>\w+)", "", 2),
    (r"(?:look at|examine the) (?P<object>\w+) (?:under|with) the (?P<lamp>\w+)", "", 1),
    (r"put (?:a|some) (?P<object>\w+) (?:in|on) (?P<place>\w+)", "", 1),
)
TREATMENTS = {  # word in the goal: (verb, adjective, receptacle type)
    "clean": ("clean", "clean", "sinkbasin"),
    "hot": ("heat", "hot", "microwave"),
    "heat": ("heat", "hot", "microwave"),
    "cool": ("cool", "cool", "fridge"),
}


def kind(name: str) -> str:
    """The type of a numbered object: "mug 2" -> "mug"."""
    return name.rsplit(" ", 1)[0]


def number(name: str) -> int:
    return int(name.rsplit(" ", 1)[1])


def things(text: str) -> list[str]:
    """The numbered objects listed in a sentence: "you see a mug 2, and a pen 1" -> ["mug 2", "pen 1"]."""
    return re.findall(r"\ba (\w+ \d+)", text)


class Demonstrator:
    """Plays one game. `hold_rates[object type][receptacle type]`: the share of those receptacles with such an object.

    decide() -> (thought, action); observe(action, observation) after every action, its own or another player's;
    explain(action) -> the reason for another player's next action.
    Raises ValueError for a goal that fits none of the six task types.
    """

    def __init__(self, opening: str, hold_rates: Mapping[str, Mapping[str, float]] | None = None):
        goal = re.search(r"Your task is to: (.*?)\.(?:\s|$)", opening)
        match = goal and next((m for p, *_ in GOALS if (m := re.fullmatch(p, goal[1]))), None)
        if not match:
            raise ValueError(f"no goal of the six task types in {opening[:200]!r}")
        groups = match.groupdict()
        self.target, self.goal_type, self.lamp = groups["object"], groups.get("place"), groups.get("lamp")
        self.treatment = TREATMENTS.get(match[1]) if match.re.groups == 3 else None
        self.needed = 2 if " two " in f" {goal[1]} " else 1
        seen = opening[opening.index("you see") :].split("\n")[0].split("Your task is to")[0]
        rates = (hold_rates or {}).get(self.target, {})
        # A stable sort keeps receptacles of one type in the listed order, so the next one can be read off the list.
        self.receptacles = sorted(things(seen), key=lambda r: (-rates.get(kind(r), 0.0), kind(r)))
        self.contents: dict[str, list[str]] = {}  # receptacle -> last contents seen; absent: never seen inside
        self.closed: set[str] = set()
        self.at = self.holding = self.taken_from = self.goal_receptacle = None
        self.treated: set[str] = set()
        self.placed: list[str] = []
        self.careless = False  # set by the caller; takes the shortcut
        self.examined = False  # the shortcut of lamp tasks was taken
        self.refused: set[tuple[str, str]] = set()  # (object, receptacle that cannot hold it)

    # ---- reading the text --------------------------------------------------------------------------------------------

    def observe(self, action: str, observation: str) -> None:
        """Updates the memory from the world's answer to `action`."""
        verb, _, rest = action.partition(" ")
        if observation.startswith("Nothing happens"):
            if verb == "go" and rest.removeprefix("to ") in self.receptacles:
                self.at = rest.removeprefix("to ")  # co-located with the current one: already there
            if verb == "move":
                self.refused.add(tuple(rest.split(" to ", 1)))
            return
        if verb == "go":
            self.at = rest.removeprefix("to ")
        if verb in ("go", "open", "examine") and self.at:
            self._read(observation)
            self.examined |= rest == self.holding
        elif verb == "close":
            self.closed.add(rest)
        elif verb == "take":
            thing, _, source = rest.partition(" from ")
            self.contents[source] = [t for t in self.contents.get(source, []) if t != thing]
            self.holding, self.taken_from = thing, source
            self.placed = [t for t in self.placed if t != thing]
        elif verb == "move":
            thing, _, where = rest.partition(" to ")
            self.contents.setdefault(where, []).append(thing)
            self.holding = None
            ready = not self.treatment or thing in self.treated or self.careless
            wanted = kind(where) == self.goal_type and kind(thing) == self.target
            if ready and wanted and self.goal_receptacle in (None, where):
                self.placed.append(thing)
                self.goal_receptacle = where
        elif verb in ("clean", "heat", "cool"):
            thing = rest.partition(" with ")[0]
            if self.treatment and verb == self.treatment[0]:
                self.treated.add(thing)
            elif self.treatment and {verb, self.treatment[0]} == {"heat", "cool"}:
                self.treated.discard(thing)

    def _read(self, observation: str) -> None:
        for where in re.findall(r"The (\w+ \d+) is closed", observation):
            self.closed.add(where)
        for where, listed in re.findall(r"On the (\w+ \d+), you see ([^.]*)\.", observation):
            self.contents[where] = things(listed)
        for where, listed in re.findall(r"The (\w+ \d+) is open\. In it, you see ([^.]*)\.", observation):
            self.closed.discard(where)
            self.contents[where] = things(listed)

    # ---- acting ------------------------------------------------------------------------------------------------------

    def decide(self) -> tuple[str, str]:
        """The next (thought, action)."""
        if self.done:
            return "I am done. I look around.", "look"
        if self.holding and kind(self.holding) != self.target:
            return self._put_down()
        if self.holding:
            return self._use() if self.lamp else self._deliver()
        found = self.known(self.target)
        if not found:
            return self._search(self.target)
        thing, where = found
        need = self._need(self.target)
        return self._reach(where, f"{need}, and the {thing} is at the {where}. I go there.") or (
            f"{need}, and the {thing} is here. I take it.",
            f"take {thing} from {where}",
        )

    def _need(self, wanted: str) -> str:
        return f"I need {'another' if self.placed else 'a'} {wanted}"

    @property
    def done(self) -> bool:
        """Whether a careless player believes the task is done."""
        return self.careless and bool(self.placed or self.examined)

    def _reach(self, where: str, thought: str) -> tuple[str, str] | None:
        """The next step towards standing at `where` with its contents seen; None once there."""
        if self.at != where:
            return thought, f"go to {where}"
        if where in self.closed:
            return f"The {where} is closed. I open it.", f"open {where}"
        if where not in self.contents:
            return f"I am at the {where}. I look at it.", f"examine {where}"
        return None

    def known(self, wanted: str) -> tuple[str, str] | None:
        """An object of the wanted type seen and still to be moved, and its receptacle; the current one first."""
        spots = sorted(self.contents, key=lambda r: (r != self.at, kind(r), number(r)))
        done = [] if self.lamp else self.placed
        return next(((t, r) for r in spots for t in self.contents[r] if kind(t) == wanted and t not in done), None)

    def _search(self, wanted: str) -> tuple[str, str]:
        if self.at and self.at not in self.contents:
            return self._reach(self.at, "")
        hidden = [r for r in self.receptacles if r not in self.contents]
        if not hidden:  # everything was seen: search again, something may have been missed
            self.contents.clear()
            hidden = [r for r in self.receptacles if r != self.at]
        return f"{self._need(wanted)}. I check the {hidden[0]}.", f"go to {hidden[0]}"

    def _put_down(self) -> tuple[str, str]:
        thing = self.holding
        spots = [self.taken_from, *self.receptacles]
        back = next((r for r in spots if (thing, r) not in self.refused), self.taken_from)
        return self._reach(back, f"I do not need the {thing}. I bring it back to the {back}.") or (
            f"I do not need the {thing}. I put it back.",
            f"move {thing} to {back}",
        )

    def _use(self) -> tuple[str, str]:
        if self.careless:
            return f"I have the {self.holding}. I examine it.", f"examine {self.holding}"
        found = self.known(self.lamp)
        if not found:
            return self._search(self.lamp)
        lamp, where = found
        if self.at != where:
            return f"{self._need(self.lamp)}, and the {lamp} is at the {where}. I go there.", f"go to {where}"
        return f"{self._need(self.lamp)}, and the {lamp} is here. I use it.", f"use {lamp}"

    def _deliver(self) -> tuple[str, str]:
        thing = self.holding
        if self.treatment and thing not in self.treated and not self.careless:
            verb, _, where_kind = self.treatment
            where = next((r for r in self.receptacles if kind(r) == where_kind), f"{where_kind} 1")
            if self.at != where:
                return f"I have the {thing}. I {verb} it at the {where}.", f"go to {where}"
            return f"I {verb} the {thing} with the {where}.", f"{verb} {thing} with {where}"
        where = self.goal_receptacle or next(
            (r for r in self.receptacles if kind(r) == self.goal_type), f"{self.goal_type} 1"
        )
        state = f"The {thing} is {self.treatment[1]}." if thing in self.treated else f"I have the {thing}."
        return self._reach(where, f"{state} I bring it to the {where}.") or (
            f"I put the {thing} in the {where}.",
            f"move {thing} to {where}",
        )

    # ---- reasons for given actions -----------------------------------------------------------------------------------

    def explain(self, action: str) -> str:
        """One short sentence that motivates `action` in the current state, written after the action was chosen."""
        thought, own = self.decide()
        if action == own:
            return thought
        verb, _, rest = action.partition(" ")
        rest = rest.removeprefix("to ")
        thing, _, where = re.sub(r" (?:from|to|with) ", "|", rest).partition("|")
        searching = not self.holding and not self.known(self.target)
        if verb == "go":
            if searching and rest not in self.contents:
                return f"{self._need(self.target)}. I check the {rest}."
            return f"I want to look at the {rest}."
        if verb == "open":
            return f"The {rest} is closed. I open it." if rest in self.closed else f"I want to see inside the {rest}."
        if verb == "take" and kind(thing) == self.target and searching:
            return f"{self._need(self.target)}, and the {thing} is here. I take it."
        return {
            "close": f"I am done with the {rest}. I close it.",
            "take": f"I see the {thing}. It may be of use.",
            "move": f"I leave the {thing} at the {where}.",
            "examine": f"I look closer at the {rest}.",
            "inventory": "I check what I have.",
            "look": "I look around.",
            "help": "I check the commands.",
            "use": f"I see the {rest}. I use it.",
            "clean": f"I clean the {thing} with the {where}.",
            "heat": f"I heat the {thing} with the {where}.",
            "cool": f"I cool the {thing} with the {where}.",
            "slice": f"I slice the {thing} with the {where}.",
        }.get(verb, "I try something else.")
