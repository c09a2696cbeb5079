"""Programs of every parallel style, for simulated and real ranks alike. See harness.py."""
