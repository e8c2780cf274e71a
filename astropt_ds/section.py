"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Stage = Annotated[int, Field(ge=0, le=3)]  # of ZeRO
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]

T = TypeVar("T")
# None, written auto: to be settled where the run's devices are known
OrAuto = Annotated[
    T | None,
    BeforeValidator(lambda value: None if value == "auto" else value),
    PlainSerializer(lambda value: "auto" if value is None else value),
]


class Section(BaseModel):
    """A frozen group of keys that rejects those it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
