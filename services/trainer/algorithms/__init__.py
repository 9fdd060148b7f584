"""Advantages and losses as pure functions of numbers: one short file per algorithm."""
