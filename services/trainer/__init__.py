"""The trainer service: was it good, and how should the policy change?"""
