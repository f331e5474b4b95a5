"""ALFWorld: household tasks in text: our engine, TextWorld as the reference, generated games, a scripted player."""
