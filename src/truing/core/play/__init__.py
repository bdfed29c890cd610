"""Dialogues and environments: agents, turns, episodes."""
