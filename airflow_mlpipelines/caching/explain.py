"""What differs between two sets of ingredients, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.caching.decision import MissReason
from airflow_mlpipelines.caching.index import RAN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow_mlpipelines.caching.index import MetadataIndex, StepRunRecord

    Ingredients = Mapping[str, Any]

_SHOWN_CHARACTERS = 40
_SHOWN_DIFFERENCES = 10
_STEP_WORDS = {
    "type": "step type",
    "script": "script",
    "command": "command",
    "arguments": "arguments",
    "bound_params": "params",
    "input_paths": "path_on_compute of inputs",
    "outputs": "outputs",
    "secrets": "secrets",
    "version": "version",
    "distributed": "distribution",
    "config": "configuration",
}


def explain_miss(index: MetadataIndex, pipeline: str, step: str, ingredients: Ingredients) -> str:
    """Return why a step with these ingredients is not reused, against its nearest earlier run.

    Raises:
        CacheError: The index can't be asked.
    """
    runs = index.find_earlier_runs(pipeline, [step]).get(step, [])
    nearest = find_nearest(ingredients, runs)
    wanted = content_digests(ingredients)
    if nearest is not None and nearest.ingredients is not None:
        wanted |= content_digests(nearest.ingredients)
    return describe_change(nearest, ingredients, index.get_contents(wanted))[1]


def describe_change(
    earlier: StepRunRecord | None, ingredients: Ingredients, contents: Mapping[str, Any]
) -> tuple[MissReason, str]:
    """Return why a step with these ingredients was not found, as a kind and in words."""
    if earlier is None or earlier.ingredients is None:
        return MissReason.NEVER_RUN, "never ran before in this pipeline"
    phrases = find_differences(earlier.ingredients, ingredients, contents)
    if not phrases:  # it ran, but left no entry: reuse was off, or its entry is gone
        return MissReason.CHANGED, "its earlier outputs are not remembered"
    return MissReason.CHANGED, join_differences(phrases)


def find_change(
    index: MetadataIndex, run: StepRunRecord, earlier: Sequence[StepRunRecord]
) -> tuple[StepRunRecord | None, list[str]]:
    """Return the nearest earlier run in which the step's program ran, and what differed from it.

    Raises:
        CacheError: The index can't be asked.
    """
    if run.ingredients is None:
        return None, []
    nearest = find_nearest(run.ingredients, [item for item in earlier if item.state == RAN])
    if nearest is None or nearest.ingredients is None:
        return None, []
    wanted = content_digests(nearest.ingredients) | content_digests(run.ingredients)
    contents = index.get_contents(wanted)
    return nearest, find_differences(nearest.ingredients, run.ingredients, contents)


def find_nearest(ingredients: Ingredients, runs: Sequence[StepRunRecord]) -> StepRunRecord | None:
    """Return the run that shares the most ingredients; of equals, the first."""
    known = [run for run in runs if run.ingredients is not None]
    return max(
        known, key=lambda run: count_common(run.ingredients or {}, ingredients), default=None
    )


def content_digests(ingredients: Ingredients) -> set[str]:
    """Return the digests in a fingerprint's ingredients whose contents the index keeps."""
    return {ingredients[group] for group in ("code", "environment") if ingredients.get(group)}


def find_differences(
    before: Mapping[str, Any], after: Mapping[str, Any], contents: Mapping[str, Any]
) -> list[str]:
    """Return what differs between two fingerprints' ingredients, one phrase for each thing.

    Args:
        before: The ingredients of the earlier run.
        after: Those of this one.
        contents: What is known by digest: the files of code, the packages of environments.

    Returns:
        Such as ``features.py changed (via train.py)``, ``learning_rate 0.1 -> 0.2``,
        ``pandas 2.2.3 -> 2.3.0``; empty if nothing differs.
    """
    phrases = _compare_code(before.get("code"), after.get("code"), contents)
    phrases += _compare_values("", before.get("parameters"), after.get("parameters"))
    phrases += _compare_step(before.get("step") or {}, after.get("step") or {})
    phrases += _compare_environment(before.get("environment"), after.get("environment"), contents)
    phrases += _compare_inputs(before.get("inputs") or {}, after.get("inputs") or {})
    return phrases


