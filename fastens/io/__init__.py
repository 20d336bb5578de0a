"""Which weights a file means: containers, the complete sets of weights in them, and the choice of one.

Files are read in one order: a container becomes a :class:`~fastens.io.contents.Contents`, a flat table of tensors
under their full names (:mod:`fastens.io.containers`, :mod:`fastens.io.folders`); wherever the network's names occur in
it with the network's shapes is a candidate (:mod:`fastens.io.candidates`), whose prefix says whether it is an average
(:mod:`fastens.io.names`); one candidate is chosen (:mod:`fastens.io.choice`). What is not understood is an error.
"""
