"""`export --config.push`: a commit on a local stand-in of the Hub's HTTP interface, and what happens where it fails."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import ROOT, free_port, load, read_config

from instaflow_jax import main, sampling
from instaflow_jax.stages.export import card, licence
from instaflow_jax.stages.export import source as export_source
from instaflow_jax.stages.export.source import Source
from instaflow_jax.weights import hub

TOKEN = "hf_stand_in"


class StandIn(BaseHTTPRequestHandler):
    """Takes uploads to me/model, large files (`.safetensors`) by LFS; refuses other repositories and tokens."""

    stored: dict[str, bytes]  # LFS objects by SHA-256
    commits: list[dict[str, bytes]]  # content by path

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def log_message(self, *_):
        pass

    def do_PUT(self):
        self.stored[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self):
        here, body = f"http://{self.headers['Host']}", self.body()
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            if json.loads(body).get("organization") != "me":
                return self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            return self.answer({"url": f"{here}/me/model"})
        if self.path == "/api/models/me/model/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return self.answer(
                {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
            )
        if self.path == "/me/model.git/info/lfs/objects/batch":
            objects = [
                file | {"actions": {"upload": {"href": f"{here}/lfs/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        assert self.path == "/api/models/me/model/commit/main", self.path
        lines = [json.loads(line) for line in body.splitlines()]
        files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        files |= {x["value"]["path"]: self.stored[x["value"]["oid"]] for x in lines if x["key"] == "lfsFile"}
        self.commits.append(files)
        self.answer({"commitUrl": f"{here}/me/model/commit/1", "commitOid": "1", "hookOutput": ""})

    def do_GET(self):
        assert self.path.startswith("/api/models/"), self.path
        mine = "/me/model" in self.path
        self.answer({"id": "me/model", "sha": "0"} if mine else {"error": "Repository not found"}, 200 if mine else 404)


@pytest.fixture
def stand_in():
    handler = type("Handler", (StandIn,), {"stored": {}, "commits": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(program, endpoint, tmp_path, **environment):
    """A Python process whose Hub is `endpoint`, and which knows no token but TOKEN."""
    own = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def configured(model, /, **fields):
    config = read_config("export")
    config.update({"model": str(model), "formats": ("diffusers",)})
    config.update(fields)
    return config


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_an_export_is_committed_as_it_is_and_a_refusal_leaves_it_whole(teacher, stand_in, tmp_path):
    """A repository of someone else, then one's own: the second run uploads the export that the first one made."""
    program = f"""
import runpy
from instaflow_jax import main
for repository in ("someone/model", "me/model"):
    config = runpy.run_path("configs/export.py")["get_config"]()
    config.update(model={str(teacher)!r}, formats=("diffusers",), push=repository)
    try:
        main.run(config, {str(tmp_path)!r})
    except OSError as error:
        print("refused:", error)
"""
    handler, endpoint = stand_in
    lines = run(program, endpoint, tmp_path).splitlines()
    export = tmp_path / "export"
    (refused,) = [line for line in lines if line.startswith("refused:")]
    assert f"uploading {export} to someone/model failed: " in refused and "403" in refused
    assert refused.endswith(f"{export} is complete, and the same command only uploads it again")
    assert sum(line.startswith("wrote") for line in lines) == 1
    assert lines[-1] == f"uploaded: {endpoint}/me/model/commit/1"
    assert handler.commits == [files_of(export)]
    assert any(name.endswith(".safetensors") for name in handler.commits[0])


