"""The jobs as a user runs them: help, printed config, dry run, user errors, and submission to a running cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tqdm import tqdm

from afmrl_ray.catalogue import make_catalogue, write_catalogue
from afmrl_ray.config import dump_yaml, load_config, validate
from afmrl_ray.config.catalogue import SyntheticConfig
from afmrl_ray.errors import StorageError
from tests.catalogue.test_reading import rows
from tests.cit.conftest import run_values

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"api_key"}
"""Jobs without a config."""
JOBS = sorted({path.stem for path in (ROOT / "jobs").glob("[!_]*.py")} - TOOLS)


def free_ports(count: int) -> list[int]:
    """Unused ports, different from one another since all are bound until the last is chosen."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main_of(job: str):
    spec = importlib.util.spec_from_file_location(f"job_{job}", ROOT / "jobs" / f"{job}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_all_documented_jobs_exist():
    assert {
        "make_catalogue", "import_catalogue", "distill", "annotate", "train_agcl", "train_rar", "evaluate", "run_cit",
    } <= set(JOBS)  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_help_lists_the_common_options(job, capsys):
    with pytest.raises(SystemExit) as ended:
        main_of(job)(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--config", "--print-config", "--dry-run", "section.field=value"):
        assert option in shown


def test_the_printed_config_is_the_resolved_one(capsys, tmp_path):
    assert main_of("run_cit")(["--print-config", "rar.group_size=16"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(str(file)) == load_config(None, ["rar.group_size=16"])


def test_a_dry_run_shows_schedule_and_resources_and_writes_nothing(capsys, tmp_path):
    arguments = ["--dry-run", f"run.storage_path={tmp_path}/runs", "rar.prompts_per_step=10", "rar.group_size=4"]
    assert main_of("run_cit")(arguments) == 0
    shown = capsys.readouterr().out
    assert "x 10 prompts x 4 completions = 40 rollouts" in shown
    assert "resources asked for at once" in shown
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_compares_required_with_available_resources(capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main_of("run_cit")(["--dry-run", "ray.num_cpus=3", "agcl.workers.num_workers=4"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"agcl +4 CPU  MORE THAN AVAILABLE \(CPU\)", shown)
    assert re.search(r"distill +1 CPU$", shown, re.MULTILINE)
    assert "resources available\n  3 CPU, " in shown


@pytest.mark.parametrize("given", ["-1", "one", "1.5"])
def test_an_invalid_round_is_refused(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main_of("evaluate")([f"--round={given}"])
    assert ended.value.code == 2
    assert f"{given!r} is not a round number" in capsys.readouterr().err


def catalogue_without_positives(folder: Path) -> str:
    content = [{**row, "product_id": row["item_id"]} for row in rows()]
    pq.write_table(pa.Table.from_pylist(content), folder / "c.parquet")
    return str(folder / "c.parquet")


def catalogue_of(folder: Path, **changes) -> str:
    content = [{**row, **changes} for row in rows()]
    pq.write_table(pa.Table.from_pylist(content), folder / "c.parquet")
    return str(folder / "c.parquet")


def synthetic(folder: Path) -> str:
    write_catalogue(make_catalogue(SyntheticConfig(preset="tiny", image_px=32)), str(folder / "c.parquet"))
    return f"catalogue.path={folder}/c.parquet"


def without_split(folder: Path) -> str:
    table = pq.read_table(catalogue_of(folder)).drop_columns(["split"])
    pq.write_table(table, folder / "c.parquet")
    return str(folder / "c.parquet")


def bad_images(folder: Path) -> str:
    content = [{**row, "image": b"x"} for row in rows()]
    pq.write_table(pa.Table.from_pylist(content), folder / "c.parquet")
    return str(folder / "c.parquet")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("given", "named"),
    [
        (lambda at, models: ["rar.grup_size=3"], "rar.group_size"),
        (lambda at, models: ["rar.group_size=x"], "rar.group_size"),
        (lambda at, models: ["catalogue.path=/nowhere.parquet"], "/nowhere.parquet does not exist"),
        (lambda at, models: [f"catalogue.path={catalogue_without_positives(at)}"], "so there are no positives"),
        (lambda at, models: [f"catalogue.path={bad_images(at)}"], "undecodable_image"),
        (lambda at, models: [f"catalogue.path={without_split(at)}"], "lacks the columns split"),
        (lambda at, models: [f"catalogue.path={catalogue_of(at, split='test')}"], "split train"),
        (lambda at, models: [synthetic(at), "generator.title_columns=[primary_protocol]"], "primary_protocol"),
        (
            lambda at, models: [
                synthetic(at),
                "evaluation.protocols=[{kind: retrieval, name: fine},{kind: labels, name: x, label: item_id}]",
            ],
            "evaluation protocol 'x': fit and test share no class of column 'item_id'",
        ),
        (lambda at, models: ["teacher={kind: model, path: /no/teacher}"], "teacher.path: /no/teacher does not exist"),
        (lambda at, models: ["encoder.path=/no/such/model"], "encoder.path: /no/such/model does not exist"),
        (lambda at, models: [f"encoder.path={models['generator']}"], "the encoder must be qwen2_vl"),
        (lambda at, models: ["agcl.workers.num_workers=32"], "agcl asks for 32 CPU; the cluster has"),
        (lambda at, models: ["agcl.workers.use_gpu=true"], "1 GPU"),
        (lambda at, models: [f"encoder.path=file://{at}/nothing"], "nothing holds no checkpoint"),
        (lambda at, models: ["run.storage_path=/proc/nothing"], "/proc/nothing"),
    ],
)
def test_a_user_error_is_one_line_with_exit_code_2_and_writes_nothing(
    ray_local, tiny_checkpoints, tmp_path, capsys, given, named
):
    storage = tmp_path / "runs"
    arguments = [f"run.storage_path={storage}", *given(tmp_path, tiny_checkpoints)]
    assert main_of("run_cit")(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert named in error
    assert not storage.exists()


def test_an_internal_error_says_how_to_resume(monkeypatch, capsys):
    from afmrl_ray import cli

    def body(config, options):
        error = RuntimeError("disk on fire")
        error.add_note("in stage agcl-r0")
        raise error

    assert cli.job_main("a job", body, []) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("failed (in stage agcl-r0); committed stages are kept: run the same command again to resume")
    )


def test_an_error_is_on_a_line_of_its_own_below_progress_bars(capsys):
    from afmrl_ray import cli

    with tqdm(total=3, desc="first") as bar, tqdm(total=3, desc="second"):

        def body(config, options):
            bar.update(1)
            raise StorageError("/runs: cannot be written")

        assert cli.job_main("a job", body, []) == 2
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", capsys.readouterr().err)
    assert "error: /runs: cannot be written" in lines.splitlines()


def test_make_and_import_catalogue(tmp_path, capsys):
    out = tmp_path / "made.parquet"
    sheet = tmp_path / "sheet.png"
    arguments = ["--out", str(out), "--sheet", str(sheet), "synthetic.preset=tiny", "synthetic.image_px=48"]
    assert main_of("make_catalogue")(arguments) == 0
    assert pq.read_table(out).num_rows > 100
    assert sheet.read_bytes().startswith(b"\x89PNG")
    source = tmp_path / "items.jsonl"
    table = pq.read_table(out).slice(0, 6).to_pylist()
    for row in table:
        (tmp_path / f"{row['item_id']}.jpg").write_bytes(row["image"])
    lines = [{"sku": r["item_id"], "title": r["title"], "file": f"{r['item_id']}.jpg"} for r in table]
    source.write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["--source", str(source), "--images", str(tmp_path), "--out", str(tmp_path / "in.parquet")]
    assert main_of("import_catalogue")([*arguments, "--column", "item_id=sku", "--column", "image=file"]) == 0
    assert pq.read_table(tmp_path / "in.parquet").num_rows == 6


def test_an_import_with_too_many_bad_rows_writes_nothing(tmp_path, capsys):
    source = tmp_path / "items.csv"
    source.write_text("item_id,image,title\n" + "".join(f"{n},none.jpg,mug\n" for n in range(5)))
    arguments = ["--source", str(source), "--images", str(tmp_path), "--out", str(tmp_path / "out.parquet")]
    assert main_of("import_catalogue")(arguments) == 2
    assert "5 of 5 rows are bad (5 missing_image)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.csv"]
    source.with_suffix(".json").write_text("{}")
    twice = ["--source", str(source.with_suffix(".json")), *arguments[2:], *["--ids", "test:query=a.txt"] * 2]
    assert main_of("import_catalogue")(twice) == 2
    assert "--ids test:query: given twice" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_job_is_submitted_to_a_running_cluster(tmp_path):
    """`ray start` with its job server, then `ray job submit` of the same script, unchanged."""
    # The usual ports, the agent's too, may belong to the Ray of the other tests.
    port, dashboard, agent = free_ports(3)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ray = str(Path(sys.executable).parent / "ray")
    folder = Path("/tmp") / f"rj{os.getpid()}"
    start = [
        ray, "start", "--head", f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", "--num-cpus=4", "--object-store-memory=100000000",
        f"--temp-dir={folder}", "--block",
    ]  # fmt: skip
    values = run_values(tmp_path)
    values["distill"].update(steps=4)
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(validate(values)))
    head = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        submit = [
            ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", str(ROOT),
            "--", sys.executable, "jobs/distill.py", "--config", str(config),
        ]  # fmt: skip
        deadline = time.monotonic() + 240
        while True:
            done = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=300, check=False)
            starting = ("Failed to connect", "No available agent")
            if done.returncode == 0 or not any(words in done.stdout + done.stderr for words in starting):
                break
            assert time.monotonic() < deadline, "the job server never came up"
            time.sleep(2)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert "succeeded" in done.stdout
        assert (tmp_path / "t" / "stages" / "distill" / "stage.json").exists()
    finally:
        head.terminate()
        head.wait(timeout=60)
