"""Corpora for the tiny bases: demonstrations in ALFWorld and WebShop, and random walks in two worlds (neutral)."""
