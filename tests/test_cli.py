"""Command lines from dataclasses: what is parsed, and the help in groups."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

import actre
from agent.server import Server
from artifacts.atomic import atomic_write
from artifacts.cli import Range, parse, run_main


@dataclass(frozen=True, kw_only=True)
class Link:
    url: str | None = None
    """Address (default: local)."""
    retries: int = 2
    """Retries."""


@dataclass(frozen=True, kw_only=True)
class BaseArgs:
    """Flags of the base."""

    seed: int = 0
    """Seed of the base."""
    limit: int | None = None
    """Limit (default: all)."""
    link: Link = Link()
    """A link."""


@dataclass(frozen=True, kw_only=True)
class Args(BaseArgs):
    out: Path
    """Where to write,
    on two lines."""
    names: tuple[str, ...] = ("a", "b")
    """Names."""
    fast: bool = False
    """Whether to hurry."""
    seed: int = 7
    """Seed of the command."""
    second: Link = Link(retries=5)
    """A second link."""


def help_of(cls, monkeypatch, capsys, description: str = "") -> str:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        parse(cls, description, ["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def groups_of(text: str) -> dict[str, str]:
    """{title: contents on one line} of the groups of a help text, in order."""
    plain = re.sub("[│╭╮╰╯─]|--{2,}", " ", text)
    _, *parts = re.split(r"^ *((?:\S+ )?options) *$", plain, flags=re.M)
    return {title: " ".join(body.split()) for title, body in zip(parts[::2], parts[1::2], strict=True)}


def test_flat_and_nested_flags_parse_into_the_class():
    words = "--out x --names c --fast --seed 3 --limit 4 --link.url u --second.retries 9".split()
    link, second = Link(url="u"), Link(retries=9)
    expected = Args(out=Path("x"), names=("c",), fast=True, seed=3, limit=4, link=link, second=second)
    assert parse(Args, "", words) == expected
    assert parse(Args, "", ["--out", "x"]) == Args(out=Path("x"))
    assert type(parse(Args, "", ["--out", "x"]).second) is Link


def test_a_stage_parses_flags_of_every_class_it_inherits_from():
    words = "--budget 2 --model m --max-turns 3 --actre-server.model n --actre-server.url http://v".split()
    words += "--server.url http://u --server.model o".split()
    servers = {"server": Server(url="http://u", model="o"), "actre_server": Server(model="n", url="http://v")}
    assert parse(actre.Args, "", words) == actre.Args(budget=2, model=Path("m"), max_turns=3, **servers)
    with pytest.raises(ValueError, match="^--actre-server.model is n and --actre-server.url is missing"):
        parse(actre.Args, "", ["--actre-server.model", "n"])


def test_the_command_line_is_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["command.py", "--out", "y", "--seed", "1"])
    assert parse(Args, "") == Args(out=Path("y"), seed=1)


def test_an_overridden_flag_has_the_subclasses_default_and_sentence(monkeypatch, capsys):
    groups = groups_of(help_of(Args, monkeypatch, capsys))
    assert "--seed INT Seed of the command. (default: 7)" in groups["options"]
    assert "--seed" not in groups["base options"] and parse(BaseArgs, "", []).seed == 0


def test_a_default_of_none_is_left_to_the_sentence(monkeypatch, capsys):
    text = help_of(Args, monkeypatch, capsys)
    assert "Limit (default: all)." in text and "Address (default: local)." in text
    assert "default: None" not in text and "(default: )" not in text
    groups = groups_of(text)
    assert "(default: 5)" in groups["second options"] and "(default: 2)" in groups["link options"]


def test_sentences_are_joined_to_one_line(monkeypatch, capsys):
    assert "Where to write, on two lines." in groups_of(help_of(Args, monkeypatch, capsys))["options"]


def test_groups_are_own_flags_then_inherited_ones_then_nested_classes(monkeypatch, capsys):
    groups = groups_of(help_of(actre.Args, monkeypatch, capsys))
    titles = ["options", "play options", "model options", "track options", "actre-server options", "server options"]
    assert list(groups) == titles
    flags = ["--temperature", "--env", "--model", "--track", "--actre-server.url", "--server.url"]
    for title, flag in zip(titles, flags, strict=True):
        assert [other for other in titles if f"{flag} " in groups[other]] == [title]
    assert groups["model options"].startswith("The local model")
    titles = ["options", "base options", "second options", "link options"]
    assert list(groups_of(help_of(Args, monkeypatch, capsys))) == titles


def test_the_description_keeps_its_lines(monkeypatch, capsys):
    description = "Does it.\n\n    python command.py   # an example\n\nWrites a\nfile.\n"
    text = help_of(Args, monkeypatch, capsys, description)
    assert text.startswith(description) and "usage: " in text


@pytest.mark.parametrize("words", [["--nosuch"], ["--limit", "x"], ["--link.nosuch", "1"]], ids=" ".join)
def test_bad_flags_exit_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Args, "", ["--out", "x", *words])
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_required_flag_that_is_missing_exits_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Args, "", [])
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err


# ---- how a command ends ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OutArgs:
    out: Path = Path("out")
    """Where to write."""
    numbers: tuple[Annotated[int, Range(1, 5)], ...] | None = (1, 2, 3)
    """Numbers."""


def end_of(main, words: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """(exit status, stderr) of a command."""
    monkeypatch.setattr("sys.argv", ["command.py", *words])
    try:
        run_main(main, OutArgs, "A command.")
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def write(args: OutArgs) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out / "file") as temporary:
        temporary.write_text("text")


def test_what_the_file_system_refuses_is_one_sentence_with_the_path(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    below = end_of(write, ["--out", str(tmp_path / "file" / "out")], monkeypatch, capsys)
    assert below == (
        2,
        f"command.py: {tmp_path}/file/out: Not a directory; expected a folder: a part of this path is a file\n",
    )
    status, said = end_of(write, ["--out", str(tmp_path / "file")], monkeypatch, capsys)
    assert status == 2 and said.startswith(f"command.py: {tmp_path}/file: File exists; expected a folder")

    def full(args: OutArgs) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rows.jsonl")

    status, said = end_of(full, [], monkeypatch, capsys)
    assert status == 2 and "rows.jsonl: No space left on device; what is written is kept" in said
    assert said.count("\n") == 1


def test_a_value_out_of_range_is_refused_wherever_it_is_in_a_tuple(monkeypatch, capsys):
    assert end_of(lambda args: None, ["--numbers", "1", "5", "3"], monkeypatch, capsys) == (0, "")
    said = end_of(lambda args: None, ["--numbers", "1", "5", "6"], monkeypatch, capsys)
    assert said == (2, "command.py: --numbers is 6; expected at least 1 and at most 5\n")
