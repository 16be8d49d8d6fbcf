"""What the right answer to a changed manifest is, by class: said a second time, without a line of fnlight's.

A change of a section is judged by what the section may hold. Of files and layouts, whose every value is held against what is there, any change
is damage. Where a value means something to the task alone, either answer will do, as long as all readers give it.
"""

import base64
import binascii
from collections.abc import Callable
from typing import Any

SOUND, REFUSED = "sound", "refused"
SCALARS = {"Mean": 2, "Sum": 1, "Max": 1, "Min": 1, "Last": 1}
DEEPEST = 100


def right(body: dict[str, Any], at: tuple[str | int, ...]) -> tuple[str | None, str]:
    """What must be said of a manifest that was sound before one value of it was changed.

    Args:
        body: Its sections.
        at: Where it was changed.

    Returns:
        `SOUND`, `REFUSED` or None for either; and what the error must name.
    """
    section = str(at[0])
    if section not in body:
        return (SOUND if section == "times" else REFUSED), section
    rule = RULES.get(section)
    good = rule(body, at) if rule is not None else None
    return {True: SOUND, False: REFUSED, None: None}[good], "" if section in ("layouts", "files") else section


def whole(value: Any, least: int = 0) -> bool:
    """Whether a value is a whole number, and no truth value."""
    return type(value) is int and least <= value < 1 << 62


