"""Kubernetes: the manifests of a run, and the run on the other side."""
