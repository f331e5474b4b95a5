"""Two vocabularies for synthetic worlds: one to train on, one held out.

They share no content word: no noun, verb, adjective, placeholder or answer wording. Both may use FUNCTION_WORDS.
Left out: how a world is drawn from a vocabulary (`spec.py`).

In a template, {place}, {object}, {tool}, {other}, {station} and {name} are names; {things} is a list of names, {view}
what can be seen; {verb} and {done} are the verb of the work and its participle ("wash", "washed").
"""

from __future__ import annotations

from typing import NamedTuple

# Articles, prepositions, pronouns, auxiliaries, conjunctions, numerals, and two adverbs of place and time.
FUNCTION_WORDS = frozenset(
    "a an the to in at on of from with into by for and or but as not no than is are be it its them they you your i my "
    "this that there here now can cannot do does have has must will one two three what which so if up down".split()
)


def split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


class Theme(NamedTuple):
    """A setting and its nouns: open places, containers, things to carry, fixtures that cannot be carried, tools."""

    setting: str
    spots: tuple[str, ...]
    boxes: tuple[str, ...]
    things: tuple[str, ...]
    fixtures: tuple[str, ...]
    tools: tuple[str, ...]


class Words(NamedTuple):
    """A vocabulary.

    `names`: {placeholder of a command: its name in this vocabulary}. `commands[role]`: templates with the placeholders
    `place`, `object` and `tool`. `work`, `repair`: (verb, participle). `says[event]`: wordings of an answer or of a
    sentence in the opening.
    """

    themes: tuple[Theme, ...]
    adjectives: tuple[str, ...]
    keys: tuple[str, ...]
    names: dict[str, str]
    commands: dict[str, tuple[str, ...]]
    work: tuple[tuple[str, str], ...]
    repair: tuple[tuple[str, str], ...]
    says: dict[str, tuple[str, ...]]


def theme(setting: str, spots: str, boxes: str, things: str, fixtures: str, tools: str) -> Theme:
    return Theme(
        setting=setting,
        spots=split(spots),
        boxes=split(boxes),
        things=split(things),
        fixtures=split(fixtures),
        tools=split(tools),
    )


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(tuple(part.split("/")) for part in split(text))


