"""Models by name: what there is, what lies here, how the rest is fetched."""
