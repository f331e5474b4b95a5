"""Four small hand-written rooms, for generating games without the alfworld wheel. Data only; read by rooms.py.

They use ALFWorld's names, so the vocabulary is the same, but have fewer receptacles and objects than its rooms.

    python -c "from envs.alfworld import mini_rooms; print(sorted(mini_rooms.HOLDS['Desk']))"
"""

from __future__ import annotations

# Room: (number, receptacles with their counts, object types). The numbers are outside ALFWorld's range.
ROOMS = {
    "Kitchen": (
        90,
        {
            "Cabinet": 4,
            "CounterTop": 2,
            "Drawer": 3,
            "DiningTable": 1,
            "Fridge": 1,
            "Microwave": 1,
            "SinkBasin": 1,
            "StoveBurner": 2,
            "CoffeeMachine": 1,
            "GarbageCan": 1,
            "Shelf": 1,
        },
        (
            "Apple",
            "Bowl",
            "Bread",
            "Cup",
            "DishSponge",
            "Egg",
            "Fork",
            "Knife",
            "Mug",
            "Pan",
            "PepperShaker",
            "Plate",
            "Pot",
            "Potato",
            "Spoon",
            "Tomato",
        ),
    ),
    "LivingRoom": (
        290,
        {"ArmChair": 2, "CoffeeTable": 1, "Drawer": 3, "GarbageCan": 1, "Shelf": 2, "SideTable": 2, "Sofa": 1},
        ("Book", "CreditCard", "DeskLamp", "HousePlant", "KeyChain", "Laptop", "Newspaper", "RemoteControl", "Vase"),
    ),
    "Bedroom": (
        390,
        {"Bed": 1, "Desk": 1, "Drawer": 4, "Dresser": 1, "GarbageCan": 1, "Safe": 1, "Shelf": 2, "SideTable": 1},
        ("AlarmClock", "Book", "CD", "CellPhone", "DeskLamp", "KeyChain", "Pen", "Pencil", "Pillow", "Watch"),
    ),
    "Bathroom": (
        490,
        {
            "BathtubBasin": 1,
            "Cabinet": 3,
            "CounterTop": 1,
            "GarbageCan": 1,
            "Shelf": 1,
            "SinkBasin": 1,
            "Toilet": 1,
            "ToiletPaperHanger": 1,
        },
        ("Candle", "Cloth", "SoapBar", "SoapBottle", "SprayBottle", "ToiletPaper"),
    ),
}

FOOD = frozenset({"Apple", "Bread", "Egg", "Potato", "Tomato"})
DISHES = frozenset({"Bowl", "Cup", "Mug", "Plate"})
POTS = frozenset({"Pan", "Pot"})
CUTLERY = frozenset({"Fork", "Knife", "Spoon"})
PAPER = frozenset({"Book", "Newspaper"})
SMALL = frozenset({"CD", "CellPhone", "CreditCard", "KeyChain", "Pen", "Pencil", "RemoteControl", "Watch"})
BATH = frozenset({"Candle", "Cloth", "SoapBar", "SoapBottle", "SprayBottle", "ToiletPaper"})

TABLE = FOOD | DISHES | POTS | CUTLERY | PAPER | SMALL | BATH | {"AlarmClock", "Laptop", "PepperShaker", "Vase"}
SEAT = PAPER | {"CellPhone", "CreditCard", "KeyChain", "Laptop", "Pillow", "RemoteControl"}

HOLDS = {
    "ArmChair": SEAT,
    "BathtubBasin": frozenset({"Cloth", "SoapBar"}),
    "Bed": PAPER | {"CellPhone", "Laptop", "Pillow"},
    "Cabinet": DISHES | POTS | BATH | {"DishSponge", "PepperShaker"},
    "CoffeeMachine": frozenset({"Mug"}),
    "CoffeeTable": TABLE,
    "CounterTop": TABLE | {"DishSponge"},
    "Desk": PAPER | SMALL | {"AlarmClock", "Laptop", "Mug"},
    "DiningTable": TABLE,
    "Drawer": CUTLERY | SMALL | PAPER | BATH | {"DishSponge", "PepperShaker"},
    "Dresser": PAPER | SMALL | {"AlarmClock", "Laptop", "Vase"},
    "Fridge": FOOD | DISHES | POTS,
    "GarbageCan": FOOD | {"CD", "Newspaper", "Pen", "Pencil", "SoapBar", "SoapBottle", "SprayBottle", "ToiletPaper"},
    "Microwave": FOOD | {"Cup", "Mug", "Plate"},
    "Safe": frozenset({"CD", "CellPhone", "CreditCard", "KeyChain", "Vase", "Watch"}),
    "Shelf": DISHES | PAPER | SMALL | BATH | {"AlarmClock", "PepperShaker", "Vase"},
    "SideTable": TABLE,
    "SinkBasin": FOOD | DISHES | POTS | CUTLERY | {"Cloth", "DishSponge", "SoapBar"},
    "Sofa": SEAT,
    "StoveBurner": POTS,
    "Toilet": BATH,
    "ToiletPaperHanger": frozenset({"ToiletPaper"}),
}

ABILITIES = {
    "cleanable": FOOD - {"Bread"} | DISHES | POTS | CUTLERY | {"Cloth", "DishSponge", "SoapBar"},
    "heatable": FOOD | {"Cup", "Mug", "Plate"},
    "coolable": FOOD | DISHES | POTS,
    "sliceable": FOOD,
}
