"""Runs on Kubernetes: KubeRay's RayJob, rendered from types, applied, watched and cancelled."""
