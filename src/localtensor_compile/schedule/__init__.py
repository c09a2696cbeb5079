"""What ranks say to each other, in order, and what of it would fail on a cluster."""
