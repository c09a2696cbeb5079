"""Graphs of all ranks as Dynamo and AOTAutograd made them, and each rank's program in them."""
