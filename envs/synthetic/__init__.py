"""Synthetic worlds, each sampled with its own places, objects, verbs, wordings and rules."""
