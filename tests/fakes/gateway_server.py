"""The gateway behind a real HTTP server on a free port, with one real engine for a router."""

import asyncio
import threading
from contextlib import contextmanager
from pathlib import Path

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.serving.config import HttpConfig
from dsmoe_ray.serving.gateway import Gateway
from dsmoe_ray.serving.http_app import build_http_app
from dsmoe_ray.serving.http_server import HttpServer
from dsmoe_ray.serving.openai_api.served_model import load_served_model
from tests.fakes.engine_pool import EnginePool

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class GatewayServer:
    """A running server; ``call`` runs something on its event loop."""

    def __init__(self, directory: Path, *, pool=None, engine_config=None, authorize=None, max_sequences=32, **http):
        self.model = load_served_model(directory, name="tiny")
        self.pool = pool or EnginePool(load_engine(load_artifact(directory), engine_config or EngineConfig()))
        self.config = HttpConfig(port=0, **http)
        self.unready = None
        self._settings = authorize, max_sequences
        self._started, self._stop = threading.Event(), None
        self._failure = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(60)
        if self._failure:
            raise self._failure

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def close(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self.pool.close()

    async def _serve(self):
        authorize, max_sequences = self._settings
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.gateway = Gateway(
                self.pool,
                self.model,
                self.config,
                max_sequences=max_sequences,
                explain_unready=lambda: self.unready,
            )
            server = HttpServer(build_http_app(self.gateway, authorize=authorize), self.config)
            self.url = await server.start()
        except Exception as error:
            self._failure = error
            return
        finally:
            self._started.set()
        await self._stop.wait()
        await server.stop()


@contextmanager
def run_gateway(directory: Path, **settings):
    server = GatewayServer(directory, **settings)
    try:
        yield server
    finally:
        server.close()
