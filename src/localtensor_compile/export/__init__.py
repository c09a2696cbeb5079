"""torch.export of programs with LocalTensors, and plain exported programs of single ranks."""