TRAIN = Words(
    themes=(
        theme(
            "farm",
            "well, barn, field, gate, stable, porch",
            "shed, coop, trough, cart",
            "egg, rope, hat, pumpkin, sack, saddle, carrot, boot",
            "pump, fence, tractor",
            "rake, spade, pitchfork",
        ),
        theme(
            "ship",
            "deck, bridge, mast, bow, galley, rail",
            "hold, cabin, barrel, chest",
            "map, sail, flag, coin, biscuit, lamp, parrot, compass",
            "anchor, engine, wheel",
            "hook, wrench, telescope",
        ),
        theme(
            "workshop",
            "bench, forge, rack, counter, doorway, lathe",
            "crate, tool box, bin, locker",
            "nail, plank, hinge, cog, bolt, spring, handle, chair",
            "press, saw, grinder",
            "hammer, pliers, drill",
        ),
        theme(
            "office",
            "desk, lobby, printer, window, hallway, reception",
            "closet, file box, mail bag, safe",
            "letter, stapler, folder, badge, pen, report, phone, ticket",
            "copier, clock, projector",
            "screwdriver, cable, marker",
        ),
        theme(
            "castle",
            "throne, tower, hall, courtyard, wall, fountain",
            "dungeon, coffer, cellar, wardrobe",
            "crown, sword, shield, scroll, ring, goblet, banner, robe",
            "drawbridge, catapult, bell",
            "lever, chain, crank",
        ),
        theme(
            "garden",
            "pond, path, hedge, lawn, terrace, oak tree",
            "greenhouse, basket, urn, hut",
            "rose, apple, seed, pot, leaf, glove, stone, bird house",
            "sprinkler, sundial, swing",
            "shears, hose, trowel",
        ),
        theme(
            "bakery",
            "oven, display, table, till, kitchen, corner",
            "pantry, jar, tin, freezer",
            "bun, cake, pie, cookie, loaf, tray, apron, pretzel",
            "mixer, scale, toaster",
            "whisk, spoon, brush",
        ),
        theme(
            "camp",
            "fire, tent, river, trail, meadow, log",
            "backpack, cooler, cave, trunk",
            "blanket, mug, torch, fish, kettle, stick, whistle, sandwich",
            "radio, stove, raft",
            "axe, shovel, net",
        ),
        theme(
            "laboratory",
            "microscope, sink, table, board, fume hood, door",
            "cabinet, vault, cupboard, case",
            "flask, sample, crystal, magnet, beaker, battery, lens, notebook",
            "laser, robot, scanner",
            "probe, tweezers, sensor",
        ),
        theme(
            "museum",
            "gallery, arch, staircase, podium, entrance, balcony",
            "glass case, archive, vitrine, attic",
            "vase, mask, statue, painting, fossil, coin, helmet, book",
            "alarm, elevator, piano",
            "ladder, duster, cloth",
        ),
    ),
    adjectives=split("red, blue, green, white, black, old, small, heavy, broken, wooden"),
    keys=split("key, iron key, pass card, gold key, code card"),
    names={"place": "place", "object": "object", "tool": "tool"},
    commands={
        "go": split(
            "go to {place}, walk to {place}, head to {place}, visit {place}, run to {place}, enter {place}, "
            "approach {place}, move to {place}, travel to {place}"
        ),
        "take": split(
            "take {object} from {place}, grab {object} from {place}, pick up {object}, get {object}, "
            "from {place} take {object}, collect {object} at {place}, fetch {object} from {place}, "
            "lift {object}"
        ),
        "put": split(
            "put {object} in {place}, drop {object} at {place}, leave {object} at {place}, drop {object}, "
            "store {object} in {place}, at {place} put {object}, release {object}, "
            "deliver {object} to {place}"
        ),
        "open": split("open {place}, unlatch {place}, pull open {place}, uncover {place}"),
        "work": split(
            "{verb} {object}, {verb} {object} at {place}, {verb} {object} with {place}, "
            "{verb} {object} using {place}, use {place} to {verb} {object}, at {place} {verb} {object}"
        ),
        "repair": split(
            "{verb} {object} with {tool}, {verb} {object} using {tool}, use {tool} on {object}, "
            "use {tool} to {verb} {object}, with {tool} {verb} {object}"
        ),
        "look": split("look, look around, check place, observe"),
        "inventory": split("inventory, check hands, list things, check bag"),
    },
    work=pairs(
        "wash/washed, paint/painted, dry/dried, weigh/weighed, stamp/stamped, polish/polished, label/labelled, "
        "scan/scanned, sharpen/sharpened, wrap/wrapped, measure/measured, dye/dyed, soak/soaked"
    ),
    repair=pairs(
        "repair/repaired, oil/oiled, fix/fixed, start/started, tune/tuned, dust/dusted, adjust/adjusted, reset/reset"
    ),
    says={
        "setting": ("You are in {setting}.", "You are in the middle of {setting}.", "This is {setting}."),
        "around": ("Around you are {things}.", "You see {things}.", "Places: {things}."),
        "station": (
            "Things are {done} at the {station}.",
            "You can {verb} what you have at the {station}.",
            "Use the {station} to {verb} things.",
        ),
        "tool": ("You need the {tool} for it.", "It works only with the {tool} in your hand."),
        "repair": ("The {object} can be {done} with the {tool}.", "To {verb} the {object}, have the {tool}."),
        "lock": ("The {place} is locked and opens with the {tool}.", "You need the {tool} to open the {place}."),
        "first": (
            "The {other} must be in the {place} before the {object}.",
            "In the {place}, the {other} comes before the {object}.",
        ),
        "raw": ("The {place} takes the {object} only when it is {done}.",),
        "carry_one": ("You can carry one thing.", "You have only one free hand."),
        "carry_two": ("You can carry two things.", "You have two free hands."),
        "task": ("Your task is to: {task}.", "Goal: {task}.", "Your job: {task}."),
        "bring": ("bring {object} to the {place}", "put {object} in the {place}", "deliver {object} to the {place}"),
        "work_bring": ("{verb} {object} and bring it to the {place}", "bring {object} to the {place}, {done}"),
        "do_repair": ("{verb} the {object}",),
        "arrive": (
            "You arrive at the {place}. {view}",
            "You are at the {place} now. {view}",
            "You reach the {place}. {view}",
            "This is the {place}. {view}",
        ),
        "middle": ("You are in the middle of the {setting}.", "You are at no place yet."),
        "some": ("You see {things}.", "You find {things}.", "Here is {things}."),
        "none": ("You see nothing.", "It is empty.", "There is nothing here."),
        "closed": ("The {place} is closed.", "The {place} is shut."),
        "open": ("You open the {place}. {view}", "The {place} is open now. {view}"),
        "take": ("You take the {object}.", "You pick up the {object}.", "The {object} is in your hand now."),
        "put": ("You put the {object} in the {place}.", "The {object} is at the {place} now."),
        "work": ("The {object} is {done} now.", "You {verb} the {object}."),
        "carry": ("You carry {things}.", "In your hands: {things}."),
        "carry_none": ("You carry nothing.", "Your hands are empty."),
        "unknown": ("That is not a command.", "Error: unknown command.", "Nothing happens. This is no command."),
        "no_such": (
            "There is no {name} for that.",
            "Error: {name} does not exist for that.",
            "You know no {name} for that.",
        ),
        "not_there": ("You are not at the {place}.", "The {place} is too far away."),
        "not_here": ("The {object} is not here.", "You do not see the {object} here."),
        "shut": ("The {place} is still closed.", "You must open the {place} before that."),
        "opened": ("The {place} is open already.",),
        "there": ("You are at the {place} already.", "You need no step, this is the {place}."),
        "locked": ("The {place} is locked. You need the {tool}.", "It does not open without the {tool}."),
        "full": ("Your hands are full.", "You cannot carry more."),
        "not_held": ("You do not have the {object}.", "The {object} is not in your hand."),
        "held": ("You have the {object} already.",),
        "fixed": ("The {object} cannot be moved.", "The {object} is too big to carry."),
        "needs_tool": ("You need the {tool} for that.", "Without the {tool} that does not work."),
        "not_done": ("The {object} must be {done} before that.", "The {object} is not {done} yet."),
        "too_early": ("The {other} must be there before the {object}.", "Not yet: the {other} is missing."),
        "done": ("The {object} is {done} already.",),
    },
)

