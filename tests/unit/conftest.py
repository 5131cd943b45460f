"""Hypothesis profile of the unit tests: no deadline, no example database in the work tree."""

from hypothesis import settings

settings.register_profile("unit", deadline=None, database=None, print_blob=True)
settings.load_profile("unit")
