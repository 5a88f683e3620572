"""What deployments and the application are called; others find them by these names."""

APPLICATION = "dsmoe"
"""Of ``dsmoe serve``; a config for ``serve deploy`` names its own."""
CONTROLLER, GATEWAY, ROUTER, HOST = "ReplicaController", "Gateway", "RouterService", "ExpertHost"
