"""What a sampler family demands of a model beyond calling it: one file per family."""
