"""Adaptive ODE solvers, which need a field that is the same function at every evaluation.

Such a solver estimates its own error from evaluations that it takes to belong to one field. A field that is drawn anew
at each evaluation makes it shrink its steps without end, or return a likelihood of no model at all.
"""

from types import FrameType

from fastens.fold.callsite import callers

# Module prefix -> what the qualified name of an adaptive solver's function contains there.
_SOLVERS = {
    "scipy.integrate": "",
    "torchdiffeq.": "Adaptive",
    "torchdyn.": "_adaptive_odeint",
    "k_diffusion.": "dpm_solver_adaptive",
}


def _is_adaptive(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    if module == "torchsde._core.base_solver":
        return bool(getattr(frame.f_locals.get("self"), "adaptive", False))
    return any(module.startswith(prefix) and part in frame.f_code.co_qualname for prefix, part in _SOLVERS.items())


def adaptive_solver() -> str | None:
    """The adaptive solver of a known library that is calling, ``module.function``, or none.

    A solver calls its field as it calls any function, and says nothing of itself, so only its frames tell.
    """
    solver = next(filter(_is_adaptive, callers()), None)
    return None if solver is None else f"{solver.f_globals['__name__']}.{solver.f_code.co_qualname}"


def refuse_adaptive(what: str, remedy: str) -> None:
    """Raise if an adaptive solver is calling.

    Args:
        what: what changes from one evaluation to the next.
        remedy: what to do instead.

    Raises:
        RuntimeError: names the solver.
    """
    solver = adaptive_solver()
    if solver is not None:
        raise RuntimeError(
            f"{what} at every evaluation, and {solver} is an adaptive solver, which needs one field; {remedy}, or take "
            "a solver of fixed steps"
        )
