"""Plans: a folded pass recorded once and run again as a flat list of native steps, without Python in between."""
