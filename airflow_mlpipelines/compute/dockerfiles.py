"""The images that a Dockerfile starts from, and the same Dockerfile with those images by digest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_FROM = re.compile(r"^(\s*FROM\s+(?:--\S+\s+)*)(\S+)((?:\s+AS\s+(\S+))?\s*)$", re.I)
_COPY_FROM = re.compile(r"^(\s*(?:COPY|ADD)\s+(?:--\S+\s+)*?--from=)(\S+)(.*)$", re.I | re.S)
_RUN = re.compile(r"^\s*RUN\s", re.I)
_OPTIONS = re.compile(r"^(?:\s*RUN\b)?(?:\s*--\S+)*\s*(?P<more>\\?)", re.I)
_MOUNT_FROM = re.compile(r"(--mount=(?:\S*,)?from=)([^\s,]+)")
_ARG = re.compile(r"^\s*ARG\s+(\w+)=(\S*)\s*$", re.I)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")
_HEREDOC = re.compile(r"<<-?([\"']?)(\w+)\1")


@dataclass(frozen=True)
class _Base:
    """One mention of an image: which line and part of it, and its name with variables filled in."""

    line: int
    start: int
    end: int
    name: str


def find_bases(dockerfile: str) -> list[str]:
    """Return the names of the images that are built upon, copied from or mounted, in order, each once.

    Not ``scratch``, and not the stages of the Dockerfile itself; nor the image that reads it (``# syntax=``), of
    which the name counts. A variable is filled in by its default; one that has none stays as it is.
    """
    return list(dict.fromkeys(base.name for base in _bases(dockerfile)))


def pin_bases(dockerfile: str, references: Mapping[str, str]) -> str:
    """Return the Dockerfile with each image's name replaced by its reference; unknown names stay."""
    lines = dockerfile.splitlines()
    # From the end, as a line may name several.
    for base in reversed(list(_bases(dockerfile))):
        reference = references.get(base.name)
        if reference is not None:
            line = lines[base.line]
            lines[base.line] = f"{line[: base.start]}{reference}{line[base.end :]}"
    return "\n".join(lines) + "\n"


def _bases(dockerfile: str) -> Iterator[_Base]:
    defaults: dict[str, str] = {}
    stages: set[str] = {"scratch"}

    def mention(number: int, match: re.Match[str]) -> Iterator[_Base]:
        name = _fill_in(match[2], defaults)
        if name.lower() not in stages and not name.isdigit():
            yield _Base(number, *match.span(2), name)

    with_options = False  # whether a line may begin with options of RUN
    for number, line, is_first in _lines(dockerfile):
        with_options = _RUN.match(line) is not None if is_first else with_options
        if with_options:
            mounts, with_options = _read_options(line)
            yield from chain.from_iterable(mention(number, mount) for mount in mounts)
        elif not is_first:
            continue
        elif argument := _ARG.match(line):
            if stages == {"scratch"}:  # only what stands before the first FROM counts in a FROM
                defaults[argument[1]] = argument[2].strip("\"'")
        elif start := _FROM.match(line):
            yield from mention(number, start)
            stages.add((start[4] or f" {number}").lower())
        elif copy := _COPY_FROM.match(line):
            yield from mention(number, copy)


def _read_options(line: str) -> tuple[list[re.Match[str]], bool]:
    """Return the images mounted by the options that a line of RUN begins with, and whether more options may follow."""
    options = _OPTIONS.match(line)
    if options is None:
        return [], False
    return list(_MOUNT_FROM.finditer(line, 0, options.end())), bool(options["more"])


def _lines(dockerfile: str) -> Iterator[tuple[int, str, bool]]:
    """Yield each line of each instruction, with its number, and whether it is the instruction's first."""
    continues, ends = False, list[str]()
    for number, line in enumerate(dockerfile.splitlines()):
        if ends:
            if line.strip() == ends[0]:
                ends.pop(0)
            continue
        text = line.strip()
        if not text or text.startswith("#"):
            continue  # also in the middle of an instruction
        yield number, line, not continues
        ends = [match[2] for match in _HEREDOC.finditer(line)]
        continues = text.endswith("\\")


def _fill_in(text: str, defaults: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return defaults.get(match[1] or match[2]) or match[3] or match[0]

    return _VARIABLE.sub(value, text)
