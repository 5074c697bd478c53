"""Agents: the only place where configuration meets models."""
