"""Playing: policies (a local model, a server, a script), one attempt, and the loop that runs many concurrently."""
