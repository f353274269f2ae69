"""Errors that a user can act on: what happened, what was seen, what to do."""

import importlib
from types import ModuleType


class PastinaError(Exception):
    """Base of every error that pastina raises on purpose; its text is one readable sentence or two."""


class RecipeError(PastinaError):
    """A recipe, an option or an override does not make sense."""


class DataError(PastinaError):
    """A file, a row or a text cannot be used; names file, line and column where there are any."""


class AdapterError(PastinaError):
    """An adapter on disk is broken, or does not fit this backbone, tokenizer or version."""


class BackboneError(PastinaError):
    """A backbone cannot be found, differs from what was expected, or has a shape we do not know."""


class PastinaWarning(UserWarning):
    """Something works, but not in the way the user may think."""


def need(module: str, extra: str) -> ModuleType:
    """The imported optional module.

    Raises:
        PastinaError: it is not installed; the text names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise PastinaError(
            f"This needs the package {module.split('.')[0]!r}, which is not installed. "
            f"Install it with: pip install 'pastina[{extra}]'"
        ) from error
