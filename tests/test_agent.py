"""The play loop with scripted policies on generated games: the sampling rule, faults, and independence of order."""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from pathlib import Path

import pytest

from agent.attempt import MAX_THOUGHTS, AttemptSettings, Compose, Job, sample_action, template_reason
from agent.loop import FIRST, PlayLoop, Rates
from agent.policy import NoReply
from agent.scripted import DemonstratorScript, ReplayScript, ScriptedPolicy
from artifacts.seeds import generator
from envs.alfworld.rooms import family
from envs.alfworld.world import AlfWorld
from envs.panel import require_tasks
from envs.webshop import demonstrator as webshop_demonstrator
from envs.webshop.generate import ensure_catalogue
from envs.webshop.world import WebShop
from prompts.make import SHOWN, examples
from tests.support.rooms import TASK, Room


def settings(**changes):
    fields = {"env": "alfworld", "stage": "test", "round": 1, "seed": 0, "max_turns": 12, "patience": 0}
    return AttemptSettings(**({"temperature": 0.0} | fields | changes))


def run(lines, actre=None, jobs=None, world=Room, **changes):
    """Plays Room with the given lines and returns the trajectories."""
    react = ScriptedPolicy(lambda opening: ReplayScript(lines))
    explainer = ScriptedPolicy(lambda opening: ReplayScript(actre)) if actre else None
    jobs = jobs or [Job(TASK, 0)]
    return list(PlayLoop(jobs, settings(**changes), world, react, explainer))


def test_thoughts_are_joined_and_the_action_ends_the_turn():
    (t,) = run([" think[One.]\n", " think[Two.]\n", " act[wave]\n", " act[win]\n"])
    assert [(x.thought, x.action, x.valid) for x in t.turns] == [("One.\nTwo.", "wave", True), ("", "win", True)]
    assert t.success and t.end == "success" and t.reward == t.progress == 1.0 and t.source == "react"


def test_one_thought_too_many_is_an_invalid_action():
    (t,) = run([" think[x]\n"] * (MAX_THOUGHTS + 1) + [" act[win]\n"])
    assert not t.turns[0].valid and t.turns[0].thought.count("x") == MAX_THOUGHTS and t.success


def test_turns_end_and_a_full_context_ends():
    (t,) = run([" act[wave]\n"] * 99)
    assert (t.end, len(t.turns), t.success) == ("max_turns", 12, False)
    (t,) = run([" act[wave]\n"] * 3)  # the replay runs dry, which is how a policy says that its context is full
    assert (t.end, len(t.turns)) == ("context_full", 3)


def test_patience_ends_an_attempt_that_goes_in_circles():
    (t,) = run([" act[look]\n"] + [" act[wave]\n"] * 99, patience=3)
    assert (t.end, [x.action for x in t.turns]) == ("stuck", ["look"] + ["wave"] * 4)
    (t,) = run([" act[wave]\n", " act[wave]\n", " act[look]\n"] * 4, patience=2)  # never three alike in a row
    assert (t.end, len(t.turns)) == ("max_turns", 12)
    (t,) = run([" act[no]\n"] * 3 + [" act[win]\n"], patience=3, compose=Compose(probability=0.0, reason="empty"))
    assert t.end == "success"  # the forced action comes before the patience ends


class Flaky(Room):
    """Rooms that fail: of all that are made, `failing` many, in `where`."""

    made, failing, where = 0, 0, "step"

    def __init__(self):
        type(self).made += 1
        self.fails = self.made <= self.failing

    def reset(self, task_id):
        if self.fails and self.where == "reset":
            raise OSError("the server is gone")
        return super().reset(task_id)

    def step(self, action):
        if self.fails and self.where == "step":
            raise OSError("the server is gone")
        return super().step(action)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_a_world_that_fails_once_is_played_again_in_a_new_one(where):
    world = type("World", (Flaky,), {"failing": 1, "where": where})
    (t,) = run([" act[win]\n"], world=world)
    assert t.success and world.made == 2


@pytest.mark.parametrize("where", ["reset", "step"])
def test_a_world_that_breaks_is_evidence_not_a_crash(where):
    world = type("World", (Flaky,), {"failing": 9, "where": where})
    (t,) = run([" act[wave]\n"], world=world)
    assert t.end == "env_error" and not t.success and not t.turns and world.made == 2
    (t,) = run([" act[wave]\n", " act[break]\n"])
    assert t.end == "env_error" and not t.success and len(t.turns) == 1


