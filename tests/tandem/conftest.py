"""Replicas on a fake engine, as the tests of the rollout service have them."""

from tests.rollout.conftest import serve, service

__all__ = ["serve", "service"]
