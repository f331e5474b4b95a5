"""Mistakes that a hasty player would make before a step, each refused by the world in its current state.

Three kinds, as in AgentRefine: parameter (the command in another form or with a wrong name), place (acting on something
elsewhere) and logic (skipping a condition). The thought after a mistake begins with what the refusal teaches (LESSONS).
`mistakes` lists the candidates before one step, `stage_mistakes` chooses among those of all steps.

Left out: playing them (teacher.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from agentrefine.player import Step, SyntheticPlayer
from envs.synthetic.spec import Spec, fill
from envs.synthetic.words import HELD, TRAIN
from envs.synthetic.world import Synthetic


class Mistake(NamedTuple):
    """An action that will be refused, its kind, and the thoughts with it (`thought`) and after it (`lesson`)."""

    kind: str
    thought: str
    action: str
    lesson: str


LESSONS = {  # event of the refusal -> what it teaches
    "unknown": "That is no command here. The form is: {form}.",
    "no_such": "There is no {name} for that. I mean the {right}.",
    "not_there": "I am not at the {place}.",
    "not_here": "The {object} is not here.",
    "middle": "I am at no place yet.",
    "shut": "The {place} is closed.",
    "opened": "The {place} is open already.",
    "there": "I am at the {place} already.",
    "locked": "The {place} is locked. I need the {tool}.",
    "full": "My hands are full.",
    "not_held": "I do not have the {object}.",
    "held": "I have the {object} already.",
    "fixed": "The {object} cannot be moved.",
    "needs_tool": "I need the {tool} for that.",
    "not_done": "The {object} must be {done} before that.",
    "too_early": "The {other} comes before the {object}.",
    "done": "The {object} is {done} already.",
}


def mistakes(
    spec: Spec, player: SyntheticPlayer, world: Synthetic, step: Step, after: Step | None, rng
) -> list[Mistake]:
    """Possible mistakes before `step`, with `after` as the step that follows it; the world refuses each of them."""
    candidates = [(kind, step.thought, text, right) for kind, text, right in misspelt(spec, step, rng)]
    candidates += [
        (kind, thought, spec.command(role, **values), "")
        for kind, thought, role, values in misplaced(spec, player, step, after)
    ]
    found = []
    for kind, thought, action, right in candidates:
        why = world.refusal(action)
        if why and why.kind == kind:
            lesson = fill(LESSONS[why.event], {**why.values, "right": right})
            if why.event == "unknown":
                lesson = lesson.replace("{form}", spec.commands[step.role])
            thought_after = step.thought if step.thought.startswith(lesson) else f"{lesson} {step.thought}"
            found.append(Mistake(kind=kind, thought=thought, action=action, lesson=thought_after))
    return found


def misspelt(spec: Spec, step: Step, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Parameter mistakes, as (kind, action, right name): the step's command in another form or with an unknown name."""
    texts = []
    words = HELD if spec.setting in {theme.setting for theme in HELD.themes} else TRAIN
    values = {**step.values, "verb": spec.repair[0] if step.role == "repair" else spec.work[0]}
    forms = [fill(form, values) for form in words.commands[step.role]]
    texts += [("parameter", form, "") for form in forms if "{" not in form]
    parts = spec.commands[step.role].split()
    texts += [
        ("parameter", fill(" ".join(parts[:i] + parts[i + 1 :]), step.values), "")
        for i, part in enumerate(parts)
        if "{" not in part and len(parts) > 2
    ]
    for name, value in step.values.items():
        kind, _, number = value.rpartition(" ")
        if number.isdigit():
            wrong = {f"{kind} {int(number) + rng.integers(1, 4)}", f"{kind} {rng.integers(1, 9)}"}
        else:
            others = [thing for theme in words.themes for thing in theme.things]
            wrong = {value.split()[-1], value.removesuffix("s"), others[rng.integers(len(others))]}
        texts += [
            ("parameter", spec.command(step.role, **{**step.values, name: other}), value) for other in sorted(wrong)
        ]
    return texts


def misplaced(
    spec: Spec, player: SyntheticPlayer, step: Step, after: Step | None
) -> list[tuple[str, str, str, dict[str, str]]]:
    """Place and logic mistakes, as (kind, thought, role, values); `mistakes` drops those that the world accepts."""
    found, here, values = [], player.at, step.values
    seen_here = sorted(name for name, where in player.found.items() if where == here)
    wanted = [goal.kind for goal in spec.goals if goal.kind not in spec.fixtures] + [spec.repair_tool, spec.work_tool]
    wanted = [name if name in spec.lies else f"{name} 1" for name in wanted if name]
    unseen = [name for name in wanted if name not in player.found and name not in player.hands and name in step.thought]
    if step.role == "go" and after and after.role in ("put", "work", "repair", "open", "take"):
        known = after.values.get("object", "")
        if after.role in ("open", "put", "work") or known in player.found:
            what = f"the {known or values['place']}"
            verb = {"work": spec.work[0], "repair": spec.repair[0]}.get(after.role, after.role)
            carry = f"I have {what}. I put it in the {values['place']}."
            thought = carry if after.role == "put" else f"I {verb} {what}."
            found.append(("place", thought, after.role, after.values))
    if step.role == "go" and here:
        found += [
            ("place", f"I need the {name}. I take it here.", "take", {"object": name, "place": here}) for name in unseen
        ]
        if len(player.hands) >= spec.hands:
            found += [
                ("logic", f"I see the {name}. I take it too.", "take", {"object": name, "place": here})
                for name in seen_here
            ]
    if step.role == "open":
        found += [
            (
                "logic",
                f"I need the {name}. It may be in the {here}. I take it.",
                "take",
                {"object": name, "place": here},
            )
            for name in unseen
        ]
        if after and after.role == "put":
            found.append(("logic", after.thought, "put", after.values))
    if step.role in ("take", "open", "put", "work", "repair"):
        found.append(("logic", f"I go to the {here}.", "go", {"place": here}))
    if step.role != "open" and here in player.opened:
        found.append(("logic", f"I open the {here}.", "open", {"place": here}))
    for name in player.hands:
        found.append(("logic", f"I take the {name}.", "take", {"object": name, "place": here}))
        if name in player.worked and step.role != "work":
            found.append(("logic", f"I {spec.work[0]} the {name}.", "work", {"object": name, "place": here}))
    if spec.repair_tool and spec.repair_tool not in player.hands:
        fixture = spec.goals[0].kind
        found.append(
            ("logic", f"I {spec.repair[0]} the {fixture}.", "repair", {"object": fixture, "tool": spec.repair_tool})
        )
    return found


def stage_mistakes(options: list[list[Mistake]], count: int, rng: np.random.Generator) -> dict[int, Mistake]:
    """Chooses `count` mistakes, at most one per step and as varied in kind as possible: {index of the step: mistake}.
    Empty if there are too few candidates."""
    chosen: dict[int, Mistake] = {}
    kinds = [str(kind) for kind in rng.permutation(["parameter", "place", "logic"])]
    for index in range(count):
        wanted = kinds[index % 3]
        for kind in (wanted, *kinds):
            steps = [i for i, found in enumerate(options) if i not in chosen and any(m.kind == kind for m in found)]
            if steps:
                step = int(rng.choice(steps))
                fitting = [mistake for mistake in options[step] if mistake.kind == kind]
                chosen[step] = fitting[rng.integers(len(fitting))]
                break
    return chosen if len(chosen) == count else {}
