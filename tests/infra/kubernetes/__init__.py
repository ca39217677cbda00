"""A checker of Kubernetes manifests, for tests: what an API server, KubeRay and a cluster under Pod Security would refuse, without any."""
