"""The OpenAI-compatible vocabulary: bodies of requests, what they ask of the engine, and how answers are written.

Must not know HTTP connections, pools of routers or Ray: values in, values and bytes out.
"""
