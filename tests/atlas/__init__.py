"""Public network classes, small, each held against a plain loop over its members."""
