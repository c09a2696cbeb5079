"""Runs the programs of a bundle: of all ranks in one process, or of one real rank."""
