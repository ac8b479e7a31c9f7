"""How steps and settings are declared and spelled: frozen dataclasses <-> text <-> YAML, with errors that name the nearest word.

One spelling in three places. As text ``prune(macs=0.5) | quantize()``, as YAML a list of one-key mappings, in Python the instances
themselves. A value is a Python literal, a step again (``quantize(train=finetune(epochs=1))``), or a bare quantity such as ``1MB``,
``5ms`` or ``1%``, which stays text: who declares the field reads the unit.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import re
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from .errors import SpecError, nearest

T = TypeVar("T")

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STEP = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*(?:\((.*)\))?", re.DOTALL)
_FIELD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.+)", re.DOTALL)
# As YAML spells them, and the documentation.
_WORDS = {"true": True, "false": False}
_QUANTITY = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+) ?(?:%|[A-Za-z]+)", re.ASCII)
_TOKEN = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|.", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Call:
    """One step as spelled: a word and its fields. Tuples become lists, so that text and YAML give equal calls.

    Raises:
        SpecError: the word or a key is not a plain name, or a value is no literal (or not finite).
    """

    word: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.word, *self.fields):
            if not isinstance(name, str) or not _WORD.fullmatch(name):
                raise SpecError(f"{name!r} is not a name; expected letters, digits and underscores, e.g. quantize.")
        object.__setattr__(self, "fields", {key: _plain(value, f"{self.word}({key}=...)") for key, value in self.fields.items()})


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SpecError(f"{where}: {value!r} came; expected a finite number.")
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, Call):
        return value
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    raise SpecError(f"{where}: {value!r} came; expected a number, text, True, False, None, lists and text-keyed dicts of them, or a step.")


# Text ---------------------------------------------------------------------------------------------------------------------------


def parse(text: str) -> list[Call]:
    """The calls that ``text`` spells, steps separated by ``|``; empty text gives none.

    >>> parse("prune(macs=0.5) | quantize()")
    [Call(word='prune', fields={'macs': 0.5}), Call(word='quantize', fields={})]

    Raises:
        SpecError: the text is not of the form ``word(field=value, ...) | word(...)``.
    """
    try:
        return [_parse_step(piece, text) for piece in _split(text, "|")] if text.strip() else []
    except RecursionError:
        raise SpecError(f"{text[:40]!r}... is nested too deeply; expected steps, and steps in their fields.") from None


def spell(calls: Sequence[Call]) -> str:
    """The text of ``calls``; ``parse`` gives them back.

    >>> spell([Call("limit", {"size": "1MB", "name": "a b"})])
    "limit(size=1MB, name='a b')"
    """
    return " | ".join(f"{call.word}({', '.join(f'{key}={_spell_value(value)}' for key, value in call.fields.items())})" for call in calls)


def _spell_value(value: Any) -> str:
    if isinstance(value, Call):
        return spell([value])
    return value if isinstance(value, str) and _QUANTITY.fullmatch(value) else repr(value)


def _parse_step(piece: str, text: str) -> Call:
    match = _STEP.fullmatch(piece)
    if match is None:
        raise SpecError(f"{piece!r} in {text!r} is not a step; expected word(field=value, ...) and '|' between steps, e.g. quantize().")
    word, body = match.group(1), (match.group(2) or "").strip()
    fields: dict[str, Any] = {}
    for item in _split(body, ",") if body else ():
        pair = _FIELD.fullmatch(item)
        if pair is None:
            raise SpecError(f"{item!r} in {piece!r} is not a field; expected name=value, e.g. epochs=2.")
        if pair.group(1) in fields:
            raise SpecError(f"{pair.group(1)!r} is given twice in {piece!r}; keep one.")
        fields[pair.group(1)] = _parse_value(pair.group(2), piece)
    return Call(word, fields)


def _parse_value(text: str, piece: str) -> Any:
    if _QUANTITY.fullmatch(text):
        return text
    if text in _WORDS:
        return _WORDS[text]
    try:
        with warnings.catch_warnings():  # an escape such as '\d' only warns in Python; it reads as written
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        mend = f"quote text: {text!r}" if _WORD.fullmatch(text) else "write a number, 'text', True, None, [1, 2], or a quantity like 1MB"
        if text.endswith(")") and _STEP.fullmatch(text):
            return _parse_step(text, piece)
        raise SpecError(f"{text!r} in {piece!r} is not a value; {mend}.") from None


def _split(text: str, separator: str) -> list[str]:
    """The stripped pieces of ``text`` between separators that stand outside quotes and brackets."""
    pieces, piece, depth = [], "", 0
    for token in _TOKEN.findall(text):
        depth += (token in "([{") - (token in ")]}")
        if token in "'\"" or depth < 0:
            break
        if token == separator and depth == 0:
            pieces.append(piece.strip())
            piece = ""
        else:
            piece += token
    else:
        if depth == 0:
            return [*pieces, piece.strip()]
    raise SpecError(f"the brackets or quotes of {text!r} do not match; expected word(field=value, ...) and '|' between steps.")


# YAML ---------------------------------------------------------------------------------------------------------------------------


def to_yaml(calls: Sequence[Call]) -> str:
    """The YAML of ``calls``: a list of ``word: {field: value}``; a value that is a step is such a mapping itself."""
    return yaml.safe_dump([_as_mapping(call) for call in calls], sort_keys=False)


def _as_mapping(call: Call) -> dict[str, Any]:
    return {call.word: {key: _as_mapping(value) if isinstance(value, Call) else value for key, value in call.fields.items()}}


def from_yaml(text: str) -> list[Call]:
    """The calls of a YAML list whose items are ``word: {field: value}`` or a word alone.

    Raises:
        SpecError: the text is not YAML, gives a key twice, or has another form.
    """
    try:
        items = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(items, list):
        raise SpecError(f"the YAML is a {type(items).__name__}; expected a list of steps, e.g. '- quantize: {{activations: dynamic}}'.")
    return [_yaml_step(item) for item in items]


def _yaml_step(item: Any) -> Call:
    if isinstance(item, str):
        return Call(item)
    if isinstance(item, dict) and len(item) == 1:
        word, fields = next(iter(item.items()))
        if fields is None or isinstance(fields, dict):
            return Call(word, fields or {})
    raise SpecError(f"the YAML step {item!r} is not a step; expected a word, or one word with its fields: '- prune: {{macs: 0.5}}'.")


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice; keep one", node.start_mark)
        return super().construct_mapping(node, deep)


# Declared classes ---------------------------------------------------------------------------------------------------------------


@dataclass_transform(frozen_default=True, field_specifiers=(Field, dataclasses.field))
def frozen(cls: type[T]) -> type[T]:
    """Declare a technique, target or fact: a frozen, validated dataclass that refuses unknown fields.

    A wrong value or field given to the constructor raises SpecError, as :func:`build` does.
    """
    made = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", validate_default=True, ser_json_inf_nan="strings"))(cls)
    validate: Callable[..., None] = made.__init__

    @functools.wraps(validate)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        try:
            validate(self, *args, **fields)
        except ValidationError as error:
            raise SpecError(explain(error, cls, cls.__name__)) from None

    made.__init__ = __init__  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


def build(cls: type[T], fields: Mapping[str, Any], what: str) -> T:
    """An instance of a :func:`frozen` class from plain fields; ``what`` names it in messages.

    Raises:
        SpecError: a field does not exist (the nearest is named), is missing, or has a wrong value.
    """
    try:
        return adapter(cls).validate_python(dict(fields))
    except ValidationError as error:
        raise SpecError(explain(error, cls, what)) from None


def fields_of(instance: Any) -> dict[str, Any]:
    """The fields of a :func:`frozen` instance that differ from their defaults, in the order declared."""
    changed = {}
    for name, field in type(instance).__pydantic_fields__.items():
        value = getattr(instance, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            changed[name] = value
    return changed


@functools.cache
def adapter(cls: type[T]) -> TypeAdapter[T]:
    """The validator and JSON writer of a :func:`frozen` class."""
    return TypeAdapter(cls)


def explain(error: ValidationError, cls: type, what: str) -> str:
    """What a validation error says, in our words: what came, what was expected, the nearest field."""
    known = [field.name for field in dataclasses.fields(cls)]
    return "; ".join(_explain_one(problem, known, what) for problem in error.errors(include_url=False))


def _explain_one(problem: Any, known: list[str], what: str) -> str:
    first, *rest = problem["loc"] or ("",)
    first = known[first] if isinstance(first, int) and first < len(known) else first  # an argument given by position
    place = ".".join(map(str, [first, *rest]))
    if problem["type"] in ("unexpected_keyword_argument", "unexpected_positional_argument"):
        mend = nearest(place, known) if known else "it takes none."
        return f"{what} has no field {place!r}; {mend}"
    if problem["type"] == "missing":
        return f"{what} needs the field {place!r}."
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").replace("Input should be", "expected", 1)
    return f"{what}: {place + '=' * bool(place)}{reprlib.repr(problem['input'])} came; {expected}."
