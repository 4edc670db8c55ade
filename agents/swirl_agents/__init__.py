"""Policies (scripted, human, local models) and the rollout that lets them act."""
