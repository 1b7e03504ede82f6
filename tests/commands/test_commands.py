"""The command `afmrl`: what it lists, what it refuses, what it imports, and that an installed wheel has it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from afmrl_ray.commands import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_exists_and_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, (target, text) in COMMANDS.items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(f"afmrl_ray.commands.{module}"), function))
        (line,) = (line for line in listed.splitlines() if line.startswith(f"  {name}  "))
        assert line.endswith(text)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["distil"], "afmrl --help"),
        (["train"], "train encoder, train generator"),
        (["catalogue", "mk"], "catalogue make"),
    ],
)
def test_an_unknown_command_is_refused_with_one_line(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_arguments_reach_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "encoder", "--print-config", "agcl.steps=17"]) == 0
    assert "steps: 17" in capsys.readouterr().out
    assert main(["run", "agcl.stepz=17"]) == 2
    assert "agcl.stepz" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["nonsense"], ["run", "--help"], ["distill", "no.such=1"]])
def test_help_and_mistakes_import_neither_torch_nor_ray(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from afmrl_ray.commands import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        "sys.exit(','.join({'torch', 'ray', 'transformers', 'scipy', 'pyarrow'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.timeout(600)
def test_an_installed_wheel_imports_and_lists_its_commands(tmp_path: Path) -> None:
    """In an environment of its own, which sees this one's dependencies and not the repository."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    built = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = tmp_path.glob("afmrl_ray-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name for name in names if name.startswith("afmrl_ray/")}
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "afmrl_ray").rglob("*.py")}
    assert tracked <= packaged
    assert {"afmrl_ray/py.typed", "afmrl_ray/report/template.html"} <= packaged
    assert "afmrl_ray/assets/small-encoder/model.safetensors" in packaged
    assert not any(name.startswith(("jobs/", "tests/")) for name in names)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    dependencies = Path(importlib.import_module("pydantic").__file__ or "").parents[1]
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    python = environment / "bin/python"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import afmrl_ray, afmrl_ray.commands as c; print(afmrl_ray.__file__); c.main(['--help'])"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *listed = done.stdout.splitlines()
    assert first.startswith(str(environment))
    assert all(any(line.startswith(f"  {name}  ") for line in listed) for name in COMMANDS)
