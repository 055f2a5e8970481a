"""More than one server: replicas of the ordinary one behind a router of others (docs/deployment.md)."""