HELD = Words(
    themes=(
        theme(
            "reef",
            "lagoon, coral, dune, jetty, wreck, sandbar",
            "oyster, grotto, amphora, clam",
            "pearl, starfish, trident, sponge, urchin, seahorse, ingot, flute",
            "buoy, windlass, lighthouse",
            "harpoon, oar, snorkel",
        ),
        theme(
            "monastery",
            "cloister, altar, chapel, orchard, refectory, spire",
            "reliquary, crypt, hamper, alcove",
            "candle, psalter, rosary, chalice, quill, icon, incense, lantern",
            "organ, loom, hourglass",
            "bellows, tongs, chisel",
        ),
        theme(
            "mine",
            "shaft, tunnel, quarry, derrick, ledge, seam",
            "wagon, silo, satchel, hopper",
            "nugget, pickaxe, fuse, opal, canteen, detonator, geode, candlestick",
            "conveyor, winch, turbine",
            "crowbar, jack, auger",
        ),
        theme(
            "orbiter",
            "airlock, cockpit, hangar, antenna, ramp, dome",
            "capsule, canister, pod, duffel",
            "visor, chip, beacon, tether, module, gauntlet, relay, tablet",
            "reactor, thruster, gyroscope",
            "spanner, welder, clamp",
        ),
    ),
    adjectives=split("amber, violet, crimson, pale, tiny, rusty, striped, hollow"),
    keys=split("sigil, bronze token, rune, cipher disc"),
    names={"place": "spot", "object": "item", "tool": "aid"},
    commands={
        "go": split("proceed to {place}, advance to {place}, hike to {place}, seek {place}, stride to {place}"),
        "take": split(
            "seize {object} from {place}, snatch {object}, acquire {object} at {place}, out of {place} haul {object}"
        ),
        "put": split("deposit {object} at {place}, lay {object} on {place}, set {object}, on {place} rest {object}"),
        "open": split("unseal {place}, pry {place}, unfasten {place}"),
        "work": split("{verb} {object}, {verb} {object} by {place}, employ {place} to {verb} {object}"),
        "repair": split("{verb} {object} by {tool}, apply {tool} to {object}, employ {tool} to {verb} {object}"),
        "look": split("survey, peer, inspect surroundings"),
        "inventory": split("belongings, tally gear, recall gear"),
    },
    work=pairs(
        "bless/blessed, rinse/rinsed, engrave/engraved, anoint/anointed, gild/gilded, purify/purified, "
        "varnish/varnished"
    ),
    repair=pairs("calibrate/calibrated, restore/restored, ignite/ignited, align/aligned"),
    says={
        "setting": ("Behold {setting}.", "Welcome, wanderer, to {setting}."),
        "around": ("Nearby rise {things}.", "Known spots: {things}."),
        "station": ("Items become {done} by the {station}.", "The {station} serves to {verb} items."),
        "tool": ("This requires the {tool} on you.",),
        "repair": ("The {object} becomes {done} by the {tool}.", "Whoever wields the {tool} may {verb} the {object}."),
        "lock": ("The {place} stays barred to all but the {tool}.",),
        "first": ("The {place} wants the {other} prior to the {object}.",),
        "raw": ("The {place} accepts the {object} solely if {done}.",),
        "carry_one": ("Bear a single item.",),
        "carry_two": ("Bear two items, no further.",),
        "task": ("Your quest: {task}.", "Thy mission: {task}."),
        "bring": ("convey {object} to the {place}", "transfer {object} to the {place}"),
        "work_bring": ("{verb} {object}, then convey it to the {place}",),
        "do_repair": ("{verb} the {object}",),
        "arrive": ("Ahead lies the {place}. {view}", "Behold the {place}. {view}"),
        "middle": ("You linger amid the {setting}.",),
        "some": ("You notice {things}.", "It contains {things}."),
        "none": ("It is vacant.", "You notice none."),
        "closed": ("The {place} is sealed.", "A lid covers the {place}."),
        "open": ("The {place} stands ajar. {view}", "You unseal the {place}. {view}"),
        "take": ("You grip the {object}.", "The {object} joins your gear."),
        "put": ("The {object} rests by the {place}.", "You part with the {object} by the {place}."),
        "work": ("The {object} became {done}.", "Success, the {object} is {done}."),
        "carry": ("You bear {things}.",),
        "carry_none": ("You bear none.",),
        "unknown": ("Gibberish.", "Senseless words."),
        "no_such": ("No such {name}.", "{name} makes no sense."),
        "not_there": ("You remain elsewhere than the {place}.", "The {place} lies afar."),
        "not_here": ("The {object} is elsewhere.", "No {object} within grasp."),
        "shut": ("The {place} remains sealed.",),
        "opened": ("The {place} stands ajar beforehand.",),
        "there": ("You linger by the {place} as it is.",),
        "locked": ("Barred. The {place} wants the {tool}.",),
        "full": ("You bear the utmost.", "Your load is maximal."),
        "not_held": ("You lack the {object}.",),
        "held": ("You grip the {object} as it is.",),
        "fixed": ("The {object} is rooted.",),
        "needs_tool": ("This requires the {tool}.",),
        "not_done": ("The {object} ought to be {done}.",),
        "too_early": ("The {other} precedes the {object}.",),
        "done": ("The {object} was {done} beforehand.",),
    },
)

PLAIN = {called: name for words in (TRAIN, HELD) for name, called in words.names.items()}  # a vocabulary's name -> ours
