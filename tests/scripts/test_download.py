"""scripts/download.sh against a server on this machine: whole, resumed, checked, and refused."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "download.sh"
NAME = "deit_0.6G"
FILE = f"{NAME}_isomorphic.pth"
CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAMES = ["deit_4.2G", "deit_2.6G", "deit_1.2G", "deit_0.6G", "convnext_small_8.5G", "convnext_tiny_4.2G"]
FETCHERS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
    for name in ("curl", "wget")
]


class Release(ThreadingHTTPServer):
    """Serves `CONTENT` as FILE.

    Attributes:
        ranges: the Range header of each request, None where there was none.
        cut_after: closes the connection after so many bytes of an answer.
        takes_ranges: whether it can start in the middle.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []
        self.cut_after: int | None = None
        self.takes_ranges = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v0.1"


class Handler(BaseHTTPRequestHandler):
    server: Release

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.ranges.append(wanted)
        if self.path != f"/v0.1/{FILE}":
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.takes_ranges else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:][: self.server.cut_after])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


@pytest.fixture
def release() -> Iterator[Release]:
    with Release() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def tools(tmp_path: Path) -> Callable[..., str]:
    """A PATH with what the script uses, and with these programs to fetch files."""

    def path(*fetchers: str) -> str:
        folder = tmp_path / "tools"
        folder.mkdir()
        common = (
            "bash",
            "basename",
            "cut",
            "dirname",
            "flock",
            "mkdir",
            "mv",
            "rm",
            "sed",
            "sha256sum",
            "shasum",
            "sort",
            "tr",
            "wc",
        )
        for name in (*common, *fetchers):
            if found := shutil.which(name):
                (folder / name).symlink_to(found)
        return str(folder)

    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a folder"