def test_games_that_cannot_be_read_do_not_stop_a_stage_in_which_others_can():
    class Picky(Room):
        def reset(self, task_id):
            if task_id.endswith("bad"):
                raise ValueError("cannot read the game")
            return super().reset(task_id)

    good, bad = [Job(TASK, 0)], [Job(f"{TASK}bad", trial) for trial in range(30)]
    done = run([" act[win]\n"], jobs=good + bad, world=Picky)
    assert Counter(t.end for t in done) == {"success": 1, "env_error": 30}
    with pytest.raises(ValueError, match="no world starts(.|\n)*cannot read the game"):
        run([" act[win]\n"], jobs=bad + good, world=Picky)


def test_an_attempt_ends_at_its_deadline():
    class Slow(Room):
        def step(self, action):
            time.sleep(0.25)
            return super().step(action)

    (t,) = run([" act[wave]\n"] * 12, world=Slow, deadline=0.6)
    assert t.end == "timeout" and 2 <= len(t.turns) <= 3
    (t,) = run([" act[wave]\n"] * 12, world=Slow, deadline=0.0)
    assert t.end == "timeout" and not t.turns
    (t,) = run([" act[wave]\n"] * 12, world=Slow, deadline=30.0)
    assert t.end == "max_turns"


class Mute(ScriptedPolicy):
    """Its first session's lines do not come while it is `mute`."""

    def __init__(self, slots=64):
        super().__init__(lambda opening: ReplayScript([" act[wave]\n", " act[win]\n"]), slots)
        self.mute, self.closed = True, []

    def open(self, text):
        assert len(self._scripts) < self.slots, "more sessions than slots"
        return super().open(text)

    def poll(self, wait=True):
        held = [session for session in self._asked if session == 1 and self.mute]
        self._asked = [session for session in self._asked if session not in held]
        came = super().poll(wait)
        self._asked = held
        return came

    def close(self, session):
        assert session not in self._asked, "an asked session was closed"
        self.closed.append(session)
        return super().close(session)


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_the_deadline_ends_the_wait_for_a_line_and_its_slot_is_free_when_the_line_comes(slots):
    done, policy = [], Mute(slots)
    jobs = [Job(TASK, trial) for trial in range(4)]
    for trajectory in PlayLoop(jobs, settings(deadline=2.0), Room, policy):
        done.append(trajectory)
        policy.mute = policy.mute and trajectory.trial != 0
    ends = {t.trial: (t.end, len(t.turns), t.ids) for t in done}
    assert ends == {0: ("timeout", 0, [])} | {trial: ("success", 2, []) for trial in (1, 2, 3)}
    assert slots > 1 or policy.closed == [1, 2, 3, 4]


def test_a_sessions_line_that_never_comes_does_not_keep_the_stage():
    policy = Mute()
    done = list(PlayLoop([Job(TASK, 0)], settings(deadline=0.1), Room, policy))
    assert [t.end for t in done] == ["timeout"] and policy.closed == []


class Remote(ScriptedPolicy):
    """A server: each session has the next of `scripts`. `known`: what it wrote in earlier runs had the form."""

    remote = True

    def __init__(self, scripts, known=False):
        scripts = iter(scripts)
        super().__init__(lambda opening: ReplayScript(next(scripts)), slots=2)
        self.known = known

    def knows_the_form(self):
        return self.known


PROSE, JOBS = [" Sure! I will look around.\n"] * 12, [Job(TASK, trial) for trial in range(FIRST + 4)]


def test_a_server_whose_first_lines_are_prose_stops_the_stage_with_one_of_them_and_scores_nothing():
    for jobs, said in ((JOBS, f"first {FIRST} attempts"), (JOBS[:3], "first 3 attempts"), (JOBS[:1], "first attempt")):
        loop, done = PlayLoop(jobs, settings(), Room, Remote([PROSE] * 99)), []
        with pytest.raises(ValueError, match=f"no line of the {said} .*I will look around.*--prompt"):
            done.extend(loop)
        assert done == []


@pytest.mark.parametrize(
    "good",
    [[" think[I look.]\n", *PROSE], [" act[no]\n", *PROSE], [" look\n", *PROSE]],
    ids=["a thought", "a command", "a valid action without its form"],
)
@pytest.mark.parametrize("at", [0, FIRST - 1])
def test_one_line_that_can_be_played_is_enough_and_nothing_is_lost(good, at):
    scripts = [PROSE] * at + [good] + [PROSE] * 99
    done = list(PlayLoop(JOBS, settings(patience=1), Room, Remote(scripts)))
    assert sorted(t.trial for t in done) == list(range(len(JOBS))) and {t.end for t in done} == {"stuck"}


