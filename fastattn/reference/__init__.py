"""Dense oracles: the definition of what every op means."""
