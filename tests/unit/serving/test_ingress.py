import os
import subprocess

from dsmoe_ray.serving.on_ray import ingress

CONFIG = """
frontend prometheus
    bind :9101
frontend http_frontend
    bind 0.0.0.0:8000
listen stats
  bind *:8404
"""


def test_haproxy_shows_its_statistics_on_loopback_alone(tmp_path, monkeypatch):
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "so that it is forgotten afterwards")
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH")
    monkeypatch.setattr(ingress.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(ingress, "get_haproxy_binary", lambda: "/bin/echo")
    ingress.keep_statistics_local()
    wrapper = os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
    done = subprocess.run([wrapper, "-db", "-f", str(config), "-x"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-db", "-f", str(config), "-x"]
    binds = [line.split()[1] for line in config.read_text().splitlines() if "bind" in line]
    assert binds == ["127.0.0.1:9101", "0.0.0.0:8000", "127.0.0.1:8404"]
