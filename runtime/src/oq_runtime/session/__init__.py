"""The processes of a job: its engine's client and its broker."""
