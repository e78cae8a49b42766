"""Pretrained weights that are not here: what is fetched is said at once, and a host out of reach is told soon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch

from isomorphic import pretrained
from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model
from isomorphic.pretrained import check_within_reach, out_of_reach
from isomorphic.progress import telling
from tests.faults import one_line

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "resnet10t.c3_in1k"


class Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


@pytest.fixture
def answering() -> Iterator[str]:
    """The address of a host that answers, if only that it has nothing."""
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a host that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"  # which nobody listens at any more


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the hub with nothing in it, and no proxy between us and ourselves."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub"


def test_who_answers_is_within_reach_whatever_the_answer(answering: str):
    assert out_of_reach(answering) is None


def test_who_refuses_is_out_of_reach_at_once(refusing: str):
    assert out_of_reach(refusing) == "Connection refused"


def test_who_says_nothing_is_out_of_reach_in_the_end(silent: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrained, "TRY_SECONDS", 0.3)
    assert out_of_reach(silent) in ("timed out", "no answer within 0 s")
    asked = threading.Event()
    monkeypatch.setattr(pretrained, "_refusal", lambda address, seconds: asked.wait(60))  # a name that is looked up
    assert out_of_reach(silent) == "no answer within 0 s"
    asked.set()


def test_what_is_fetched_is_said_first_and_then_what_to_do(
    refusing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub: Path
):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", refusing)
    host = refusing.removeprefix("http://")
    with telling(), pytest.raises(UserError) as error:
        build_model(describe_model(MODEL), pretrained=True)
    assert capsys.readouterr().err == f"[   0 s] fetching the pretrained weights of {MODEL} from {host}\n"
    told = one_line(error)
    assert told.startswith(f"cannot get the pretrained weights of {MODEL} from {host} (Connection refused): check the")
    assert f"copy {hub} from a machine" in told and "--no-pretrained" in told


def test_what_is_here_or_told_to_stay_offline_asks_nobody(refusing: str, monkeypatch: pytest.MonkeyPatch, hub: Path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", refusing)
    with pytest.raises(UserError):
        check_within_reach("timm", MODEL)
    snapshot = hub / f"models--timm--{MODEL}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    check_within_reach("timm", MODEL)
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_within_reach("timm", MODEL)


def test_weights_of_torchvision_are_files_of_torch_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []
    monkeypatch.setattr(pretrained, "out_of_reach", lambda address: asked.append(address) or "no route")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="weights of mobilenet_v2 from download.pytorch.org .no route"):
        check_within_reach("torchvision", "mobilenet_v2", "IMAGENET1K_V1")
    (address,) = asked
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / address.rpartition("/")[2]).touch()
    check_within_reach("torchvision", "mobilenet_v2", "IMAGENET1K_V1")
    check_within_reach("torchvision", "mobilenet_v2", "NO_SUCH_WEIGHTS")  # torchvision itself says so
    assert len(asked) == 1


def test_a_command_without_a_network_ends_with_what_to_do(refusing: str, tmp_path: Path):
    words = [str(REPOSITORY / "evaluate.py"), "--model", MODEL, "--dataset", "synthetic", "--workers", "0"]
    environment = os.environ | {"HF_ENDPOINT": refusing, "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    first, second, last = done.stderr.splitlines()[-3:]
    assert done.returncode == 1 and first.endswith(f"s] opening {MODEL}")
    assert second.endswith(f"s] fetching the pretrained weights of {MODEL} from {refusing.removeprefix('http://')}")
    assert last.startswith(f"evaluate.py: cannot get the pretrained weights of {MODEL}")
