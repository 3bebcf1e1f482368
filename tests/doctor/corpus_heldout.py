"""A corpus written after the doctor, from its documentation, by someone who had not seen the first one."""

from tests.doctor.heldout import (
    composition,
    modes,
    placement,
    population,
    settings,
    steps,
    stored,
    values,
)
from tests.doctor.heldout.healthy import HEALTHY

__all__ = ["HEALTHY", "SICK"]

FAMILIES = (placement, settings, stored, modes, population, values, steps, composition)
SICK = [case for family in FAMILIES for case in family.SICK]
