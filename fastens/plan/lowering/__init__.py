"""From a recording to a graph: what each operation becomes, and what is computed on the way into what."""
