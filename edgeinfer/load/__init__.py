"""A load on a server of any make, and what its users would have felt. Knows no engine."""
