"""Fixtures shared with the tests of both services: replicas on a fake engine, a real policy."""

from tests.rollout.conftest import serve, service
from tests.trainer.conftest import learner, loaded_learner, policy, samples

__all__ = ["learner", "loaded_learner", "policy", "samples", "serve", "service"]
