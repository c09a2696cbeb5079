"""Does every engine compute the same? One SPMD program, eager, compiled and on real processes."""
