"""Rendering takes text of any length and form, whoever wrote it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.render import flat, opening_text, think_line


@given(st.text("a \n\t\r\x0b\x85\u2028"))
def test_a_run_of_blanks_with_a_newline_becomes_one_space_and_nothing_else_changes(text):
    assert flat(text) == re.sub(r"\s*\n\s*", " ", text.strip("\n ")).replace("\r", " ")


@pytest.mark.parametrize("blanks", ["\t", " \t", "\t\n", "\r"])
def test_a_million_blanks_in_a_thought_are_rendered_in_linear_time(blanks):
    """Quadratic time would be hours."""
    line = think_line("a" + blanks * 2**20 + "b")
    assert line.startswith(" think[a") and line.endswith("b]\n") and line.count("\n") == 1


def test_the_paragraph_that_states_the_task_comes_first_and_the_others_keep_their_order():
    assert opening_text("one\n\ntwo: win\n\nthree\n\nwin", "win") == "Observation: two: win win one three\nAction:"
    assert opening_text("one\n\n \n\ntwo", "") == "Observation: one two\nAction:"
