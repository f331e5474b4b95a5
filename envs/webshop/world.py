"""WebShop: find a product, choose its options, buy it. Pages, actions and reward are the original's, as text.

`search[words]` searches from any page (at most 50 products, 10 per page), `click[x]` follows a button, link or option
on the page, `think[x]` does nothing. Any other action is invalid and does nothing. The task ends with `click[buy now]`;
its reward (`reward.py`) is 1 if everything fits. Actions that crash the original or draw from its global generator are
invalid here: searches that begin with <r>, <a>, <c> or <q>, a link to a product that does not exist, more than 1,024
words.
Left out: the turn limit (the runner's), the html and url modes, images, the Attributes page (it reveals the answer).

Play one: python -m envs.play --env webshop --tasks --split gen_valid
Source: WebShop (arXiv 2207.01206); rules as measured on the original.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from artifacts.json_io import read_json
from envs.base import Observation, Result, content_hash
from envs.webshop.catalogue import data_folder, open_catalogue, prepare
from envs.webshop.goals import Goal
from envs.webshop.reward import Score, nouns_named, score_purchase

MODES = ("text", "text_rich")
SEPARATOR = " [SEP] "
PAGE = 10  # products on a results page
SUB_PAGES = ("description", "features", "reviews")
BLOCKED = ("<r>", "<a>", "<c>", "<q>")  # first words that the original treats as commands to its search engine
OPEN = "search["  # the start of a search, to be completed with words and a closing bracket
_BLANK = " \n\t\f\r"

Node = tuple[str, str]  # (kind, words) of a text node; kind: text, button, option or link


def parse(action: str) -> tuple[str, str] | None:
    """(verb, lower-case argument) of `verb[argument]`, ignoring what follows; None for any other text."""
    line = action.partition("\n")[0]
    end = line.rfind("]")
    start = line.rfind("[", 1, max(end - 1, 0))  # both sides of it hold something
    return (line[:start], line[start + 1 : end].lower()) if start > 0 else None


class WebShop:
    """WebShop as a `World`.

    `data`: WebShop's data folder or product file (default: $WEBSHOP_DATA, else the generated catalogue). `mode`: "text"
    (text nodes joined by [SEP]) or "text_rich" (one per line, buttons marked). `nouns`: the reward's noun backend.
    `prices`: a JSON file {asin: price} that replaces the drawn prices, for replays. `page`: products per results page;
    the original has 10. Raises FileNotFoundError for a missing file, ValueError for an invalid file or argument.

    Observations are the original's, verbatim. `actions()` lists the clicks, and on the search page `search[`, to be
    completed with words and a bracket. Progress is the largest reward that buying the product on the page would have
    brought so far. `facts`: what a score must name. `purchase`: the components of the last purchase's reward.
    """

    isolated = False

    def __init__(
        self,
        data: str | None = None,
        mode: str = "text",
        nouns: str = "auto",
        prices: str | None = None,
        page: int = PAGE,
    ):
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: expected one of {MODES}")
        self.mode, self.page, self._nouns = mode, page, nouns
        self._shop = open_catalogue(prepare(data_folder(data)))
        self._prices = read_json(prices, dict[str, float]) if prices else {}
        nouns_name, _ = self._nouns_backend()
        self.facts = {key: value for key, value in self._shop.facts.items() if key != "data"} | {"nouns": nouns_name}
        self._goal: Goal | None = None
        self.purchase: Score | None = None

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted ids of a split (`goals.py` lists the splits). Raises ValueError for an unknown split."""
        if split not in self._shop.splits:
            raise ValueError(
                f"no split {split!r} in {self._shop.facts['data']}: expected one of "
                f"{', '.join(sorted(self._shop.splits)) or '(none)'}"
            )
        return self._shop.splits[split]

    def left_out(self, split: str) -> Mapping[str, str]:
        """No goal is left out."""
        self.tasks(split)
        return {}

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        """sha256 of the goals and of all products. Raises ValueError for an unknown id."""
        products = self._shop.facts["products_sha256"].encode()
        return content_hash(task_ids, lambda task_id: products + msgspec.json.encode(self._find_goal(task_id)))

    def reset(self, task_id: str) -> Observation:
        """Start a task. Raises ValueError for an unknown id."""
        return self.start(self._find_goal(task_id))

    def _find_goal(self, task_id: str) -> Goal:
        goal = self._shop.goal(task_id)
        if goal is None:
            raise ValueError(
                f"unknown task {task_id!r}: expected an id of the splits {', '.join(self._shop.splits)}; "
                "`python -m envs.play --env webshop --tasks --split SPLIT` lists them"
            )
        return goal

    def start(self, goal: Goal) -> Observation:
        """Start the task of any goal, including one outside the splits."""
        self._goal, self._done, self._progress, self.purchase = goal, False, 0.0, None
        self._show_search_page()
        return Observation(text=self._render(), task=goal.instruction_text.strip())

    def step(self, action: str) -> Result:
        """Take one action; an invalid one changes nothing and shows the page again."""
        if self._goal is None or self._done:
            raise RuntimeError(f"{'the task is over' if self._goal else 'no task yet'}: call reset(task_id)")
        verb, argument = parse(action) or ("", "")
        if verb == "search":
            valid = self._search(argument)
        elif verb == "click":
            valid = argument != "search" and argument in self.available()["clickables"] and self._click(argument)
        else:
            valid = verb == "think"
        if self.purchase:
            reward = self.purchase.reward
            text = self._render_end()
        else:
            reward, text = 0.0, self._render()
        return Result(
            observation=text,
            reward=reward,
            progress=self._progress,
            success=reward == 1.0,
            done=self._done,
            valid=valid,
        )

    def actions(self) -> list[str]:
        """The clicks, sorted, and `search[` if the page has a search bar; nothing once the task is done."""
        if self._goal is None:
            raise RuntimeError("no task yet: call reset(task_id)")
        if self._done:
            return []
        found = self.available()
        clicks = [f"click[{name}]" for name in found["clickables"] if name != "search"]
        clicks = [click for click in clicks if parse(click) == ("click", click[6:-1])]  # some names cannot be clicked
        return sorted([*clicks, OPEN] if found["has_search_bar"] else clicks)

    def commands(self) -> list[str]:
        """Templates of the commands that do something, so without `think[...]`."""
        if self._goal is None:
            raise RuntimeError("no task yet: call reset(task_id)")
        return ["search[{words}]", "click[{button}]"]

    def available(self) -> dict:
        """The original's available actions, {"has_search_bar": bool, "clickables": [...]}, in its order."""
        nodes = list(self._nodes())
        names = [words.lower() for wanted in ("button", "link") for kind, words in nodes if kind == wanted]
        names += [words for kind, words in nodes if kind == "option"]
        return {"has_search_bar": self._page == "search", "clickables": list(dict.fromkeys(names))}

    # ---- moving ------------------------------------------------------------------------------------------------------

    def _show_search_page(self) -> None:
        self._page, self._words, self._page_number, self._hits = "search", "", 0, []
        self._product, self._options, self._visited = None, {}, []

    def _show_results(self) -> None:
        self._page, self._product, self._options = "results", None, {}

    def _search(self, words: str) -> bool:
        if words.split(" ")[0] in BLOCKED:
            return False
        try:
            self._hits = self._shop.index.search(words)
        except ValueError:  # too many words
            return False
        self._words, self._page_number = words, 1
        self._show_results()
        return True

    def _click(self, name: str) -> bool:
        """Follow an element of the page. Button names come first: an option called "features" shows the features."""
        if name == "buy now":
            self.purchase, self._done = self._score(), True
            self._progress = max(self._progress, self.purchase.reward)
        elif name == "back to search":
            self._show_search_page()
        elif self._page == "results" and name in ("next >", "< prev"):
            self._page_number += 1 if name == "next >" else -1
        elif self._page == "item" and name == "< prev":
            self._show_results()
        elif self._page == "results":
            product = self._shop.find(name.upper())
            if product is None:
                return False
            self._product, self._page = product, "item"
            if name.upper() not in self._visited:
                self._visited = [*self._visited, name.upper()]
        elif self._page == "item" and name in SUB_PAGES:
            self._page = name
        elif name == "< prev":
            self._page = "item"
        else:
            options = self._shop.product(self._product).options
            option = [option for option, values in options.items() if name in values][-1]  # the last of several
            self._options = self._options | {option: name}
        if self._page == "item" and not self._done:
            self._progress = max(self._progress, self._score().reward)
        return True

    def _score(self) -> Score:
        product = self._shop.product(self._product)
        price = self._prices.get(product.asin, product.price)
        return score_purchase(product, self._goal, price, self._options, self._nouns_backend()[1])

    def _nouns_backend(self) -> tuple:
        return nouns_named(self._nouns, Path(self._shop.facts["data"]), self._shop)

    # ---- pages -------------------------------------------------------------------------------------------------------

    def _nodes(self) -> Iterator[Node]:
        """The text nodes of the page, in the order of the original's HTML."""
        goal = self._goal.instruction_text
        if self._page == "search":
            yield from (("text", "WebShop"), ("text", "Instruction: "), ("text", goal), ("button", "Search"))
            return
        yield from (("text", "Instruction:"), ("text", goal), ("button", "Back to Search"))
        if self._page == "results":
            yield "text", f"Page {self._page_number} (Total results: {len(self._hits)})"
            if self._page_number > 1:
                yield "button", "< Prev"
            yield "button", "Next >"
            for number in self._hits[(self._page_number - 1) * self.page : self._page_number * self.page]:
                product = self._shop.product(number)
                yield from (("link", product.asin), ("text", product.name), ("text", product.price_tag))
            return
        product = self._shop.product(self._product)
        yield "button", "< Prev"
        if self._page == "item":
            for option, values in product.options.items():
                yield "text", option
                yield from (("option", value) for value in values)
            yield from (("text", product.name), ("text", f"Price: {product.price_tag}"), ("text", "Rating: N.A."))
            yield from (("button", name) for name in ("Description", "Features", "Reviews", "Buy Now"))
        elif self._page == "description":
            yield "text", product.description
        elif self._page == "features":
            yield from (("text", f" {bullet}") for bullet in product.bullets)

    def _render(self) -> str:
        nodes = [(kind, shown) for kind, words in self._nodes() if (shown := _as_parsed(words))]
        if self.mode == "text":
            return SEPARATOR.join(words.strip() for _, words in nodes)
        url = f"{self._words.replace(' ', '+')}/{self._page_number}/{json.dumps(self._options)}"
        clicked, lines = [], []
        for kind, words in nodes:
            if kind == "option":
                chosen = f'"{words}"' in url  # so values with quotes or beyond ASCII never show as chosen
                if chosen:
                    clicked.append(f"You have clicked {words}.\n")
                mark = "clicked button" if chosen else "button"
                lines.append(f"  [{mark}] {words} [{mark}_]\n")
            elif kind == "link":
                mark = "clicked button" if words in self._visited else "button"
                lines.append(f"\n[{mark}] {words} [{mark}_]\n")
            else:
                lines.append(f"[button] {words} [button_]\n" if kind == "button" else f"{words}\n")
        return "".join([*reversed(clicked), *lines])

    def _render_end(self) -> str:
        """The page after the purchase, reward included, as in the original."""
        options = json.dumps(self._options, sort_keys=True)
        for character in "<>&'":
            options = options.replace(character, f"\\u{ord(character):04x}")
        nodes = ["Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)"]
        nodes += ["Purchased", "asin", self._shop.product(self._product).asin, "options", options]
        for name in ("attrs", "category", "query", "product category"):
            nodes += [name, "None"]
        nodes += ["Target", "asin", "options", "attrs", "price upper", "instuction text", "category"]
        nodes += ["product category", "query", "Goal ", "None", "Reward", "Your score (min 0.0, max 1.0)"]
        nodes.append(str(self.purchase.reward))
        nodes += ["Reward Details ", "None"]
        if self.mode == "text":
            return SEPARATOR.join(node.strip() for node in nodes)
        return "".join(f"{node}\n" for node in nodes)


def _as_parsed(words: str) -> str:
    """A text node after the original's HTML parser: only blanks become one blank, or nothing with a line break."""
    if words.strip(_BLANK):
        return words
    return "" if "\n" in words or not words else " "
