"""What every configuration in this project is: frozen, and strict about its keys."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from halora.errors import UserError
from halora.secret_urls import hidden


class StrictModel(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, field docstrings kept as descriptions.

    Configurations are recorded, so a URL with a secret in it is refused wherever it stands.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, given: Any) -> Any:
        if isinstance(given, dict) and (names := [str(name) for name, value in given.items() if _has_secret(value)]):
            raise UserError(
                [f"{name}: holds a URL with a password or a token, which would be recorded" for name in names]
            )
        return given


def _has_secret(value: Any) -> bool:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str) and ":" in each and hidden(each) != each:
            return True
        if isinstance(each, dict | list | tuple):
            waiting += each.values() if isinstance(each, dict) else each
    return False
