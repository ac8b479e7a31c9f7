"""What the user wants of the file: the runtime it runs in and the limits it must meet, with their units.

Inside, sizes are bytes (1 MB = 10^6 bytes, 1 MiB = 2^20), times are seconds, losses of score are fractions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal, DecimalException
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from .errors import TargetError, nearest
from .spec import frozen

_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*", re.ASCII | re.DOTALL)
_SIZES = {"B": Decimal(1), "kB": Decimal(10**3), "MB": Decimal(10**6), "GB": Decimal(10**9)}
_BINARY_SIZES = {"KiB": Decimal(2**10), "MiB": Decimal(2**20), "GiB": Decimal(2**30)}
_TIMES = {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6"), "ns": Decimal("1e-9")}
_MICROSECONDS = {"\u00b5s": Decimal("1e-6"), "\u03bcs": Decimal("1e-6")}  # the micro sign and the Greek letter
_FRACTIONS = {"": Decimal(1), "%": Decimal("0.01")}
_LARGEST = 10**18  # beyond every file, wait and memory; keeps a slip such as 1e999MB from becoming a giant integer


def parse_size(value: str | float, what: str = "size") -> int:
    """Bytes from ``"5.2 MB"`` or from a number of bytes; upper and lower case are the same.

    >>> parse_size("5.2MB"), parse_size("1 MiB"), parse_size(512)
    (5200000, 1048576, 512)

    Raises:
        TargetError: no unit, an unknown unit, not a number, or less than one byte.
    """
    amount = _read(value, _SIZES | _BINARY_SIZES, what, "5.2 MB")
    if amount < 1:
        raise TargetError(f"{what}={value!r} is less than one byte; expected a positive size, e.g. {what}='5.2 MB'.")
    return int(amount)


def parse_time(value: str | float, what: str = "time") -> float:
    """Seconds from ``"5 ms"`` or from a number of seconds.

    >>> parse_time("3.4ms"), parse_time(0.005)
    (0.0034, 0.005)

    Raises:
        TargetError: no unit, an unknown unit, not a number, zero or negative.
    """
    seconds = float(_read(value, _TIMES | _MICROSECONDS, what, "5 ms"))
    if seconds <= 0:
        raise TargetError(f"{what}={value!r} is not positive; expected a time, e.g. {what}='5 ms'.")
    return seconds


def parse_fraction(value: str | float, what: str = "fraction") -> float:
    """A fraction from ``"5 %"`` or from a number.

    >>> parse_fraction("5%"), parse_fraction("0.05"), parse_fraction(0.05)
    (0.05, 0.05, 0.05)

    Raises:
        TargetError: an unknown unit, not a number, or negative.
    """
    amount = _read(value, _FRACTIONS, what, "5 %")
    if amount < 0:
        raise TargetError(f"{what}={value!r} is negative; expected a fraction, e.g. {what}='5 %' or {what}=0.05.")
    return float(amount)


def _read(value: Any, units: Mapping[str, Decimal], what: str, example: str) -> Decimal:
    """The amount in base units. Text needs one of ``units``; a number is in base units already."""
    try:
        if isinstance(value, str):
            amount = _read_text(value, units, what, example)
        elif isinstance(value, bool):
            raise TypeError
        else:
            amount = Decimal(repr(float(value)))
        if abs(amount) < _LARGEST:
            return amount
    except (TypeError, ValueError, DecimalException):
        pass
    raise TargetError(f"{what}={value!r} makes no sense; expected a finite quantity, e.g. {what}={example!r}.")


def _read_text(value: str, units: Mapping[str, Decimal], what: str, example: str) -> Decimal:
    match = _QUANTITY.fullmatch(value)
    if match is None:
        raise TargetError(f"{what}={value!r} is not a quantity; expected a number and a unit, e.g. {what}={example!r}.")
    number, unit = match.groups()
    factors = {name.lower(): factor for name, factor in units.items()}
    if unit.lower() in factors:
        return Decimal(number) * factors[unit.lower()]
    if not unit:
        raise TargetError(f"{what}={value!r} has no unit; write it with one of {', '.join(units)}, e.g. {what}={example!r}.")
    raise TargetError(f"{what}={value!r} has the unknown unit {unit!r}; {nearest(unit, filter(None, units))}")


# Showing ------------------------------------------------------------------------------------------------------------------------


def show_size(value: float, digits: int = 3, up: bool = False) -> str:
    """Bytes as text with ``digits`` significant digits; ``up`` rounds towards more, so that what is shown still covers ``value``.

    >>> show_size(5_200_000), show_size(5_201_000, up=True)
    ('5.2 MB', '5.21 MB')
    """
    return _show(value, _SIZES, digits, up)


def show_time(value: float, digits: int = 3, up: bool = False) -> str:
    """Seconds as text, e.g. ``"3.4 ms"``; ``digits`` and ``up`` as in :func:`show_size`."""
    return _show(value, _TIMES, digits, up)


def show_fraction(value: float, digits: int = 3, up: bool = False) -> str:
    """A fraction as text, e.g. ``"5 %"``; ``digits`` and ``up`` as in :func:`show_size`."""
    return _show(value, {"%": Decimal("0.01")}, digits, up)


def show_ratio(value: float, digits: int = 3, up: bool = False) -> str:
    """A ratio as text, e.g. ``"0.65"``; ``digits`` and ``up`` as in :func:`show_size`."""
    return _show(value, {"": Decimal(1)}, digits, up).rstrip()


SHOW: dict[str, Callable[..., str]] = {"bytes": show_size, "seconds": show_time, "fraction": show_fraction, "ratio": show_ratio}


def show(value: float, unit: str, digits: int = 3, up: bool = False) -> str:
    """A value with its unit as text; a unit that is not in ``SHOW`` follows the number as it is.

    >>> show(0.0034, "seconds"), show(0.12, "joules")
    ('3.4 ms', '0.12 joules')
    """
    return SHOW[unit](value, digits, up) if unit in SHOW else f"{show_ratio(value, digits, up)} {unit}".rstrip()


def _show(value: float, units: Mapping[str, Decimal], digits: int, up: bool) -> str:
    amount = Decimal(repr(float(value)))  # the shortest decimal of the float: 0.07 stays 0.07 when rounded up
    if not amount.is_finite():
        return f"{float(value)} {min(units, key=units.__getitem__)}"
    if amount:
        step = Decimal(1).scaleb(amount.adjusted() - digits + 1)
        amount = amount.quantize(step, rounding=ROUND_CEILING if up else ROUND_HALF_EVEN)
    fitting = [unit for unit, factor in units.items() if abs(amount) >= factor] or [min(units, key=units.__getitem__)]
    unit = max(fitting, key=units.__getitem__)
    return f"{(amount / units[unit]).normalize():f} {unit}"


# The target ---------------------------------------------------------------------------------------------------------------------


@frozen
class Limit:
    """The value of the measurement ``name`` may be ``at_most`` this, in ``unit`` (bytes, seconds, fraction or ratio)."""

    name: str
    at_most: float
    unit: str

    def __str__(self) -> str:
        return f"{self.name} at most {show(self.at_most, self.unit, digits=6)}"


LIMITS = {"size": "bytes", "latency": "seconds", "latency_ratio": "ratio", "memory": "bytes", "drop": "fraction"}
"""The limits a target can set, in the order they are judged, and the unit of each."""


def _ratio(value: Any) -> float:
    ratio = parse_fraction(value, "latency_ratio")
    if not 0 < ratio <= 10:
        raise TargetError(
            f"latency_ratio={value!r} makes no sense; expected the artifact's latency as a part of the fp32 latency, "
            "above 0 and at most 10, e.g. latency_ratio=0.65 or '65 %'."
        )
    return ratio


def _drop(value: Any) -> float:
    drop = parse_fraction(value, "drop")
    if drop > 1:
        raise TargetError(f"drop={value!r} is more than 100 %; expected a loss of score from 0 to 100 %, e.g. drop='5 %' or drop=0.05.")
    if drop == 1 and not isinstance(value, float) and "%" not in str(value):
        raise TargetError(f"drop={value!r} could mean 1 % or 100 %; write drop='1 %' or drop='100 %'.")
    return drop


def _count(name: str) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        text = str(value).strip()
        if isinstance(value, bool) or not text.isdecimal() or not 1 <= int(text) <= 4096:
            raise TargetError(f"{name}={value!r} makes no sense; expected a whole number from 1 to 4096, e.g. {name}=1.")
        return int(text)

    return check


def _runtime(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TargetError(f"runtime={value!r} is not a name; expected one of those that `downsize runtimes` lists, e.g. 'onnxruntime'.")
    return value.strip()


def _optional(parse: Callable[[Any], Any]) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else parse(value))


@frozen
class Target:
    """Where the file must run and the limits it must meet; None means no limit.

    ``size``: bytes of the file. ``latency``: median time of one call with ``batch`` samples. ``latency_ratio``: that time divided by
    the fp32 model's in the same runtime. ``memory``: peak memory that opening and running the file adds to a fresh process.
    ``drop``: absolute loss of score against the original model (0.75 to 0.70 is 5 %). Quantities are text with a unit, or numbers in
    bytes, seconds and fractions.

    >>> Target(size="5.2 MB", latency="5 ms", drop="5 %").limits()[1]
    Limit(name='latency', at_most=0.005, unit='seconds')

    Raises:
        TargetError: a limit makes no sense (negative, NaN, without unit, unknown unit, zero, a drop above 100 %).
        SpecError: a field that does not exist.
    """

    runtime: Annotated[str, BeforeValidator(_runtime)] = "onnxruntime"
    threads: Annotated[int, BeforeValidator(_count("threads"))] = 1
    size: Annotated[int | None, _optional(parse_size)] = None
    latency: Annotated[float | None, _optional(lambda value: parse_time(value, "latency"))] = None
    latency_ratio: Annotated[float | None, _optional(_ratio)] = None
    memory: Annotated[int | None, _optional(lambda value: parse_size(value, "memory"))] = None
    drop: Annotated[float | None, _optional(_drop)] = None
    batch: Annotated[int, BeforeValidator(_count("batch"))] = 1

    if TYPE_CHECKING:  # the fields hold parsed numbers, the constructor takes text too

        def __init__(
            self,
            runtime: str = "onnxruntime",
            threads: int = 1,
            size: str | float | None = None,
            latency: str | float | None = None,
            latency_ratio: str | float | None = None,
            memory: str | float | None = None,
            drop: str | float | None = None,
            batch: int = 1,
        ) -> None: ...

    def limits(self) -> tuple[Limit, ...]:
        """The limits that are set, in the order size, latency, latency_ratio, memory, drop."""
        return tuple(Limit(name, getattr(self, name), unit) for name, unit in LIMITS.items() if getattr(self, name) is not None)

    def __str__(self) -> str:
        where = f"{self.runtime}, {self.threads} thread{'s' * (self.threads > 1)}, batch {self.batch}"
        return ", ".join([where, *map(str, self.limits())])
