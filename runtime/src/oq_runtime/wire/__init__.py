"""What travels between processes, and how. May import ``errors`` alone."""
