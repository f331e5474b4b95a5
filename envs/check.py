"""Does a world keep the contract (base.py)? One line per property: ok, what is wrong, or what could not be checked.

    python -m envs.check ~/keys/world.py:Keys
    python -m envs.check babyai --panel babyai_easy --limit 3

Plays some tasks at random, with sensible and with senseless actions. Exits with status 1 if a property does not hold.
Of a world of your own it also looks at both splits, train and test, and for tasks of one in the other.
The project's own worlds are tested by the same functions (tests/test_worlds.py).
Left out: deadlines; a world with `isolated` runs in this process here, and need not be picklable.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import functools
import inspect
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import tyro

from artifacts.cli import Range, run_main
from envs.base import Result, World, ask, content_alone
from envs.make import make_world, own_world
from envs.own import explained, methods, why
from envs.panel import default_panels, pick_tasks
from envs.wording import form, numbered

BAD_TEXTS = ("", " ", "\n", "\x00", "think: I look", "\u2028\u2029", "\ud800", "é" * 3, "go " * 5000, "{0}%s", "[]")
WORDS = ("chair", "bench", "red oak", "black tea")  # complete an open action
STEPS = 400  # of a random play that looks for the end of a task
SPLITS = ("train", "test")  # that the stages play by default in a world of the user's
COMPARED = 200  # tasks of each of them, by their content


class Case(NamedTuple):
    """A world by how it is made, tasks of it, and how often its first task is played at random to see an end. `splits`
    that it has are looked at too."""

    make: Callable[[], World]
    tasks: Sequence[str]
    plays: int = 20
    splits: Sequence[str] = ()


class Broken(Exception):
    """A property does not hold; says what was got and what was expected."""


def expect(holds: bool, sentence: str) -> None:
    if not holds:
        raise Broken(sentence)


def expect_raised(error: type[Exception], naming: str, call: Callable[[], Any], what: str) -> None:
    """Raises Broken unless the call raises that error and its sentence names the word."""
    try:
        value = call()
    except (Exception, SystemExit) as raised:  # a blanket except: the world is a program
        good = isinstance(raised, error) and naming in str(raised)
        expect(
            good, f"{what} raised {raised!r:.200}; expected a {error.__name__} whose sentence has the word {naming!r}"
        )
    else:
        raise Broken(
            f"{what} returned {value!r:.200}; expected a {error.__name__} whose sentence has the word {naming!r}"
        )


def complete(action: str, word: str = WORDS[0]) -> str:
    """The action itself, or, where it ends in an opening bracket, one that it stands for."""
    return f"{action}{word}]" if action.endswith("[") else action


def random_play(world: World, task_id: str, steps: int, seed: int = 0) -> list[tuple[str, Result]]:
    """Plays a task at random, a fifth of it with bad texts, and returns (action, result) pairs."""
    rng = random.Random(seed)
    ask(world, "reset", task_id)
    played = []
    for _ in range(steps):
        action = complete(rng.choice(ask(world, "actions")), rng.choice(WORDS))
        action = rng.choice(BAD_TEXTS) if rng.random() < 0.2 else action
        played.append((action, ask(world, "step", action)))
        if played[-1][1].done:
            break
    return played


def ending(world: World, task_id: str, plays: int) -> list[str]:
    """The accepted actions of a random play that ended, solved if any was; none if no play came to an end."""
    found: list[str] = []
    for seed in range(plays):
        played = random_play(world, task_id, STEPS, seed)
        if played[-1][1].done and (not found or played[-1][1].success):
            found = [action for action, result in played if result.valid]
        if played[-1][1].success:
            return found
    return found


def state(world: World) -> dict[str, bytes]:
    """A world's attributes, those in slots too, pickled; nothing for an isolated one."""
    held = None if world.isolated else object.__getstate__(world)  # a dictionary, or also one of slots
    parts = held if isinstance(held, tuple) else (held,)
    return {name: pickle.dumps(value) for part in parts for name, value in (part or {}).items()}


def has_split(world: World, split: str) -> bool:
    try:
        world.tasks(split)
    except ValueError:
        return False
    return True


# ---- the properties: each raises, returns what it could not check, or None -------------------------------------------


