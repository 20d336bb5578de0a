"""The language of the programs that folded passes are lowered to: what the plans write and the kernels read."""
