"""Synthetic worlds, each sampled with places, objects, verbs, wordings and rules of its own."""