def has_the_protocol_s_methods(case: Case) -> None:
    """It has the methods of envs.base.World, with their parameters."""
    world = case.make()
    for name, wanted in methods(World).items():
        got = list(inspect.signature(getattr(world, name)).parameters)
        expect(got == wanted, f"{name}({', '.join(got)}); expected {name}({', '.join(wanted)})")


def lists_its_tasks(case: Case) -> None:
    """Task ids are sorted and unique, begin with their split, and are the same in every instance."""
    splits = {task_id.partition("/")[0] for task_id in case.tasks}
    for split in sorted(splits | {split for split in case.splits if has_split(case.make(), split)}):
        ids = list(case.make().tasks(split))
        expect(ids == sorted(set(ids)), f"tasks({split!r}) begins {ids[:5]}; expected sorted, unique ids")
        strange = [task_id for task_id in ids if not task_id.startswith(f"{split}/")]
        expect(not strange, f"tasks({split!r}) has {strange[:1]}; expected ids that begin with {split}/")
        other = sorted({*ids} ^ {*case.make().tasks(split)})
        expect(not other, f"tasks({split!r}) of another instance differs by {other[:3]}; expected the same ids")
        left_out = case.make().left_out(split)
        good = isinstance(left_out, Mapping) and not set(left_out) & set(ids)
        expect(good, f"left_out({split!r}) is {left_out!r:.200}; expected {{id: reason}} of tasks that are not listed")


def names_what_it_does_not_know(case: Case) -> None:
    """An unknown split or task is a ValueError that names it."""
    world = case.make()
    for method in ("tasks", "left_out"):
        expect_raised(
            ValueError, "nosuchsplit", lambda m=method: getattr(world, m)("nosuchsplit"), f"{method}('nosuchsplit')"
        )
    expect_raised(ValueError, "nosuchtask", lambda: world.reset("nosuchtask"), "reset('nosuchtask')")
    expect_raised(ValueError, "nosuchtask", lambda: world.fingerprint(["nosuchtask"]), "fingerprint(['nosuchtask'])")


def has_a_fingerprint_of_its_tasks(case: Case) -> None:
    """The fingerprint is a sha256 of tasks in any order, whatever was played before."""
    world, ids = case.make(), list(case.tasks)
    first = world.fingerprint(ids)
    expect(isinstance(first, str) and len(first) == 64, f"fingerprint is {first!r:.200}; expected a sha256 in hex")
    again = case.make().fingerprint([*ids, *reversed(ids)])
    expect(again == first, "fingerprint differs with the order of the ids; expected the same (envs.base.content_hash)")
    if len(ids) > 1:
        different = len({first, world.fingerprint(ids[1:]), world.fingerprint(ids[:1])}) == 3
        expect(different, "fingerprint is the same for other tasks; expected another one for each set of tasks")
    random_play(world, ids[0], 5)
    expect(world.fingerprint(ids) == first, "fingerprint is another one after some play; expected the same")


def needs_a_reset_first(case: Case) -> None:
    """Before the first reset, step, actions and commands are a RuntimeError."""
    world = case.make()
    for what, call in (("step", lambda: world.step("look")), ("actions", world.actions), ("commands", world.commands)):
        expect_raised(RuntimeError, "reset", call, f"{what} before any reset")


def opens_with_the_task(case: Case) -> None:
    """The opening contains the task, as it is in `task`."""
    world = case.make()
    for task_id in case.tasks:
        opening = ask(world, "reset", task_id)
        good = bool(opening.task) and opening.task in opening.text
        expect(good, f"the opening of {task_id} is {opening.text!r:.300}; expected the task in it, {opening.task!r}")


def accepts_what_it_lists(case: Case) -> None:
    """Every listed action is accepted; the list is sorted and unique."""
    world, rng = case.make(), random.Random(3)
    ask(world, "reset", case.tasks[0])
    for _ in range(12):
        actions = ask(world, "actions")
        expect(actions == sorted(set(actions)), f"actions() is {actions!r:.300}; expected sorted, unique actions")
        for action in () if world.isolated else actions:
            valid = ask(pickle.loads(pickle.dumps(world)), "step", complete(action)).valid
            expect(valid, f"{complete(action)!r} is listed by actions() and not valid; expected it to be accepted")
        action = complete(rng.choice(actions))
        result = ask(world, "step", action)
        expect(result.valid, f"{action!r} is listed by actions() and not valid; expected it to be accepted")
        if result.done:
            break


