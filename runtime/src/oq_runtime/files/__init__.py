"""Bodies and private directories on this host. May import ``core`` and ``wire``."""
