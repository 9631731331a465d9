"""What every configuration in this project is: frozen, and strict about its keys."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
