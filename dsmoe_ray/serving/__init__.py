"""A published model behind an OpenAI-compatible endpoint: gateways, routers, expert hosts and what scales them.

Must not know training. Ray stays in ``app.py``; everything else is plain classes that run and are tested without it.
"""
