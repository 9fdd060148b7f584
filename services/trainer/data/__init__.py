"""Prompts and preference pairs, from files to rows in a fixed order."""
