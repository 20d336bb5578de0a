"""The fold: the member is a hidden dimension of every tensor that a network's code meets.

``tensor`` is a tensor with one value per member that looks like one member's. ``dispatch`` is what a torch function
does to it inside a pass, ``handlers`` what it does outside of one. ``rules`` evaluates functions for all members at
once, by families; ``slices`` does so entry by entry where there is no rule. ``writes`` is writing in
place, ``dropouts`` what dropouts drop, ``callsite`` who called.
"""