def download(
    address: str, folder: Path | str, *words: str, path: str | None = None, cwd: Path | str = "/"
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        [shutil.which("bash") or "bash", str(SCRIPT), "--folder", str(folder), *words],
        cwd=cwd,
        env=environment | {"ISOMORPHIC_RELEASE": address, "PATH": path or os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def list_checksum(folder: Path, checksum: str) -> bytes:
    folder.mkdir()
    line = f"{'0' * 64}  deit_4.2G_isomorphic.pth\n{checksum}  {FILE}\n".encode()
    (folder / "SHA256SUMS").write_bytes(line)
    return line


@pytest.mark.parametrize("fetcher", FETCHERS)
@pytest.mark.parametrize("word", [NAME, FILE])
def test_a_file_comes_whole_and_is_not_fetched_again(
    fetcher: str, word: str, release: Release, folder: Path, tools: Callable[..., str]
):
    path = tools(fetcher)
    done = download(release.address, folder, word, path=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(folder) == {FILE: CONTENT}
    first, why, line = done.stdout.splitlines()
    assert first == f"{folder}/{FILE}: 300000 bytes, SHA-256 {SHA256}"
    assert "no checksums" in why and why.endswith(f"{folder}/SHA256SUMS:") and line == f"{SHA256}  {FILE}"

    again = download(release.address, folder, word, path=path)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert release.ranges == [None]


@pytest.mark.parametrize("fetcher", FETCHERS)
def test_a_cut_download_goes_on_where_it_stopped(
    fetcher: str, release: Release, folder: Path, tools: Callable[..., str]
):
    path = tools(fetcher)
    release.cut_after = 100_000
    done = download(release.address, folder, NAME, path=path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line == (
        f"download: cannot fetch {release.address}/{FILE}: the connection broke "
        f"(the next call goes on from {folder}/{FILE}.part)"
    )
    part = files(folder)
    assert part.keys() == {f"{FILE}.part"} and CONTENT.startswith(part[f"{FILE}.part"])
    received = len(part[f"{FILE}.part"])
    assert 0 < received <= 100_000

    release.cut_after = None
    done = download(release.address, folder, NAME, path=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(folder) == {FILE: CONTENT} and release.ranges == [None, f"bytes={received}-"]


@pytest.mark.parametrize("fetcher", FETCHERS)
@pytest.mark.parametrize(("there", "takes_ranges"), [(len(CONTENT), True), (1000, False)])
def test_what_the_server_cannot_add_to_still_ends_whole(
    fetcher: str, there: int, takes_ranges: bool, release: Release, folder: Path, tools: Callable[..., str]
):
    folder.mkdir()
    (folder / f"{FILE}.part").write_bytes(CONTENT[:there])
    release.takes_ranges = takes_ranges
    done = download(release.address, folder, NAME, path=tools(fetcher))
    assert (done.returncode, done.stderr) == (0, "")
    assert files(folder) == {FILE: CONTENT} and release.ranges[0] == f"bytes={there}-"


def test_a_listed_checksum_is_held_against_the_file(release: Release, folder: Path):
    listed = list_checksum(folder, SHA256)
    for _ in range(2):  # fetched, then found
        done = download(release.address, folder, NAME)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[1:] == [f"  as in {folder}/SHA256SUMS"]
    assert files(folder) == {FILE: CONTENT, "SHA256SUMS": listed}


def test_a_mismatch_fails_and_never_gets_the_final_name(release: Release, folder: Path):
    listed = list_checksum(folder, "1" * 64)
    done = download(release.address, folder, NAME)
    assert done.returncode == 1 and SHA256 in done.stdout
    assert done.stderr == f"download: what came is not the file in {folder}/SHA256SUMS, and is removed\n"
    assert files(folder) == {"SHA256SUMS": listed}


def test_a_file_of_the_users_that_does_not_match_is_left_alone(release: Release, folder: Path):
    list_checksum(folder, SHA256)
    (folder / FILE).write_bytes(b"other")
    done = download(release.address, folder, NAME)
    assert done.returncode == 1 and "5 bytes" in done.stdout and len(done.stderr.splitlines()) == 1
    assert files(folder)[FILE] == b"other" and release.ranges == []


@pytest.mark.parametrize(
    ("template", "right", "other"),
    [
        ("{}  {}\r\n", SHA256, "1" * 64),
        ("{}  {}\n", SHA256.upper(), "A" * 64),
        ("{} *{}\r\n", SHA256.upper(), "A" * 64),
        ("{0}  {1}\n{0}  {1}", SHA256, "1" * 64),
    ],
    ids=["CRLF", "upper case", "both and binary", "twice"],
)
def test_however_a_checksum_is_written_it_counts(template: str, right: str, other: str, release: Release, folder: Path):
    folder.mkdir()
    (folder / FILE).write_bytes(CONTENT)
    sums = folder / "SHA256SUMS"
    sums.write_bytes(template.format(right, FILE).encode())
    done = download(release.address, folder, NAME)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(f"  as in {sums}\n")

    sums.write_bytes(template.format(other, FILE).encode())
    done = download(release.address, folder, NAME)
    message = f"{folder}/{FILE} is not the file in {sums}: remove it to fetch it anew"
    assert (done.returncode, done.stderr) == (1, f"download: {message}\n")


@pytest.mark.parametrize(
    "lines",
    [
        f"{SHA256}  {FILE}\n{'1' * 64}  {FILE}\n",
        f"{SHA256[1:]}  {FILE}\n",
        f"SHA256 ({FILE}) = {SHA256}\n",
        f"{SHA256}  {FILE}\n{SHA256}  pretrained/{FILE}\n",
    ],
    ids=["two", "63 digits", "BSD", "with a folder"],
)
def test_a_checksum_that_cannot_be_told_stops_it(lines: str, release: Release, folder: Path):
    folder.mkdir()
    sums = folder / "SHA256SUMS"
    sums.write_text(lines)
    done = download(release.address, folder, NAME)
    assert (done.returncode, done.stdout, release.ranges) == (1, "", [])
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"download: {sums} must have one checksum for {FILE}, as 64 hexadecimal digits")
    assert files(folder) == {"SHA256SUMS": lines.encode()}


def test_only_the_very_name_is_looked_up(release: Release, folder: Path):
    folder.mkdir()
    (folder / "SHA256SUMS").write_text(f"{'1' * 64}  {FILE.replace('.', '-')}\n")
    done = download(release.address, folder, NAME)
    assert (done.returncode, done.stderr) == (0, "") and "no checksums" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [(FILE, "{} is not a file: move it away"), (f"{FILE}.part", "cannot write {}"), ("SHA256SUMS", "cannot read {}")],
)
def test_a_folder_in_a_files_place_is_one_line(name: str, message: str, release: Release, folder: Path):
    (folder / name).mkdir(parents=True)
    done = download(release.address, folder, NAME)
    assert (done.returncode, done.stdout, release.ranges) == (1, "", [])
    assert done.stderr == f"download: {message.format(folder / name)}\n"
    assert list(folder.rglob("*")) == [folder / name]


@pytest.mark.parametrize("below", [False, True])
def test_a_folder_that_cannot_be_is_one_line(below: bool, release: Release, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    folder = tmp_path / "file" / "folder" if below else tmp_path / "file"
    done = download(release.address, folder, NAME)
    assert (done.returncode, done.stdout, release.ranges) == (1, "", [])
    assert done.stderr == f"download: cannot write to {folder}\n"


@pytest.mark.parametrize("word", ["a folder/below", "-dash"])
def test_a_relative_folder_is_the_users(word: str, release: Release, tmp_path: Path):
    done = download(release.address, word, NAME, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/{word}/{FILE}: ") and files(tmp_path / word) == {FILE: CONTENT}


@pytest.mark.parametrize("fetcher", FETCHERS)
def test_without_network_it_is_one_line_and_nothing_is_written(fetcher: str, folder: Path, tools: Callable[..., str]):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = download(address, folder, NAME, path=tools(fetcher))
    assert (done.returncode, done.stdout, files(folder)) == (1, "", {})
    message = "there is no network, or the server cannot be reached"
    assert done.stderr == f"download: cannot fetch {address}/{FILE}: {message}\n"


@pytest.mark.parametrize("fetcher", FETCHERS)
def test_a_file_that_the_server_lacks_is_one_line(
    fetcher: str, release: Release, folder: Path, tools: Callable[..., str]
):
    done = download(release.address, folder, "deit_4.2G", path=tools(fetcher))
    assert (done.returncode, done.stdout, files(folder)) == (1, "", {})
    assert done.stderr.startswith("download: cannot fetch ") and "the server answers" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_several_names_come_in_turn_until_one_fails(release: Release, folder: Path):
    done = download(release.address, folder, NAME, "deit_4.2G", "deit_2.6G")
    assert done.returncode == 1 and files(folder) == {FILE: CONTENT}
    assert len(release.ranges) == 2 and "deit_4.2G" in done.stderr


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is what keeps two downloads apart")
def test_a_second_download_of_the_same_file_stops(release: Release, folder: Path):
    folder.mkdir()
    with (folder / f"{FILE}.part").open("wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        done = download(release.address, folder, NAME)
    assert (done.returncode, release.ranges) == (1, [])
    assert done.stderr == f"download: another download of {FILE} is running\n"
    assert download(release.address, folder, NAME).returncode == 0
    assert files(folder) == {FILE: CONTENT}


def test_without_a_fetcher_it_is_one_line(folder: Path, tools: Callable[..., str]):
    done = download("http://127.0.0.1:9", folder, NAME, path=tools())
    assert (done.returncode, done.stdout, files(folder)) == (1, "", {})
    assert done.stderr == "download: neither curl nor wget is installed: install one of them\n"


@pytest.mark.parametrize("words", [(), ("resnet50_2.0G",), (NAME, "../evil"), ("--lsit",), (" ".join(NAMES[:2]),)])
def test_words_that_name_nothing_fetch_nothing(words: tuple[str, ...], release: Release, folder: Path):
    done = download(release.address, folder, *words)
    assert (done.returncode, done.stdout, files(folder), release.ranges) == (2, "", {}, [])
    (line,) = done.stderr.splitlines()
    assert line.startswith("download: ") and line.endswith(": " + " ".join(NAMES))


def test_the_list(folder: Path):
    done = download("", folder, "--list")
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, NAMES, "")
    assert not folder.exists()


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_help_is_what_the_script_says_at_its_head(word: str, folder: Path):
    head = SCRIPT.read_text().split("set -euo pipefail")[0].splitlines()[1:]
    done = download("", folder, word)
    assert (done.returncode, done.stderr) == (0, "") and "bash scripts/download.sh --list" in done.stdout
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]
    assert not folder.exists()
