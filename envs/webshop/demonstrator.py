"""A scripted WebShop player that reads only the text, so that a model can imitate it. Reads both observation modes.

It searches for the instruction's words and options, opens affordable products in list order, goes back if an option is
missing, reads the features, reads the description if words are still missing, goes back if too many are, settles after
some turns for the best product seen, chooses the options and buys. A hasty player searches for the instruction as it is
written, opens the first product, ignores prices and features, chooses the options on the page and buys. A careless one
opens the first product and buys it without choosing options.

Every turn has a short thought, whose steps each check one thing: a product and its price, an option and whether the
page has it. Options follow the instruction's order, each named after the one chosen last, so that the words lead from
one to the next; the action is named last, so that it can be copied from the thought. The player can be displaced: after
an action that it did not choose it continues from the resulting page, and `explain` writes the reason for such an
action after the fact, the text that ActRe learns from.
Left out: the attributes that the reward checks, which no page shows.

Run: python -m envs.webshop.demonstrator [--split gen_test]     plays a split and prints its mean reward and success
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from tqdm import tqdm

from artifacts.cli import Range, run_main
from envs.webshop.world import OPEN, WebShop

PRICE = re.compile(r",? and price lower than (\d+\.\d\d) dollars$")
FIRST_OPTION = re.compile(r"(.*) with ((?:(?! with )[^:])+): (.*)", re.DOTALL)
OPENING = re.compile(
    r"(?:hello, )?(?:find me|show me|i(?:'m| am) looking for|i (?:need|want)|i would like to buy)(?: an?)? ", re.I
)
COMMON = frozenset(
    "find me i am looking for need want show would like to buy a an the with and that is of in it some".split()
)
OPTION_NAMES = frozenset("color size style flavor scent".split())  # plain words too in human-written instructions
ASIN = re.compile(r"[A-Z0-9]{10}")
HURRY = 11  # turns after which it settles for the best product seen
PAGES = 2  # results pages to read
ENOUGH = 0.8  # share of the wanted words that a product's pages must contain


def read_nodes(observation: str) -> list[str]:
    """The text nodes of a page in either mode, without button marks."""
    if " [SEP] " in observation:
        return observation.split(" [SEP] ")
    lines = [line for line in observation.split("\n") if line.strip() and not line.startswith("You have clicked ")]
    return [re.sub(r"^ *\[(clicked )?button\] (.*) \[(clicked )?button_\]$", r"\2", line).strip() for line in lines]


def content_words(text: str) -> list[str]:
    """The words of a text that are not in COMMON, in order, each once."""
    words = re.findall(r"[^\W_][\w'.%-]*", text.lower())
    return list(dict.fromkeys(word.strip(".'") for word in words if word.strip(".'") not in COMMON))


def split_options(wish: str) -> tuple[str, dict[str, str]]:
    """(wish without its options, {name: value} in order) of "... with color: red, and size: 8"."""
    parts, options = wish.split(", and "), {}
    while len(parts) > 1 and (match := re.fullmatch(r"([^:]+): (.+)", parts[-1])):
        options = {match[1]: match[2], **options}
        parts.pop()
    head = ", and ".join(parts)
    if match := FIRST_OPTION.fullmatch(head):
        return match[1], {match[2]: match[3], **options}
    return head, options


def has_word(text: str, word: str) -> bool:
    return word in text or (word.endswith("s") and word[:-1] in text) or (word.endswith("'s") and word[:-2] in text)


@dataclass
class Seen:
    """What is known of a product."""

    page: int  # results page that lists it
    text: str  # of the pages read so far, in lower case
    tag: str  # price tag
    read: tuple[str, ...] = ()  # pages read: features, description
    opened: bool = False
    fits: bool = True  # has all wanted options

    @property
    def price(self) -> float:
        """The price, or the upper end of its range."""
        return max(map(float, re.findall(r"\d+(?:\.\d+)?", self.tag)), default=0.0)


class Demonstrator:
    """Plays one task.

    decide() -> (thought, action). observe(action, observation): call it after every action, whoever chose it.
    explain(action) -> reason for an action that another player is about to take.
    Raises ValueError for an opening without an instruction.
    """

    def __init__(self, opening: str, hasty: bool = False):
        nodes = read_nodes(opening)
        if len(nodes) < 4 or nodes[0] != "WebShop":
            raise ValueError(f"no instruction in {opening[:200]!r}: expected WebShop's search page")
        self.instruction = " ".join(nodes[2:-1])
        limit = PRICE.search(self.instruction)
        self.hasty = hasty
        self.priced = limit is not None
        self.limit = float(limit[1]) if limit and not hasty else float("inf")
        self.whole_wish = OPENING.sub("", PRICE.sub("", self.instruction)).strip(" ,.")
        wish, self.options = split_options(self.whole_wish)
        self.wish = wish.strip(" ,.")
        self.words = content_words(self.wish)
        self.seen: dict[str, Seen] = {}  # asin -> what is known, in list order
        self.chosen: list[str] = []
        self.at: str | None = None  # asin of the product on the page
        self.settled: str | None = None  # asin of the product to buy
        self.careless = False  # set to take the shortcut
        self.turns = 0
        self._read(nodes)

    # ---- what the text says ------------------------------------------------------------------------------------------

    def observe(self, action: str, observation: str) -> None:
        """Updates the state from the page that followed `action`."""
        verb, _, rest = action.partition("[")
        name = rest.rpartition("]")[0].lower()
        before, self.turns = self.page, self.turns + 1
        nodes = read_nodes(observation)
        if verb == "click" and before == "results" and name.upper() in self.seen:
            self.at = name.upper()
        if verb == "click" and before == "item":
            if name in self.values:
                self.chosen.append(name)
        self._read(nodes)
        if verb == "search" and self.page == "results":  # new results: products seen before may be out of reach
            self.seen, self.settled = {}, None
            self._read(nodes)
        if self.page in ("search", "results"):
            self.at, self.chosen = None, []
        elif self.page == "part" and self.at and name in ("features", "description"):
            product = self.seen[self.at]
            product.read += (name,)
            product.text += " " + " ".join(nodes[4:]).lower()

    def _read(self, nodes: list[str]) -> None:
        self.values = []
        heading = next((node for node in nodes if node.startswith("Page ") and "(Total results:" in node), None)
        if nodes[0] == "WebShop":
            self.page = "search"
        elif heading is not None:
            self.page, self.page_number = "results", int(heading.split()[1])
            self._read_list(nodes)
        elif nodes[-1] == "Buy Now":
            self.page = "item"
            price = next(i for i, node in enumerate(nodes) if node.startswith("Price: "))
            self.values = nodes[nodes.index("< Prev") + 1 : price - 1]
            if self.at:
                product = self.seen[self.at]
                product.fits = all(value in self.values for value in self._wanted_options().values())
                product.text += f" {' '.join(self.values)}" * (not product.opened)
                product.opened = True
        else:
            self.page = "part"

    def _read_list(self, nodes: list[str]) -> None:
        """Reads asin, name and price of each product on a results page."""
        self.listed = []
        for i, node in enumerate(nodes):
            if ASIN.fullmatch(node) and i + 2 < len(nodes) and nodes[i + 2].startswith("$"):
                self.listed.append(node)
                self.seen.setdefault(node, Seen(page=self.page_number, text=nodes[i + 1].lower(), tag=nodes[i + 2]))

    def _wanted_options(self) -> dict[str, str]:
        """{name in a thought: value to click}: the instruction's options, or the page's values that it contains."""
        if self.options:
            return {f"{name}: {value}": value for name, value in self.options.items()}
        text = f" {' '.join(re.findall(r'[^ ,.]+', self.instruction.lower()))} "
        return {value: value for value in self.values if f" {value} " in text and value not in OPTION_NAMES}

    # ---- what to do --------------------------------------------------------------------------------------------------

    def decide(self) -> tuple[str, str]:
        """The next (thought, action)."""
        if self.page == "search":
            if self.hasty:
                return "I look for what I need.", f"{OPEN}{self.whole_wish}]"
            sought = " ".join([self.wish, *self.options.values()])
            return f"I look for {sought}.", f"{OPEN}{sought}]"
        if self.page == "results":
            return self._pick()
        if self.page == "part" or self.at is None:
            return "I have read this. I go back.", "click[< prev]"
        if self.careless or self.hasty or self.at == self.settled:
            return self._choose_and_buy()
        return self._look_closer()

    def missing(self, asin: str) -> list[str]:
        """The wanted words that are not in the product's text read so far."""
        return [word for word in self.words if not has_word(self.seen[asin].text, word)]

    def _pick(self) -> tuple[str, str]:
        """On a results page: open the next affordable product, turn the page, or settle."""
        if not self.listed:
            if self.page_number > 1:
                return "There is nothing here. I go back a page.", "click[< prev]"
            return "I found nothing. I search for less.", f"{OPEN}{' '.join(self.words[-2:])}]"
        if self.careless or self.hasty:
            return f"I open {self.listed[0]}.", f"click[{self.listed[0]}]"
        opened = [asin for asin, product in self.seen.items() if product.opened]
        fresh = [asin for asin in self.listed if asin not in opened and self.seen[asin].price <= self.limit]
        if self.settled is None and (self.turns >= HURRY or (not fresh and self.page_number >= PAGES)):
            self.settled = self._best(opened or self.listed)
        if self.settled is not None:
            if self.settled in self.listed:
                return f"{self.settled} is the best of them. I open it.", f"click[{self.settled}]"
            turn = "< prev" if self.seen[self.settled].page < self.page_number else "next >"
            return f"{self.settled} is the best of them. I turn the page.", f"click[{turn}]"
        return self._advance(self.listed.index(fresh[0]) if fresh else len(self.listed))

    def _advance(self, stop: int) -> tuple[str, str]:
        """The step from the last opened product of the list to the one at index `stop`, or past the list's end."""
        opened = [index for index in range(stop) if self.seen[self.listed[index]].opened]
        steps = [f"I need it below {self.limit:.2f}."] if self.limit < float("inf") else []
        steps += [f"I looked at {self.listed[opened[-1]]}."] if opened else []
        for asin in self.listed[opened[-1] + 1 if opened else 0 : stop]:
            steps.append(f"{asin} costs {self.seen[asin].tag}, too much.")
        if stop == len(self.listed):
            return " ".join([*steps, "I turn the page."]), "click[next >]"
        asin = self.listed[stop]
        return " ".join([*steps, f"{asin} costs {self.seen[asin].tag}. I open it."]), f"click[{asin}]"

    def _best(self, asins: list[str]) -> str:
        """The best product by options, then price limit, then missing words."""

        def rank(asin: str) -> tuple:
            product = self.seen[asin]
            return not product.fits, product.price > self.limit, len(self.missing(asin))

        return min(asins, key=rank)

    def _look_closer(self) -> tuple[str, str]:
        """On a product page: go back if an option is missing, read on if words are missing, else settle."""
        product, missing = self.seen[self.at], self.missing(self.at)
        absent = [name for name, value in self._wanted_options().items() if value not in self.values]
        if absent:
            return f"I need {absent[0]}, missing. I go back.", "click[< prev]"
        if not self.chosen and self.turns < HURRY:
            unread = [name for name in ("features", "description") if name not in product.read]
            if missing and unread:
                return f"I need {' '.join(missing)}. I read the {unread[0]}.", f"click[{unread[0]}]"
            if len(missing) > (1 - ENOUGH) * len(self.words):
                return f"I need {' '.join(missing)}, it is not here. I go back.", "click[< prev]"
        self.settled = self.at
        return self._choose_and_buy()

    def _choose_and_buy(self) -> tuple[str, str]:
        """The next option on the page, in the instruction's order, or the purchase.

        A thought follows the instruction from option to option: from the last one chosen, or left because it is
        missing, to the one named after it.
        """
        options = [*self._wanted_options().items()]
        if self.careless and options:
            return "This will do. I buy it.", "click[buy now]"
        chosen = [value for value in self.chosen if value in dict(options).values()]
        start = 1 + max((i for i, (_, value) in enumerate(options) if value in chosen[-1:]), default=-1)
        passed = [(name, value) for name, value in options[:start] if value in set(self.values) - set(chosen)]
        steps = [f"I have chosen {chosen[-1]}"] if chosen else []
        for name, value in options[start:] + passed:  # a displaced player may have passed some over
            steps.append(f", and {name}" if steps else f"I need {name}")
            if value in self.values:
                return f"{''.join(steps)}, here. I choose {value}.", f"click[{value}]"
            steps.append(f", missing. I leave {value}")
        if not steps:
            return "There is nothing to choose. I buy it.", "click[buy now]"
        rest = ", and price comes last" if self.priced else ", and nothing more"
        return f"{''.join(steps)}{rest}. I buy it.", "click[buy now]"

    # ---- reasons after the fact --------------------------------------------------------------------------------------

    def explain(self, action: str) -> str:
        """One short sentence that motivates `action` on this page, written after the action was chosen."""
        settled = self.settled
        thought, own = self.decide()
        self.settled = settled
        if action == own:
            return thought
        verb, _, rest = action.partition("[")
        name = rest.rpartition("]")[0].lower()
        if verb == "search":
            return f"I look for {name}."
        if name.upper() in self.seen and self.page == "results":
            return f"I want to look at {name.upper()}."
        if name in self.values:
            return f"I choose {name}."
        return {
            "buy now": "I have what I need. I buy it.",
            "back to search": "I want to search for something else.",
            "next >": "I turn the page.",
            "< prev": "I go back.",
            "features": "I read the features.",
            "description": "I read the description.",
            "reviews": "I read the reviews.",
        }.get(name, "I try something else.")


