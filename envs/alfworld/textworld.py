"""The reference engine: TextWorld with alfworld's names and grammar. Needs alfworld with TextWorld.

It takes seconds per game and cannot be pickled; our engine (engine.py) is tested against it.
Left out: progress towards the goal: a game is only won or not.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

BANNER = "-= Welcome to TextWorld, ALFRED! =-\n\n"


class TextWorldGame:
    """One game, with the methods of `engine.Game`."""

    def __init__(self, data: dict[str, str], grammar: str):
        environment = dict(os.environ)
        # Importing alfworld sets $ALFWORLD_DATA and makes that folder: name an existing one, then restore the variable.
        os.environ["ALFWORLD_DATA"] = str(Path(__file__).parent)
        try:
            import textworld
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld.envs.pddl import PddlEnv

            self._env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
        except ImportError as error:
            raise ImportError(
                f"engine 'textworld' needs alfworld with TextWorld ({error}): install the Debian packages cmake and "
                "g++, then `pip install alfworld==0.4.2`; or play with engine 'ours'"
            ) from error
        finally:
            os.environ.clear()
            os.environ.update(environment)
        self._env.load(old_wording(data) if grammar == "0.3" else data)
        self._state = self._env.reset()
        self.text = self._state.feedback.removeprefix(BANNER)
        self.task = self.text.partition("Your task is to: ")[2].strip().removesuffix(".")

    def act(self, command: str) -> str | None:
        valid = command in self._state["admissible_commands"]
        self._state, _, _ = self._env.step(command)
        return self._state.feedback if valid else None

    def actions(self) -> list[str]:
        return list(self._state["admissible_commands"])

    def conditions(self) -> tuple[int, int]:
        return int(self._state["won"]), 1


def old_wording(data: dict[str, str]) -> dict[str, str]:
    """The game as alfworld 0.3.5 writes it: three wordings differ, and there is no `help`."""
    words = data["grammar"].replace('"You arrive at {r.name}.', '"You arrive at {lend.name}.')
    words = words.replace("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}.")
    words = words.replace('"move {o} to {r}"', '"put {o} in/on {r}"')
    domain = re.sub(r"\(:action help.*", ")", data["pddl_domain"], flags=re.DOTALL)
    return {**data, "grammar": words, "pddl_domain": domain}
