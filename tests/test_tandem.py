"""What importing Tandem loads."""

from __future__ import annotations

import subprocess
import sys


def test_importing_tandem_imports_no_torch() -> None:
    program = "import sys, tandem; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_policy_model_is_exported() -> None:
    from tandem import PolicyModel
    from tandem.model.policy_model import PolicyModel as Expected

    assert PolicyModel is Expected
