"""The rollout service: what did the policy say?"""
