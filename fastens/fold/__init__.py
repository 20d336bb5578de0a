"""The fold: a member's own network, evaluated once with the member as a hidden dimension of every tensor.

``tensor`` is a tensor with one value per member, ``dispatch`` is what a torch function does to it, ``rules`` does so by
families of functions. ``alike`` compares members, ``members`` stacks them, ``tables`` holds the stacks where a module
keeps its tensors. ``engine`` evaluates: ``first`` holds a first call against the members, ``planned`` keeps recorded
passes, ``drawn`` gives each row its own member, ``compiled`` is the pass inside ``torch.compile``.
"""