def number(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= value < 1e308 * 1.7


def _progress(body: Any, at: Any) -> bool:
    found = body["progress"]
    if not isinstance(found, dict) or not {"step", "epoch", "batch", "samples", "seconds"} <= found.keys():
        return False
    counts = {key: value for key, value in found.items() if key not in ("seconds", "updates")}
    updates = found.get("updates", {})
    known = counts.keys() <= {"step", "epoch", "batch", "samples", "epoch_samples", "skipped"}
    return (
        known
        and all(map(whole, counts.values()))
        and number(found["seconds"])
        and isinstance(updates, dict)
        and all(map(whole, updates.values()))
    )


def _times(body: Any, at: Any) -> bool:
    found = body["times"]
    return isinstance(found, dict) and all(map(number, found.values())) and whole(found.get("runs", 0))


def _history(body: Any, at: Any) -> bool:
    return isinstance(body["history"], list) and all(map(_record, body["history"]))


def _record(found: Any) -> bool:
    if not isinstance(found, list) or len(found) != 3 or not whole(found[0]) or not whole(found[1]):
        return False
    return isinstance(found[2], dict) and all(map(_metric, found[2].items()))


def _metric(pair: tuple[str, Any]) -> bool:
    name, value = pair
    if name.startswith("$"):
        return False
    if isinstance(value, dict):
        return value in ({"$float": "nan"}, {"$float": "inf"}, {"$float": "-inf"})
    return type(value) in (int, float, bool) and abs(value) < 1e308 * 1.7


def _names(body: Any, at: Any) -> bool:
    found = body["parameters"]
    known = body["files"]["model.safetensors"]["tensors"]
    held = _held(body["optimizer"])
    return (
        isinstance(found, list)
        and all(isinstance(n, str) for n in found)
        and len(set(found)) == len(found)
        and set(found) <= known.keys()
        and held <= set(found)
    )


def _held(section: Any) -> set[str]:
    if section is None:
        return set()
    parts = section["phases"].values() if "phases" in section else [section]
    return {name for part in parts if part for group in part["groups"] for name in group["params"]}


def _memory(body: Any, at: Any) -> bool | None:
    found = body["memory"]
    if not isinstance(found, dict) or not _trees(body):
        return False
    trees = [found, *(found["phases"].values() if isinstance(found.get("phases"), dict) else [])]
    if not isinstance(found.get("phases", {}), dict) or not all(isinstance(tree, dict) for tree in trees):
        return False
    casts = [tree["cast"] for tree in trees if "cast" in tree]
    if not all(isinstance(c, dict) and c.get("dtype") in ("bfloat16", "float16", "float32", "float64") for c in casts):
        return None
    lists = [t for t in found.values() if isinstance(t, dict) and {"saved", "permanent"} <= t.keys()]
    return all(isinstance(t[k], list) and all(map(whole, t[k])) for t in lists for k in ("saved", "permanent")) and all(
        whole(t.get("skipped", 0)) for t in lists
    )


def _pairs(found: Any) -> list[tuple[Any, Any]] | None:
    """The pairs of a dict by name, or of one whose names could be taken for tags."""
    if isinstance(found, dict) and found.keys() == {"$dict"} and isinstance(found["$dict"], list):
        return [tuple(pair) for pair in found["$dict"] if isinstance(pair, list) and len(pair) == 2]
    return list(found.items()) if isinstance(found, dict) and not any(key.startswith("$") for key in found) else None


def _buffers(body: Any, at: Any) -> bool:
    pairs = _pairs(body["buffers"])
    return pairs is not None and all(isinstance(b, dict) and b.keys() == {"$tensor"} for _, b in pairs) and _trees(body)


def _extra(body: Any, at: Any) -> bool | None:
    return None if _pairs(body["extra"]) is not None and _trees(body) else False


def _trees(body: Any) -> bool:
    names = set(body["files"].get("memory.safetensors", {"tensors": {}})["tensors"])
    return all(tree(value, names) for value in (*body["memory"].values(), body["buffers"], body["extra"]))


def _optimizer(body: Any, at: Any) -> bool | None:
    section = body["optimizer"]
    if section is None:
        return True
    names = set(body["files"].get("optimizer.safetensors", {"tensors": {}})["tensors"])
    if not isinstance(section, dict):
        return False
    if "phases" in section:
        parts = section["phases"]
        return None if isinstance(parts, dict) and all(_one(p, body, names) for p in parts.values()) else False
    return None if _one(section, body, names) else False


def _one(section: Any, body: Any, names: set[str]) -> bool:
    if section is None:
        return True
    if not isinstance(section, dict) or not {"class", "slots", "groups"} <= section.keys() or not isinstance(section["class"], str):
        return False
    slots, groups, known = section["slots"], section["groups"], set(body["parameters"])
    if not isinstance(slots, dict) or not isinstance(groups, list) or not slots.keys() <= known | {"*"}:
        return False
    if not all(isinstance(each, dict) and tree(each, names) for each in slots.values()):
        return False
    if not all(isinstance(group, dict) and {"params", "values", "configured"} <= group.keys() for group in groups):
        return False
    if not all(isinstance(group["params"], list) and all(isinstance(n, str) and n in known for n in group["params"]) for group in groups):
        return False
    return all(isinstance(group[part], dict) and tree(group[part], names) for group in groups for part in ("values", "configured"))


def tree(value: Any, names: set[str], deep: int = 0) -> bool:
    """Whether a value is a tree that a checkpoint can hold; a tensor that was referred to is struck off the names."""
    if deep > DEEPEST:
        return False
    if isinstance(value, list):
        return all(tree(item, names, deep + 1) for item in value)
    if not isinstance(value, dict):
        return True
    tags = [key for key in value if key.startswith("$")]
    if not tags:
        return all(tree(item, names, deep + 1) for item in value.values())
    if len(value) != 1:
        return False
    tag, held = tags[0], value[tags[0]]
    known: dict[str, Callable[[], Any]] = {
        "$tensor": lambda: isinstance(held, str) and held in names and not names.remove(held),
        "$tuple": lambda: isinstance(held, list) and all(tree(item, names, deep + 1) for item in held),
        "$dict": lambda: isinstance(held, list) and all(_pair(item, names, deep + 1) for item in held) and _differ(held),
        "$float": lambda: held in ("nan", "inf", "-inf"),
        "$bytes": lambda: isinstance(held, str) and _base64(held),
        "$complex": lambda: isinstance(held, list) and len(held) == 2 and all(map(_real, held)),
        "$tally": lambda: isinstance(held, list) and _tally(held),
    }
    return bool(known[tag]()) if tag in known else False


def _pair(item: Any, names: set[str], deep: int) -> bool:
    plain = (
        isinstance(item, list) and len(item) == 2 and (not isinstance(item[0], list | dict) or any(key.startswith("$") for key in item[0]))
    )
    return plain and not isinstance(item[0], list) and tree(item[0], set(), deep) and tree(item[1], names, deep)


def _differ(pairs: list[Any]) -> bool:
    return len({repr(pair[0]) for pair in pairs}) == len(pairs)


def _base64(text: str) -> bool:
    try:
        return bool(base64.b64decode(text, validate=True)) or not text
    except (binascii.Error, ValueError):
        return False


def _real(value: Any) -> bool:
    return (type(value) in (int, float) and abs(value) < 1e308 * 1.7) or value in ({"$float": "nan"}, {"$float": "inf"}, {"$float": "-inf"})


def _tally(held: list[Any]) -> bool:
    if not 2 <= len(held) <= 3:
        return False
    totals, bad, *parts = held
    if not isinstance(totals, dict) or any(name.startswith("$") for name in totals):
        return False
    for fields in totals.values():
        if not isinstance(fields, list) or not fields or fields[0] not in [*SCALARS] or len(fields) != 1 + SCALARS[fields[0]]:
            return False
        if not all(_real(field) or (field is None and fields[0] == "Last") for field in fields[1:]):
            return False
    pair = bad["$tuple"] if isinstance(bad, dict) and bad.keys() == {"$tuple"} else bad
    if bad is not None and not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], str)):
        return False
    return not parts or parts == [None] or (isinstance(parts[0], list) and all(isinstance(p, list) and _tally(p) for p in parts[0]))


RULES: dict[str, Callable[[Any, Any], bool | None]] = {
    "fnlight": lambda body, at: isinstance(body["fnlight"], str),
    "torch": lambda body, at: isinstance(body["torch"], str),
    "progress": _progress,
    "seed": lambda body, at: type(body["seed"]) is int and body["seed"] >= 0,
    "stopped": lambda body, at: body["stopped"] is None or isinstance(body["stopped"], str),
    "times": _times,
    "history": _history,
    "parameters": _names,
    "optimizer": _optimizer,
    "memory": _memory,
    "buffers": _buffers,
    "extra": _extra,
    "layouts": lambda body, at: False,
    "files": lambda body, at: False,
}