def test_lines_of_earlier_runs_tell_that_a_server_knows_the_form_and_jobs_that_are_added_are_played():
    loop, done = PlayLoop(JOBS[:2], settings(), Room, Remote([PROSE] * 99, known=True)), []
    for trajectory in loop:
        done.append(trajectory.trial)
        loop.add(JOBS[2:4] if trajectory.trial == 1 else [])
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "lines, why", [([NoReply("the reply was cut off")], "cut off"), ([], "the context is full before the first line")]
)
def test_a_server_that_writes_no_line_stops_the_stage_with_the_reason(lines, why):
    with pytest.raises(ValueError, match=f"the first {FIRST} attempts got no line from the agent: .*{why}"):
        list(PlayLoop(JOBS, settings(), Room, Remote([lines] * 99)))


def test_what_says_nothing_of_a_servers_lines_is_not_held_back():
    """Sampled actions alone, worlds that fail, attempts past their deadline; and local models may write anything."""
    compose = Compose(probability=1.0, reason="empty")
    assert len(list(PlayLoop(JOBS, settings(compose=compose), Room, Remote([PROSE] * 99)))) == len(JOBS)
    world = type("World", (Flaky,), {"failing": 99, "where": "reset"})
    assert [t.end for t in PlayLoop(JOBS[:2], settings(), world, Remote([PROSE] * 99))] == ["env_error"] * 2
    assert [t.end for t in PlayLoop(JOBS[:2], settings(deadline=0.0), Room, Remote([PROSE] * 99))] == ["timeout"] * 2
    assert len(run(PROSE, jobs=JOBS)) == len(JOBS)


def test_actre_is_asked_while_the_agent_is():
    """At some moment both have lines to write: neither waits for the other."""
    waiting = []

    class Watched(ScriptedPolicy):
        def poll(self, wait=True):
            waiting.append((self, len(self._asked)))
            return super().poll(wait)

    react, actre = (
        Watched(lambda opening, line=line: ReplayScript([line] * 99)) for line in (" act[wave]\n", " [Because.]\n")
    )
    jobs = [Job(TASK, trial) for trial in range(20)]
    list(PlayLoop(jobs, settings(compose=Compose(probability=0.5)), Room, react, actre))
    both = [one[1] and other[1] for one, other in itertools.pairwise(waiting) if one[0] is not other[0]]
    assert any(both)


def test_what_has_finished_is_handed_over_before_another_attempt_breaks():
    """All reach their last turn in the same pass; the fourth breaks there, and the first three are not lost."""

    class Breaks(Room):
        steps = 0

        def step(self, action):
            Breaks.steps += 1
            if Breaks.steps == 10:
                raise KeyboardInterrupt
            return super().step(action)

    done, policy = [], ScriptedPolicy(lambda opening: ReplayScript([" act[wave]\n", " act[win]\n"]))
    with pytest.raises(KeyboardInterrupt):
        for trajectory in PlayLoop([Job(TASK, trial) for trial in range(6)], settings(), Breaks, policy):
            done.append(trajectory)
    assert [t.trial for t in done] == [0, 1, 2]


def test_rates_count_what_a_client_without_a_cache_would_send():
    rates = Rates([])
    rates.count_session([0] * 10 + [1] * 3 + [0] * 4 + [1] * 2 + [0] * 5)  # asked at 10 and at 17; 14 were computed
    assert (rates.sent, rates.kept) == (27, 13)
    rates.count_session([0] * 4)  # never asked
    assert rates.summary()["prefix_reuse"] == round(13 / 27, 4)


def test_rates_of_a_server_and_shares_of_waiting():
    class Slow(Room):
        def step(self, action):
            time.sleep(0.02)
            return super().step(action)

    policy = ScriptedPolicy(lambda opening: ReplayScript([" act[wave]\n", " act[win]\n"]))
    policy.counts = {"prompt_tokens": 100, "cached_tokens": 50, "completion_tokens": 7}  # of an earlier stage
    loop = PlayLoop([Job(TASK, 0)], settings(), Slow, policy)
    for _ in loop:
        policy.counts = {"prompt_tokens": 300, "cached_tokens": 200, "completion_tokens": 9}
    time.sleep(0.1)  # what a stage does afterwards does not count
    rates = loop.rates.summary()
    assert rates["prefix_reuse"] == 0.75 and rates["tokens_per_second"] > 0 and rates["trajectories_per_hour"] > 0
    assert rates["waiting_for_worlds"] > 0.5 > rates["waiting_for_model"]


def test_three_invalid_actions_force_a_sampled_one_explained_by_actre():
    compose = Compose(probability=0.0)
    (t,) = run([" act[no]\n"] * 3 + [" act[win]\n"], actre=[" [Because.]\n"], compose=compose)
    assert [x.action_by for x in t.turns] == ["react"] * 3 + ["sampled", "react"]
    assert t.turns[3].thought == "Because." and t.turns[3].thought_by == "actre" and t.turns[3].valid
    assert t.source == "actre" and t.success
    never = Compose(probability=0.0, max_invalid=0, reason="empty")  # mere resampling
    (t,) = run([" act[no]\n"] * 5 + [" act[win]\n"], compose=never)
    assert [x.action_by for x in t.turns] == ["react"] * 6 and t.success


