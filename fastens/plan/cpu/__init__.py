"""Plans on a CPU: steps of a compiled program, with packed weights, in one arena."""