def join_differences(phrases: list[str]) -> str:
    """Return the phrases as one line, bounded."""
    shown = phrases[:_SHOWN_DIFFERENCES]
    more = len(phrases) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def count_common(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Return how many ingredients two fingerprints share, to find the nearest earlier one."""
    return sum(
        _flat(before.get(group)).get(name) == value
        for group in after
        for name, value in _flat(after[group]).items()
    )


def _flat(group: Any) -> dict[str, Any]:
    return dict(group) if isinstance(group, dict) else {"": group}


def _compare_code(before: str | None, after: str | None, contents: Mapping[str, Any]) -> list[str]:
    if before == after:
        return []
    if before is None or after is None:
        return [
            "the step has a source directory now"
            if after
            else "the step has no source directory now"
        ]
    old, new = contents.get(before), contents.get(after)
    if old is None or new is None:
        return ["its code changed"]
    old_files, new_files = old.get("files") or {}, new.get("files") or {}
    via = {**(old.get("via") or {}), **(new.get("via") or {})}
    names, notes = old_files.keys() | new_files.keys(), new.get("notes") or []
    if old.get("whole_folder") != new.get("whole_folder"):  # all others came or went with that
        names = old_files.keys() & new_files.keys()
    phrases = []
    for name in sorted(names):
        if old_files.get(name) != new_files.get(name):
            change = _change_of(name in old_files, name in new_files)
            phrases.append(f"{name} {change}" + (f" (via {via[name]})" if name in via else ""))
    if notes:
        phrases.append(f"the whole folder counts, as {notes[0]}")
    return phrases or ["its code changed"]


def _change_of(was_there: bool, is_there: bool) -> str:
    if was_there and is_there:
        return "changed"
    return "is new" if is_there else "is gone"


def _compare_environment(
    before: str | None, after: str | None, contents: Mapping[str, Any]
) -> list[str]:
    if before == after:
        return []
    old, new = contents.get(before or ""), contents.get(after or "")
    if old is None or new is None:
        return ["its environment changed"]
    if old.get("kind") != new.get("kind"):
        return [f"its environment is {_kind_of(new)} now, and was {_kind_of(old)}"]
    phrases = []
    if old.get("python") != new.get("python"):
        phrases.append(f"Python {old.get('python')} -> {new.get('python')}")
    if old.get("digest") != new.get("digest"):
        phrases.append(f"image {new.get('image')} has another digest")
    phrases += _compare_values("", old.get("packages"), new.get("packages"))
    phrases += _compare_variables(old.get("variables"), new.get("variables"))
    return phrases or ["its environment changed"]


def _kind_of(description: Mapping[str, Any]) -> str:
    return (
        f"the image {description.get('image')}" if description.get("kind") == "image" else "Python"
    )


def _compare_step(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    phrases = _compare_values("param ", before.get("params"), after.get("params"))
    phrases += _compare_variables(
        before.get("environment_variables"), after.get("environment_variables")
    )
    for name, word in _STEP_WORDS.items():
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if name in ("arguments", "command"):
            phrases.append(_compare_arguments(word, old or [], new or []))
        elif isinstance(old, (str, type(None))) and isinstance(new, (str, type(None))):
            phrases.append(f"{word} {_show(old)} -> {_show(new)}")
        else:
            phrases.append(f"{word} changed")
    return phrases


def _compare_arguments(word: str, before: list[Any], after: list[Any]) -> str:
    """Name the one argument that differs, or say that several do."""
    if len(before) == len(after):
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        if len(changed) == 1:
            old, new = changed[0]
            return f"{word.rstrip('s')} {_show(_spell(old))} -> {_show(_spell(new))}"
    return f"{word} changed"


def _spell(argument: list[list[str]]) -> str:
    return "".join(text if kind == "literal" else f"{{{text}}}" for kind, text in argument)


def _compare_values(
    prefix: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> list[str]:
    old, new = before or {}, after or {}
    phrases = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            phrases.append(f"{prefix}{name} {_show(new[name])} is new")
        elif name not in new:
            phrases.append(f"{prefix}{name} is gone")
        elif type(old[name]) is not type(new[name]):  # so that 1 -> "1" can be seen
            phrases.append(f"{prefix}{name} {_show(repr(old[name]))} -> {_show(repr(new[name]))}")
        elif old[name] != new[name]:
            phrases.append(f"{prefix}{name} {_show(old[name])} -> {_show(new[name])}")
    return phrases


def _compare_variables(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> list[str]:
    """Name the environment variables that differ, and never what is in them."""
    old, new = before or {}, after or {}
    return [
        f"environment variable {name} {_change_of(name in old, name in new)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _compare_inputs(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    phrases = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            phrases.append(f"input {name!r} {_change_of(name in before, name in after)}")
        elif before[name] != after[name]:
            phrases.append(f"input {name!r} has other content")
    return phrases


def _show(value: Any) -> str:
    text = str(value)
    if not text.isprintable():
        text = ascii(text)[1:-1]
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
