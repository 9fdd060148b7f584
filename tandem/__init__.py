"""The package that users import (`from tandem import PolicyModel`) and the command `tandem`.

Attributes load on first use, so that importing the package imports no torch.
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
