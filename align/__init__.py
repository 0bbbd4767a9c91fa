"""Run the torch model and the Paddle model on the same inputs, stage by stage, and say whether they are the same.

For nets of your own: ``from align import align_models, assert_aligned, load_weights``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library import align_models, assert_aligned, load_weights

__all__ = ["align_models", "assert_aligned", "load_weights"]


def __getattr__(name: str) -> Any:
    """Imported when asked for, so that ``python -m align.<stage> --help`` need not wait for numpy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import library
    return getattr(library, name)
