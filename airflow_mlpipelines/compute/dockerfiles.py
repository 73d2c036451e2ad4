"""The images that a Dockerfile starts from, and the same Dockerfile with those images by digest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_FROM = re.compile(r"^(\s*FROM\s+(?:--\S+\s+)*)(\S+)((?:\s+AS\s+(\S+))?\s*)$", re.I)
_COPY_FROM = re.compile(r"^(\s*(?:COPY|ADD)\s+(?:--\S+\s+)*?--from=)(\S+)(.*)$", re.I | re.S)
_ARG = re.compile(r"^\s*ARG\s+(\w+)=(\S*)\s*$", re.I)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")
_HEREDOC = re.compile(r"<<-?([\"']?)(\w+)\1")


@dataclass(frozen=True)
class _Base:
    """One mention of an image: which line, what stands around it, and its name with variables filled in."""

    line: int
    before: str
    name: str
    after: str


def find_bases(dockerfile: str) -> list[str]:
    """Return the names of the images that are built upon or copied from, in order, each once.

    Not ``scratch``, and not the stages of the Dockerfile itself. A variable is filled in by its default; one
    that has none stays as it is.
    """
    return list(dict.fromkeys(base.name for base in _bases(dockerfile)))


def pin_bases(dockerfile: str, references: Mapping[str, str]) -> str:
    """Return the Dockerfile with each image's name replaced by its reference; unknown names stay."""
    lines = dockerfile.splitlines()
    for base in _bases(dockerfile):
        reference = references.get(base.name)
        if reference is not None:
            lines[base.line] = f"{base.before}{reference}{base.after}"
    return "\n".join(lines) + "\n"


def _bases(dockerfile: str) -> Iterator[_Base]:
    defaults: dict[str, str] = {}
    stages: set[str] = {"scratch"}
    for number, line in _instructions(dockerfile):
        if argument := _ARG.match(line):
            if stages == {"scratch"}:  # only what stands before the first FROM counts in a FROM
                defaults[argument[1]] = argument[2].strip("\"'")
        elif start := _FROM.match(line):
            name = _fill_in(start[2], defaults)
            if name.lower() not in stages:
                yield _Base(number, start[1], name, start[3])
            stages.add((start[4] or f" {number}").lower())
        elif (copy := _COPY_FROM.match(line)) and not copy[2].isdigit():
            name = _fill_in(copy[2], defaults)
            if name.lower() not in stages:
                yield _Base(number, copy[1], name, copy[3])


def _instructions(dockerfile: str) -> Iterator[tuple[int, str]]:
    """Yield the first line of each instruction, with its number."""
    continues, ends = False, list[str]()
    for number, line in enumerate(dockerfile.splitlines()):
        if ends:
            if line.strip() == ends[0]:
                ends.pop(0)
            continue
        text = line.strip()
        if not text or text.startswith("#"):
            continue  # also in the middle of an instruction
        if not continues:
            yield number, line
        ends = [match[2] for match in _HEREDOC.finditer(line)]
        continues = text.endswith("\\")


def _fill_in(text: str, defaults: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return defaults.get(match[1] or match[2]) or match[3] or match[0]

    return _VARIABLE.sub(value, text)
