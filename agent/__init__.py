"""Who plays: policies (a local model, a server, a script), one attempt, and the loop that runs many at once."""