def play(world: WebShop, task_id: str, max_turns: int, careless: bool = False) -> float:
    """The reward of the demonstrator's purchase; 0 if it buys nothing within `max_turns`."""
    player = Demonstrator(world.reset(task_id).text)
    player.careless = careless
    for _ in range(max_turns):
        action = player.decide()[1]
        result = world.step(action)
        if result.done:
            return result.reward
        player.observe(action, result.observation)
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Args:
    data: str | None = None
    """WebShop's data folder or product file (default: $WEBSHOP_DATA, else the generated catalogue)."""
    split: str = "gen_test"
    """Split to play."""
    limit: Annotated[int, Range(1)] = 300
    """Maximum number of tasks, spread evenly over the split."""
    max_turns: Annotated[int, Range(1, 10_000)] = 20
    """Maximum number of turns per task."""
    careless: bool = False
    """Buy the first product without choosing options."""
    mode: str = "text"
    """Observation mode: text or text_rich."""


def main(args: Args) -> None:
    world = WebShop(args.data, mode=args.mode)
    task_ids = world.tasks(args.split)
    chosen = np.linspace(0, len(task_ids) - 1, min(args.limit, len(task_ids))).round().astype(int)
    rewards = [play(world, task_ids[i], args.max_turns, args.careless) for i in tqdm(chosen, unit="task", delay=2)]
    print(
        f"{args.split}: {len(rewards)} tasks, mean reward {100 * np.mean(rewards):.1f}, success "
        f"{100 * np.mean(np.array(rewards) == 1):.1f} %, nouns {world.facts['nouns']}"
    )


if __name__ == "__main__":
    run_main(main, Args, __doc__)
