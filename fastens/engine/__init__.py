"""Evaluating all members: which way a call takes, and what makes sure that it is the loop's answer.

``engine`` decides, by the ``states`` of signatures. ``stacked`` holds the members and calls one of them, ``folding``
runs passes of all, and ``kinds`` says what members have for themselves: weights, or as ``masked`` has it dropout
masks. ``first`` holds a first call against the members run one by one. ``planned`` keeps recorded passes, ``guards``
says while they are true, and ``calls`` runs one call as a plan. ``drawn`` gives each row its own member,
``row_by_row`` is deterministic mode, ``transformed`` are calls under torch.func, and ``compiled`` is the pass inside
``torch.compile``. ``arguments`` and ``leaves`` are what goes in and what comes out.
"""
