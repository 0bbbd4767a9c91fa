"""Hub ids, against a server on this machine that speaks as much of the hub's API as a download needs."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from chatglm_fixtures import save_checkpoint
from safetensors.torch import load_file

SHA = "0123456789abcdef0123456789abcdef01234567"
OLD_SHA = "f" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, ``someone/tiny``: the files of ``directory``; revisions main and old."""

    protocol_version = "HTTP/1.1"

    def __init__(self, directory, asked, refusal, asked_for_branch, *arguments):
        self.directory, self.asked, self.refusal = directory, asked, refusal
        self.asked_for_branch = asked_for_branch
        super().__init__(*arguments)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if self.refusal:
            self.reply(self.refusal[0], b"{}", {"X-Error-Code": self.refusal[1]})
        elif path.startswith("/api/models/someone/tiny"):
            revision = path.rpartition("/revision/")[2]
            files = [{"rfilename": file.name, "size": file.stat().st_size, "blobId": f"{number:040x}"}
                     for number, file in enumerate(sorted(self.directory.iterdir()))]
            sha = revision if len(revision) == 40 else self.branch_that_moves(OLD_SHA if revision == "old" else SHA)
            content = {"id": "someone/tiny", "sha": sha, "private": False, "tags": [], "siblings": files}
            self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/someone/tiny/resolve/"):
            revision, name = path.split("/")[4:6]
            self.asked.append((revision, name))
            self.reply(200, (self.directory / name).read_bytes(), {"X-Repo-Commit": revision, "ETag": f'"{name}"'})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def branch_that_moves(self, sha):
        """Somebody pushes right after it was first looked up."""
        self.asked_for_branch.append(sha)
        return sha if len(self.asked_for_branch) == 1 else "e" * 40

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path):
    """``serve(directory)``: environment for a subprocess, and the (revision, file) it asked for."""
    servers = []

    def start(directory, refusal=None):
        asked = []
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory, asked, refusal, [])))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return environment(tmp_path, f"http://127.0.0.1:{servers[-1].server_port}"), asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def environment(tmp_path, endpoint):
    return {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*", "no_proxy": "*"}


def convert_in_a_process(environment, *arguments, family="gptj"):
    command = [sys.executable, "-m", f"convert.{family}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def both_formats(checkpoint, torch_model):
    directory = checkpoint()
    torch_model("GPTJForCausalLM").save_pretrained(directory, safe_serialization=False)
    for name in ("vocab.json", "merges.txt", "tf_model.h5", "README.md"):
        (directory / name).write_text(name)
    return directory


@pytest.mark.parametrize("flags,sha", [([], SHA), (["--revision", "old"], OLD_SHA)])
def test_one_format_of_one_pinned_revision_is_downloaded(flags, sha, both_formats, serve, workdir):
    hub, asked = serve(both_formats)
    result = convert_in_a_process(hub, "--source", "someone/tiny", *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads((workdir / "reports" / "tiny" / "convert.json").read_text())
    assert (report["source"], report["revision"], report["run"]) == ("someone/tiny", sha, "tiny")
    assert {revision for revision, _ in asked} == {sha}
    assert {name for _, name in asked} == {
        "config.json", "generation_config.json", "merges.txt", "model.safetensors", "vocab.json"}
    held, expected = (load_file(directory / "model.safetensors") for directory in (workdir / "out/tiny", both_formats))
    assert held["lm_head.weight"].equal(expected["lm_head.weight"].T)
    assert (workdir / "out" / "tiny" / "merges.txt").read_text() == "merges.txt"


@pytest.mark.parametrize("shards", ["5GB", "8KB"])
def test_a_repository_of_bins(shards, torch_model, tmp_path, serve, workdir):
    torch_model("GPTJForCausalLM").save_pretrained(tmp_path / "repo", safe_serialization=False, max_shard_size=shards)
    hub, asked = serve(tmp_path / "repo")
    result = convert_in_a_process(hub, "--source", "someone/tiny")
    assert result.returncode == 0, result.stderr
    assert {name for _, name in asked} == {file.name for file in (tmp_path / "repo").iterdir()}


def test_code_beside_the_weights_comes_along_and_is_not_run(tmp_path, serve, workdir):
    repository, marker = save_checkpoint(tmp_path / "repo", binary=True), tmp_path / "ran"
    for file in repository.glob("*.py"):
        file.write_text(f"open({str(marker)!r}, 'w').close()\n" + file.read_text())
    (repository / "README.md").write_text("")
    hub, asked = serve(repository)
    result = convert_in_a_process(hub, "--source", "someone/tiny", family="chatglm")
    assert result.returncode == 0, result.stderr
    assert {name for _, name in asked} == {"config.json", "configuration_chatglm.py", "modeling_chatglm.py",
                                           "pytorch_model.bin"}
    assert not marker.exists()


REFUSALS = {
    (401, "RepoNotFound"): "neither a path here nor a repository",
    (404, "RevisionNotFound"): "has no revision 'v9'",
    (403, "GatedRepo"): "gated",
    (500, ""): "cannot be reached",
}


@pytest.mark.parametrize("refusal,says", REFUSALS.items(), ids=str)
def test_what_the_hub_refuses(refusal, says, tmp_path, serve, workdir):
    hub, _ = serve(tmp_path, refusal)
    told_and_nothing_written(convert_in_a_process(hub, "--source", "someone/tiny", "--revision", "v9"), says, workdir)


def test_a_repository_without_weights(tmp_path, serve, workdir):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "tf_model.h5").write_bytes(b"")
    hub, _ = serve(tmp_path / "repo")
    told_and_nothing_written(convert_in_a_process(hub, "--source", "someone/tiny"), "tf_model.h5", workdir)


@pytest.mark.parametrize("changes", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "unreachable"])
def test_without_network(changes, tmp_path, workdir):
    hub = environment(tmp_path, "http://127.0.0.1:9") | changes
    result = convert_in_a_process(hub, "--source", "someone/tiny")
    told_and_nothing_written(result, "cannot be reached", workdir)


def test_without_network_what_was_downloaded_before_serves(both_formats, serve, tmp_path, workdir):
    hub, _ = serve(both_formats)
    arguments = ["--source", "someone/tiny", "--revision", SHA]
    assert convert_in_a_process(hub, *arguments).returncode == 0
    offline = convert_in_a_process(hub | {"HF_HUB_OFFLINE": "1"}, *arguments, "--output", "out/again")
    assert offline.returncode == 0, offline.stderr
    reports = [json.loads((workdir / "reports" / run / "convert.json").read_text()) for run in ("tiny", "again")]
    assert reports[0]["source_digest"] == reports[1]["source_digest"]
    assert reports[1]["revision"] == SHA


ON_A_FULL_DISK = """
import sys
from types import SimpleNamespace
import convert.hub
convert.hub.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1000))
from convert.cli import main
from convert.gptj import FAMILY
sys.exit(main(FAMILY, ["--source", "someone/tiny", "--revision", sys.argv[1]]))
"""


def test_a_download_larger_than_the_disk(both_formats, serve, workdir):
    hub, asked = serve(both_formats)
    command = [sys.executable, "-c", ON_A_FULL_DISK, SHA]
    result = subprocess.run(command, capture_output=True, text=True, env=hub)
    told_and_nothing_written(result, "no space left", workdir)
    assert asked == []
    fills_the_cache = convert_in_a_process(hub, "--source", "someone/tiny", "--revision", SHA, "--output", "out/first")
    assert fills_the_cache.returncode == 0, fills_the_cache.stderr
    assert subprocess.run(command, capture_output=True, text=True, env=hub).returncode == 0


def told_and_nothing_written(result, says, workdir):
    assert result.returncode == 2, result.stderr
    assert says in result.stderr and "someone/tiny" in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(workdir.iterdir()) == []
