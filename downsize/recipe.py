"""A recipe: techniques in the order they are applied, with one spelling in Python, text and YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from . import spec
from .errors import SpecError, nearest

if TYPE_CHECKING:
    from .network.network import Network
    from .task import Task


class Technique(Protocol):
    """What a technique is: a frozen dataclass that turns a network into a network. It does not change the one it is given."""

    def __call__(self, network: Network, task: Task) -> Network:
        """The changed network."""
        ...


Techniques = Mapping[str, type[Any]]


def _shipped() -> Techniques:
    from .techniques import TECHNIQUES  # they need torch; a recipe over another table does not

    return TECHNIQUES


@dataclass(frozen=True)
class Recipe:
    """Techniques in order. ``techniques`` maps words to classes; the default is downsize's own table.

    ``Recipe.parse(str(recipe)) == recipe == Recipe.from_yaml(recipe.to_yaml())``. A recipe without steps leaves the model as it is.

    Raises:
        SpecError: a step is not an instance of a class of the table.
    """

    steps: tuple[Technique, ...]
    techniques: Techniques = field(default_factory=_shipped, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        self._calls()

    @classmethod
    def parse(cls, text: str, techniques: Techniques | None = None) -> Recipe:
        """The recipe that ``text`` spells, e.g. ``"prune(macs=0.5) | quantize()"``.

        Raises:
            SpecError: the text cannot be read, or a word, field or value is not known; the nearest is named.
        """
        return cls._of(spec.parse(text), techniques)

    @classmethod
    def from_yaml(cls, text: str, techniques: Techniques | None = None) -> Recipe:
        """The recipe of a YAML list such as ``- prune: {macs: 0.5}``.

        Raises:
            SpecError: the YAML cannot be read, or a word, field or value is not known; the nearest is named.
        """
        return cls._of(spec.from_yaml(text), techniques)

    @classmethod
    def _of(cls, calls: Sequence[spec.Call], techniques: Techniques | None) -> Recipe:
        known = _shipped() if techniques is None else techniques
        return cls(tuple(_built(call, known) for call in calls), known)

    def to_yaml(self) -> str:
        """The YAML of the recipe; fields at their defaults are left out."""
        return spec.to_yaml(self._calls())

    def _calls(self) -> list[spec.Call]:
        return [self._call(step) for step in self.steps]

    def _call(self, step: Any) -> spec.Call:
        word, fields = self._word(step), spec.fields_of(step)
        for key, value in fields.items():
            if type(value) in self.techniques.values():
                fields[key] = self._call(value)
            elif hasattr(value, "__pydantic_fields__"):
                words = sorted(word for word, known in self.techniques.items() if issubclass(known, type(value)))
                raise SpecError(f"{word}({key}=...): a {type(value).__name__} has no word in recipes; expected one of {', '.join(words) or 'them'}.")
        return spec.Call(word, fields)

    def _word(self, step: Technique) -> str:
        for word, technique in self.techniques.items():
            if type(step) is technique:
                return word
        raise SpecError(f"{step!r} is not an instance of a technique of the table; known: {', '.join(sorted(self.techniques))}.")

    def __str__(self) -> str:
        return spec.spell(self._calls())

    def __iter__(self) -> Iterator[Technique]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def _built(call: spec.Call, known: Techniques) -> Any:
    """The technique a call spells. A field may hold one, too: as a call, or, from YAML, as a mapping of one technique's word to its fields."""
    if call.word not in known:
        raise SpecError(f"there is no technique {call.word!r}; {nearest(call.word, known)}")
    fields = dict(call.fields)
    for key, value in fields.items():
        if isinstance(value, Mapping) and len(value) == 1:
            ((word, inner),) = value.items()
            if word in known and (inner is None or isinstance(inner, Mapping)):
                value = spec.Call(word, dict(inner or {}))
        if isinstance(value, spec.Call):
            fields[key] = _built(value, known)
    try:
        return spec.build(known[call.word], fields, call.word)
    except SpecError:
        for key, value in call.fields.items():
            _refuse_unknown_step(f"{call.word}({key}=...)", value, known)
        raise


def _refuse_unknown_step(where: str, value: Any, known: Techniques) -> None:
    """Say it more plainly where a value was perhaps meant to be a step."""
    if isinstance(value, str) and value in known:
        raise SpecError(f"{where}: {value!r} came; expected a step, {value}() in text, {{{value}: {{}}}} in YAML.")
    if isinstance(value, Mapping) and len(value) == 1:
        ((word, inner),) = value.items()
        if word not in known and (inner is None or isinstance(inner, Mapping)):
            raise SpecError(f"{where}: there is no technique {word!r}; {nearest(word, known)}")
