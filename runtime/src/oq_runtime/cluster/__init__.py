"""The agents of the cluster as an administrator sees them."""
