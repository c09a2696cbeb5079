"""The compiled DTensor scoreboard: every op of torch's OpInfo database on DTensors."""
