"""Layers on real ranks: a runner that outlives its ranks, cases on meshes, verdicts by rank."""