def covers_actions_by_commands(case: Case) -> None:
    """Every action matches a template of commands(), which stay the same through a task."""
    world = case.make()
    for task_id in case.tasks:
        ask(world, "reset", task_id)
        commands, rng = list(world.commands()), random.Random(7)
        expect(
            bool(commands) and len(set(commands)) == len(commands),
            f"commands() is {commands!r:.300}; expected one template or more, each different",
        )
        forms = [form(numbered(command)) for command in commands]
        for _ in range(30):
            now = list(world.commands())
            expect(
                now == commands,
                f"commands() of {task_id} was {commands!r:.150} and is {now!r:.150}; expected no change",
            )
            actions = [complete(action, rng.choice(WORDS)) for action in ask(world, "actions")]
            strange = [action for action in actions if not any(each.fullmatch(action) for each in forms)]
            expect(not strange, f"{strange[:1]} matches no template of commands(): {commands!r:.300}")
            if ask(world, "step", rng.choice(actions)).done:
                break


def bears_any_text(case: Case) -> None:
    """A senseless action is not valid, changes nothing, and gets an answer."""
    world = case.make()
    ask(world, "reset", case.tasks[0])
    if ask(world, "step", complete(ask(world, "actions")[0])).done:  # a task of one turn
        ask(world, "reset", case.tasks[0])
    for text in BAD_TEXTS:
        actions, before = ask(world, "actions"), state(world)
        result = ask(world, "step", text)
        got = (
            f"step({text!r:.40}) gave valid {result.valid}, done {result.done}, observation {result.observation!r:.80}"
        )
        expect(
            not result.valid and not result.done and bool(result.observation), f"{got}; expected False, False, a text"
        )
        expect(ask(world, "actions") == actions, f"step({text!r:.40}) changed what actions() lists; expected no change")
        changed = [name for name, value in state(world).items() if value != before.get(name)]
        expect(
            not changed, f"step({text!r:.40}) changed {', '.join(changed)}; expected it to leave the state as it was"
        )


def stays_in_range(case: Case) -> None:
    """Progress never falls; success ends the task, with progress 1."""
    world = case.make()
    for task_id in case.tasks:
        progress = 0.0
        for action, result in random_play(world, task_id, 60):
            expect(result.progress >= progress, f"progress of {task_id} fell from {progress} to {result.progress}")
            good = not result.success or (result.done and result.progress == 1.0)
            expect(
                good, f"{action!r} gave success with done {result.done}, progress {result.progress}; expected True, 1.0"
            )
            progress = result.progress


def repeats_itself(case: Case) -> None:
    """The same actions have the same results, whatever else is alive."""
    alone = [random_play(case.make(), task_id, 25) for task_id in case.tasks]
    worlds = [case.make() for _ in case.tasks]
    for world, task_id in zip(worlds, case.tasks, strict=True):
        ask(world, "reset", task_id)
    for turn in range(25):
        for world, task_id, played in zip(worlds, case.tasks, alone, strict=True):
            if turn < len(played):
                action, before = played[turn]
                now = ask(world, "step", action)
                expect(now == before, f"{action!r} in {task_id} gave {before!r:.300} and, played again, {now!r:.300}")


def is_picklable(case: Case) -> str | None:
    """Pickled at any time, it continues where it was."""
    world, task_id = case.make(), case.tasks[0]
    if world.isolated:
        return "an isolated world need not be picklable"
    played = random_play(world, task_id, 20)
    split = task_id.partition("/")[0]
    expect(
        list(pickle.loads(pickle.dumps(case.make())).tasks(split)) == list(world.tasks(split)),
        "tasks differ if pickled",
    )
    again = case.make()
    ask(again, "reset", task_id)
    for action, result in played:
        again = pickle.loads(pickle.dumps(again))
        now = ask(again, "step", action)
        expect(now == result, f"{action!r} gave {result!r:.300} and, after pickling, {now!r:.300}; expected the same")
    return None


def starts_afresh(case: Case) -> None:
    """A reset begins anew: the same opening and actions as the first time."""
    world, task_id = case.make(), case.tasks[0]
    first = ask(world, "reset", task_id), ask(world, "actions")
    random_play(world, task_id, 20)
    again = ask(world, "reset", task_id), ask(world, "actions")
    expect(again == first, f"{task_id} begins with {first!r:.300} and, after some play, with {again!r:.300}")


