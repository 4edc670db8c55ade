"""The object behind a name of the form `module:attribute`, and the name of an object."""

from importlib import import_module
from typing import Any

from swirl_env.errors import ConfigError, UnknownNameError, near


def load_object(name: str, what: str) -> Any:
    """The object behind `module:attribute`. Raises `ConfigError` that says which half was not found."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{what} {name!r}: write it as 'module:attribute', such as 'mine:population'.")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"{what} {name!r}: cannot import {module!r} ({error}). Is it on PYTHONPATH?") from error
    except AttributeError:
        public = [known for known in dir(import_module(module)) if not known.startswith("_")]
        raise UnknownNameError(
            f"{what} {name!r}: the module {module} has no {attribute!r}.{near(attribute, public)}"
        ) from None


def name_of(value: Any) -> str | None:
    """`module:attribute` by which `load_object` finds an object, or the class of one without state; else `None`."""
    found = getattr(value, "function", value)
    if not hasattr(found, "__qualname__") and not getattr(found, "__dict__", True):
        found = type(found)
    module, attribute = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
    if module in (None, "__main__") or not attribute.isidentifier():
        return None
    try:
        known = getattr(import_module(module), attribute, None)
    except ImportError:
        return None
    return f"{module}:{attribute}" if known is value or known is found else None
