"""Replicas on a fake engine and a real policy, as the tests of both services have them."""

from tests.rollout.conftest import serve, service
from tests.trainer.conftest import learner, loaded_learner, policy, samples

__all__ = ["learner", "loaded_learner", "policy", "samples", "serve", "service"]
