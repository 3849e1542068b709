"""Settings by field, whatever group of a command's settings a field is in: `large.backbone` where a group has a name."""

from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from search.settings import field_names

Settings = TypeVar("Settings")


def composed(settings_type: type[Settings], **values: Any) -> Settings:
    """Settings with these values, and the command's defaults for the rest."""
    required = [f.name for f in fields(settings_type) if f.default is MISSING]  # type: ignore[arg-type]  # a dataclass
    return changed(settings_type(**{name: values.pop(name) for name in required if name in values}), **values)


def changed(settings: Settings, **values: Any) -> Settings:
    """The settings with these values in place of others. Raises TypeError for a field that they have not."""
    hints = get_type_hints(type(settings), include_extras=True)
    names = {f.name for f in fields(settings)}  # type: ignore[arg-type]
    groups = [name for name in names if is_dataclass(getattr(settings, name))]
    flat = [name for name in groups if hasattr(hints[name], "__metadata__")] or groups
    parts: dict[str, dict[str, Any]] = {}
    own = {}
    for field, value in values.items():
        group, _, inner = field.rpartition(".")
        owners = [group] if group else [name for name in flat if inner in field_names(type(getattr(settings, name)))]
        if field in names and (field not in groups or is_dataclass(value)):
            own[field] = value
        elif owners:
            parts.setdefault(owners[0], {})[inner] = value
        else:
            raise TypeError(f"{type(settings).__name__} has no field {field}")
    own |= {name: replace(own.get(name, getattr(settings, name)), **part) for name, part in parts.items()}
    return replace(settings, **own)  # type: ignore[type-var]
