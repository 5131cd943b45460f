"""A module to preload whose import has no end where HANGS is set, as on a dead mount."""

from __future__ import annotations

import os
import time

while os.environ.get("HANGS"):
    time.sleep(1)
