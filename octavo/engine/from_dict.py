"""Construction from untrusted names: an unknown one is refused, with the nearest known name."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self


class FromDict:
    """Gives a dataclass `from_dict`. A class may say in its own words what an unknown name is, and what it knows."""

    __slots__ = ()
    unknown_name: ClassVar[str] = "unknown field of {cls}"
    known_names: ClassVar[str] = "known fields"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """`cls(**values)`; ValueError, naming it, for a name that is no field."""
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"{cls.known_names}: {', '.join(known)}"
                raise ValueError(f"{name}: {cls.unknown_name.format(cls=cls.__name__)}; {hint}")
        return cls(**values)
