"""A value per rank: tensors, ints, and how to take them apart. Knows nothing about worlds."""
