"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A frozen group of keys that rejects those it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
