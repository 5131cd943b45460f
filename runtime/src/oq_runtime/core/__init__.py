"""Pure decisions: no I/O, no clock, no chance. May import ``errors`` alone."""
