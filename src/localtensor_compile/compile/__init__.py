"""torch.compile on LocalTensors: what happens between AOTAutograd and Inductor."""