@pytest.mark.slow
def test_without_the_network_the_reason_is_one_line(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text("a card")
    program = f"""
from pathlib import Path
from instaflow_jax.weights import hub
try:
    hub.upload(Path({str(tmp_path)!r}) / "export", "me/model")
except OSError as error:
    print(error)
"""
    out = run(program, f"http://127.0.0.1:{free_port()}", tmp_path)
    assert out.startswith(f"uploading {tmp_path / 'export'} to me/model failed: ") and out.count("\n") == 1


def test_without_a_token_or_with_a_wrong_name_nothing_is_exported(teacher, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for name, words in (
        ("me/model", r"config\.push='me/model' needs a token: run `hf auth login`, or set HF_TOKEN"),
        ("me", r"config\.push='me' is not a hub id of the form owner/name"),
    ):
        with pytest.raises(ValueError, match=words):
            main.run(configured(teacher, push=name), str(tmp_path))
    assert not (tmp_path / "export").exists()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a dry run makes no request")

    monkeypatch.setattr(hub, "upload", refuse)


def test_a_dry_run_prints_what_would_be_sent(teacher, tmp_path, capsys, no_network, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)  # it needs none
    main.run(configured(teacher, push="me/model", push_dry_run=True), str(tmp_path))
    out = capsys.readouterr().out
    found = files_of(tmp_path / "export")
    assert f"would upload {tmp_path / 'export'} to me/model: {len(found)} files" in out
    assert all(f"  {name}  " in out for name in found)
    assert "license: other\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [" in out


def test_only_the_export_that_is_asked_for_is_uploaded_again(teacher, tmp_path, no_network):
    dry = {"push": "me/model", "push_dry_run": True}
    main.run(configured(teacher, **dry), str(tmp_path))
    before = (tmp_path / "export" / "export.json").stat().st_mtime_ns
    main.run(configured(teacher, **dry), str(tmp_path))
    assert (tmp_path / "export" / "export.json").stat().st_mtime_ns == before
    for fields in ({"formats": ("orbax",)}, {"convention": "released"}, {"model": "openmoji"}):
        with pytest.raises(FileExistsError, match=r"export exists: use --config\.replace=true"):
            main.run(configured(teacher, **dry | fields), str(tmp_path))
    main.run(configured(teacher, replace=True, **dry), str(tmp_path))
    assert (tmp_path / "export" / "export.json").stat().st_mtime_ns != before
    (tmp_path / "export" / "README.md").write_text("edited")
    with pytest.raises(ValueError, match=r"README\.md is damaged.*use --config\.replace=true"):
        main.run(configured(teacher, **dry), str(tmp_path))


@pytest.mark.parametrize(
    "model,base",
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("XCLiu/2_rectified_flow_from_sd_1_5", "XCLiu/2_rectified_flow_from_sd_1_5"),
        ("openmoji", ""),
        ("/models/sd15", ""),
    ],
)
def test_the_card_names_the_model_that_the_lineage_begins_with(model, base, teacher, monkeypatch):
    """distill ← reflow ← model; a run's own folder may look like a hub id."""
    runs = {
        "runs/distill": {"init_from": "runs/reflow", "model": "", "pairs": {"model": model}},
        "runs/reflow": {"model": model, "pairs": {"model": model}},
    }
    monkeypatch.setattr(licence, "run_config", lambda name: runs.get(name, {}))
    pipe = load(teacher)
    source = Source("runs/distill", pipe, sampling.Flow(1, 1000), runs["runs/distill"], 1)
    assert licence.base_model(source) == base


@pytest.mark.parametrize("recorded", [True, False])
def test_the_card_of_a_distillation_names_what_its_workdirs_flow_was_made_from(
    recorded, teacher, tmp_path, monkeypatch
):
    """The flow came from elsewhere than `config.reflow` of the distillation says, or has no record at all."""
    trained = {"stage": "reflow", "model": "owner/model", "pairs": {"model": "owner/model"}}
    default = {"model": "openmoji", "output": "reflow"}
    distilled = {"stage": "distill", "model": "", "pairs": {"model": "openmoji"}, "reflow": default}
    runs = {tmp_path / "distill" / "checkpoints": distilled} | (
        {tmp_path / "reflow" / "checkpoints": trained} if recorded else {}
    )
    monkeypatch.setattr(export_source.checkpoint, "complete_steps", lambda folder: [1] if folder in runs else [])
    monkeypatch.setattr(export_source.checkpoint, "load_config", lambda folder, step: runs[folder])
    assert export_source.run_config(str(tmp_path / "distill")) == distilled  # nothing is known of a flow that is gone
    flow = tmp_path / "reflow" / "export"
    flow.mkdir(parents=True)
    (flow / "model_index.json").write_text("{}")
    run = export_source.run_config(str(tmp_path / "distill"))
    source = Source(str(tmp_path / "distill"), load(teacher), sampling.Flow(1, 1000), run, 1)
    assert export_source.parents(run)[0] == run["pairs"]["model"] == str(flow)
    assert licence.base_model(source) == ("owner/model" if recorded else "")
    assert "openmoji" not in licence.lineage(source)


@pytest.mark.slow
def test_the_hub_reads_the_cards_front_matter(teacher, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(card, "base_model", lambda source: "owner/base")
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "table.md").write_text("| N | FID |\n|---|---|\n| 1 | 12.5 |\n")
    main.run(configured(teacher, dynamics="flow"), str(tmp_path))
    found = huggingface_hub.ModelCard.load(tmp_path / "export" / "README.md")
    assert (found.data.license, found.data.base_model) == ("other", "owner/base")
    assert (found.data.library_name, found.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"instaflow", "rectified-flow", "one-step"} <= set(found.data.tags) and "| 1 | 12.5 |" in found.text
