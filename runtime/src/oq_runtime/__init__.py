"""ZeroMQ master/worker execution for the OpenQuake engine."""

__version__ = "0.1.0"
