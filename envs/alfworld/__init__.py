"""ALFWorld: household tasks in text; our own engine, TextWorld as its reference, generated games, a demonstrator."""
