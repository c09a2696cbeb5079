"""Being inside a simulated world."""
