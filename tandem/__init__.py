"""What a user imports, `from tandem import PolicyModel`, and types, `tandem`.

Nothing is loaded before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tandem.model.policy_model import PolicyModel

__all__ = ["PolicyModel"]


def __getattr__(name: str) -> object:
    if name == "PolicyModel":
        from tandem.model.policy_model import PolicyModel

        return PolicyModel
    raise AttributeError(f"module 'tandem' has no attribute {name!r}")