def test_probability_one_samples_every_action_and_the_templates_need_no_actre():
    for reason, thought in (("template", template_reason), ("empty", lambda action: "")):
        (t,) = run([], compose=Compose(probability=1.0, reason=reason))
        assert len(t.turns) == 12 and all(x.action_by == "sampled" for x in t.turns)
        assert all(x.thought == thought(x.action) for x in t.turns)


def test_probability_is_a_probability():
    jobs = [Job(TASK, trial) for trial in range(60)]
    done = run([" act[wave]\n"] * 99, jobs=jobs, compose=Compose(probability=0.25, reason="empty"))
    share = sum(x.action_by == "sampled" for t in done for x in t.turns) / sum(len(t.turns) for t in done)
    assert 0.19 < share < 0.31  # 720 draws: 4 standard deviations


def test_verbs_first_evens_out_the_verbs():
    actions = [f"go to drawer {n}" for n in range(9)] + ["look"]
    counts = {
        how: Counter(sample_action(actions, how, generator(0, k), "a task") for k in range(400))["look"]
        for how in ("commands", "verbs")
    }
    assert 20 < counts["commands"] < 65 and 160 < counts["verbs"] < 240


def test_an_open_action_is_completed_with_words_of_the_task():
    task = 'Find me a red, 28" x 28" pillow'
    actions = ["click[next >]", "click[< prev]", "search["]
    drawn = [sample_action(actions, "verbs", generator(1, k), task) for k in range(300)]
    searches = [action[7:-1].split() for action in drawn if action.startswith("search[")]
    assert 110 < len(searches) < 190 and set(drawn) > {"click[next >]", "click[< prev]"}
    words = ["find", "me", "a", "red", "28", "x", "28", "pillow"]
    assert {len(search) for search in searches} == {1, 2, 3, 4, 5, 6}
    for search in searches:
        rest = iter(words)
        assert all(word in rest for word in search), search  # in the task's order


def games():
    return AlfWorld().tasks(f"{family()}_valid")[:12]


def test_order_and_slots_change_no_trajectory():
    jobs = [Job(task, trial) for task in games()[:6] for trial in range(2)]
    compose = Compose(probability=0.3, reason="template")

    def collect(jobs, slots):
        policy = ScriptedPolicy(DemonstratorScript, slots=slots)
        return {t.key: t for t in PlayLoop(jobs, settings(compose=compose, max_turns=25), AlfWorld, policy)}

    first = collect(jobs, 64)
    assert len(first) == 12 and first == collect(jobs[::-1], 3)
    assert first[jobs[0]].turns != first[jobs[1]].turns  # another trial, other draws


def test_the_demonstrator_wins_through_the_session_text():
    jobs = [Job(task, 0) for task in games()]
    done = list(PlayLoop(jobs, settings(max_turns=90), AlfWorld, ScriptedPolicy(DemonstratorScript)))
    assert all(t.success for t in done) and all(x.thought for t in done for x in t.turns)


def test_missing_tasks_are_named():
    with pytest.raises(ValueError, match="1 of 1 tasks cannot be played: gen_train/no"):
        require_tasks(Room(), ["gen_train/no"])


@pytest.mark.parametrize("env", SHOWN)
def test_prompts_are_what_the_demonstrator_plays(env, monkeypatch):
    monkeypatch.setenv("WEBSHOP_DATA", "/nowhere")  # whatever data is at hand, examples are of what is generated
    for role, text in examples(env).items():
        assert (Path(__file__).parent.parent / f"prompts/{env}_{role}.txt").read_text() == text


def test_the_customer_buys_through_the_session_text(tmp_path):
    """Composed, too: it goes on after sampled actions that it reads in the session, and every turn has a thought."""
    shop, done = str(ensure_catalogue(tmp_path / "shop")), []
    tasks = WebShop(shop).tasks("gen_demo")[::150]
    compose = Compose(probability=0.2, reason="template")
    policy = ScriptedPolicy(functools.partial(DemonstratorScript, player=webshop_demonstrator.Demonstrator))
    for rule in (None, compose):
        how = settings(compose=rule, max_turns=40)
        done += PlayLoop([Job(task, 0) for task in tasks], how, lambda: WebShop(shop), policy)
    alone, displaced = done[: len(tasks)], done[len(tasks) :]
    assert sum(t.success for t in alone) >= 10 and all(t.end in ("success", "finished") for t in done)
    assert any(turn.action_by == "sampled" for t in displaced for turn in t.turns)
    assert all(turn.thought and turn.valid for t in done for turn in t.turns)
