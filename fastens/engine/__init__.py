"""Evaluating all members: which way a call takes, and what makes sure that it is the loop's answer.

``evaluator`` decides. ``first`` holds a first call against the members run one by one. ``planned`` keeps recorded
passes, ``guards`` says while they are true, and ``calls`` runs one call as a plan. ``drawn`` gives each row its own
member, ``row_by_row`` is deterministic mode, ``masks`` are members that are dropout masks, ``transformed`` are calls
under torch.func, and ``compiled`` is the pass inside ``torch.compile``. ``arguments`` and ``leaves`` are what goes in
and what comes out.
"""
