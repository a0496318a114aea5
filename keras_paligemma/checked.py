"""Dataclasses that validate their fields."""

import dataclasses
import numbers
import reprlib
from dataclasses import MISSING
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from typing import Any
from typing import Self

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: object) -> str:
    """Return the `repr` of any value for an error, shortened if long."""
    return _short.repr(value)


def is_number(value):
    """Return whether a value is a real number, of Python or NumPy."""
    return isinstance(value, numbers.Real) and type(value) is not bool


def _plain(value):
    """Return a value with Python's numbers in the place of NumPy's."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if not is_number(value):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


# A field's validation: a description for errors, and a predicate. The result is
# `Any`, since the field's annotation declares its type.


def _field(expected, fits, default, optional=False, hash=None) -> Any:
    if optional:
        expected += " or None"

    def allowed(value):
        return (optional and value is None) or fits(value)

    metadata = {"expected": expected, "allowed": allowed}
    return field(default=default, metadata=metadata, hash=hash)


def whole(most, default=MISSING, least=1, optional=False):
    def fits(value):
        is_integer = isinstance(value, numbers.Integral) and is_number(value)
        return is_integer and least <= int(value) <= most

    expected = f"an integer of {least} to {most}"
    return _field(expected, fits, default, optional)


def number(least, most, default=MISSING, optional=False):
    def fits(value):
        # No comparison holds for NaN.
        return is_number(value) and least <= value <= most

    expected = f"a number of {least} to {most}"
    return _field(expected, fits, default, optional)


def scale(default=MISSING, optional=False):
    def fits(value):
        return is_number(value) and 1e-30 <= abs(value) <= 1e30

    expected = "a number other than 0 whose size a float32 holds"
    return _field(expected, fits, default, optional)


def flag(default=MISSING):
    return _field("True or False", lambda value: type(value) is bool, default)


def choice(values, default=MISSING, optional=False):
    def fits(value):
        return isinstance(value, str) and value in values

    expected = " or ".join(map(repr, values))
    return _field(expected, fits, default, optional)


def text(default=MISSING, optional=False):
    def fits(value):
        return isinstance(value, str)

    return _field("a string", fits, default, optional)


def texts(default=MISSING, optional=False):
    def fits(value):
        listed = isinstance(value, (list, tuple))
        return listed and all(isinstance(item, str) for item in value)

    return _field("a list of strings", fits, default, optional)


def by_target(default=None):
    """Return a field for a dict of target name to one number per layer."""

    def fits(value):
        return isinstance(value, dict) and all(
            isinstance(key, str)
            and isinstance(row, (list, tuple))
            and all(is_number(number) for number in row)
            for key, row in value.items()
        )

    expected = "an object of lists of numbers"
    # Dictionaries have no hash.
    return _field(expected, fits, default, optional=True, hash=False)


def part(cls, default=MISSING) -> Any:
    return field(default=default, metadata={"part": cls})


@dataclass(frozen=True)
class Checked:
    """Base of dataclasses whose fields are validated, by `whole` and others.

    Fields are validated whenever an instance is created, so that code that
    takes an instance need not validate again. Numbers of NumPy become
    Python's, which JSON can hold.
    """

    def __post_init__(self):
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        _refuse(self.problems(values), type(self).__name__)
        for name, value in values.items():
            object.__setattr__(self, name, _plain(value))

    @classmethod
    def problems(
        cls,
        values: object,
        names: dict[str, Any] | None = None,
        prefix: str = "",
    ) -> list[str]:
        """List fields that are missing, unknown, or of a wrong type or range.

        Args:
            values: dict by field; any other type counts as an empty dict.
            names: dict of field to its name in the source, where they differ.
            prefix: str, put before other names, such as `"backbone."`.

        Returns:
            Sorted list of phrases, empty if the values are valid.
        """
        values = values if isinstance(values, dict) else {}
        known = {spec.name: spec for spec in fields(cls)}
        listed = [
            f"{prefix}{key!s:.80} is unknown" for key in values.keys() - known
        ]
        for key, spec in known.items():
            name = (names or {}).get(key, prefix + key)
            value = values.get(key, spec.default)
            part = spec.metadata.get("part")
            if value is MISSING:
                listed.append(f"{name} is missing")
            elif part is None:
                if not spec.metadata["allowed"](value):
                    listed.append(
                        f"{name} must be {spec.metadata['expected']}, "
                        f"received {shown(value)}"
                    )
            elif isinstance(value, dict):
                listed += part.problems(value, prefix=f"{name}.")
            elif not isinstance(value, part) and value is not spec.default:
                listed.append(
                    f"{name} must be an object of fields, received "
                    f"{shown(value)}"
                )
        return sorted(listed)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: object = None) -> Self:
        """Create a configuration from the dict of a file or a caller.

        Args:
            values: dict by field, with dicts for nested parts. Fields with
                a default may be missing.
            source: name for errors, such as a path.

        Returns:
            An instance of the class.

        Raises:
            ValueError: fields are missing, unknown, of a wrong type or out of
                range, all of them listed; or fields contradict each other.
        """
        source = source or cls.__name__
        problems = cls.problems(values)
        if not (problems or isinstance(values, dict)):
            # Of a class whose fields all have defaults.
            problems = [f"it must be an object of fields, not {shown(values)}"]
        _refuse(problems, source)
        values = dict(values)
        try:
            for spec in fields(cls):
                part = spec.metadata.get("part")
                if part and isinstance(values.get(spec.name), dict):
                    values[spec.name] = part.from_dict(values[spec.name])
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of plain values and dicts, for JSON."""
        return dataclasses.asdict(self)


def _refuse(problems, source):
    if problems:
        raise ValueError(
            f"{source} is no configuration that can be built: "
            f"{'; '.join(problems)}."
        )