def ends_for_good(case: Case) -> str | None:
    """After the end, a step is a RuntimeError; a solved task has reward 1 and progress 1."""
    world, task_id = case.make(), case.tasks[0]
    solution = ending(world, task_id, case.plays)
    if not solution:
        return f"{case.plays} random plays of {task_id} came to no end (--plays)"
    ask(world, "reset", task_id)
    results = [ask(world, "step", action) for action in solution]
    early = [result for result in results[:-1] if result.done or result.success]
    expect(results[-1].done and not early, f"the same accepted actions ended {task_id} once and now do not")
    last = results[-1]
    expect(
        not last.success or last.reward == last.progress == 1.0,
        f"a solved task has {last}; expected reward and progress 1",
    )
    expect_raised(RuntimeError, "reset", lambda: world.step(solution[-1]), "step after the end")
    return None if last.success else f"{case.plays} random plays of {task_id} ended, but none in success (--plays)"


def tests_on_other_tasks(case: Case) -> str | None:
    """No task of test is a task of train under another id."""
    world, found = case.make(), []
    for split in SPLITS:
        if not has_split(world, split):
            return f"the world has no split {split}"
        ids, by_content = list(world.tasks(split))[:COMPARED], {}
        for task_id in ids:
            with content_alone():
                same = by_content.setdefault(world.fingerprint([task_id]), task_id)
            if same != task_id:  # perhaps the id decides the content
                return f"the fingerprint tells {same} and {task_id} apart by their ids alone"
        found.append(by_content)
    train, test = found
    for content, task_id in test.items():
        same = train.get(content)
        expect(same is None, f"{task_id} has the content of {same} by the fingerprint; expected one not trained on")
    return None


PROPERTIES = (
    has_the_protocol_s_methods,
    lists_its_tasks,
    names_what_it_does_not_know,
    has_a_fingerprint_of_its_tasks,
    needs_a_reset_first,
    opens_with_the_task,
    accepts_what_it_lists,
    covers_actions_by_commands,
    bears_any_text,
    stays_in_range,
    repeats_itself,
    is_picklable,
    starts_afresh,
    ends_for_good,
)
OWN_PROPERTIES = (*PROPERTIES, tests_on_other_tasks)  # of a world of the user's


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Args:
    world: tyro.conf.Positional[str]
    """World: a name, or FILE.py:CLASS for one of your own."""
    data: str | None = None
    """Folder with the world's data (default: as in play)."""
    panel: str | None = None
    """Tasks to try: a panel, a file FILE.txt, or a split (default: the panel that evaluate.py would play)."""
    limit: Annotated[int, Range(1)] = 5
    """Number of tasks, spread evenly over the panel."""
    plays: Annotated[int, Range(1, 10_000)] = 20
    """Random plays of one task, to see it end."""


def verdict(hold: Callable[[Case], str | None], case: Case) -> tuple[str, str]:
    """ok, wrong or ? (not checked), and why."""
    try:
        note = hold(case)
    except Broken as broken:
        return "wrong", str(broken)
    except (Exception, SystemExit) as error:  # a blanket except: the world is a program
        return "wrong", why(error, inspect.getfile(type(case.make())))
    return ("?", f"not checked, {note}") if note else ("ok", "")


def main(args: Args) -> None:
    make, own = functools.partial(make_world, args.world, data=args.data), own_world(args.world)
    panel = args.panel or default_panels("evaluate", args.world, args.data)[0]
    with explained(own):
        tasks, _ = pick_tasks(panel, args.limit, make())
    case, found = Case(make=make, tasks=tasks, plays=args.plays, splits=SPLITS if own else ()), Counter()
    print(f"{args.world}, {len(tasks)} tasks of {panel}:")
    for hold in OWN_PROPERTIES if own else PROPERTIES:
        how, reason = verdict(hold, case)
        said = hold.__doc__.removesuffix(".")
        print(f"{how:<7}{said}: {reason}" if reason else f"{how:<7}{said}", flush=True)
        found[how] += 1
    print(", ".join(f"{how}: {found[how]}" for how in ("ok", "wrong", "?") if found[how]))
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    run_main(main, Args, __doc__)
