"""Replicas of Ray Serve: thin shells around the plain classes of ``serving``, one module a deployment.

Each module imports only what its own process needs. Must not know how deployments are put together; see ``app.py``.
"""
