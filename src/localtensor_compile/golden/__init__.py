"""Graphs of all ranks as text that people keep: folded, canonical, and compared by meaning."""
