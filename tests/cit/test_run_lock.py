"""Two drivers on one run: the second refuses, whatever the clocks say, and takes over from a dead one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from afmrl_ray.cit.run_lock import FILE, RunLock
from afmrl_ray.errors import StorageError

BEAT = 0.1


def left_by(folder: Path, **changes: object) -> None:
    record = {"token": "x", "host": "elsewhere", "pid": 1, "started": 0.0, "count": 7, "beat_s": BEAT, **changes}
    (folder / FILE).write_text(json.dumps(record))


def held_by_another_process(folder: Path) -> subprocess.Popen[str]:
    code = (
        "import sys, time\n"
        "from afmrl_ray.cit.run_lock import RunLock\n"
        f"with RunLock({str(folder)!r}, beat_s={BEAT}):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def test_a_second_driver_refuses_until_the_first_is_killed(tmp_path: Path) -> None:
    first = held_by_another_process(tmp_path)
    with pytest.raises(StorageError, match=f"process {first.pid} on .* holds this run"), RunLock(str(tmp_path)):
        pass
    first.kill()
    first.wait()
    assert (tmp_path / FILE).exists()
    with RunLock(str(tmp_path)):
        assert json.loads((tmp_path / FILE).read_text())["pid"] != first.pid
    assert not (tmp_path / FILE).exists()


def test_a_driver_on_another_host_is_judged_by_its_counter_alone(tmp_path: Path) -> None:
    left_by(tmp_path, started=time.time() + 1e6)
    with RunLock(str(tmp_path), beat_s=BEAT):
        pass
    # It has a minute for a heartbeat, which even a busy machine keeps.
    left_by(tmp_path, beat_s=20.0)
    moving = threading.Timer(BEAT, left_by, (tmp_path,), {"count": 8, "beat_s": 20.0})
    moving.start()
    with pytest.raises(StorageError, match="on elsewhere, holds this run"), RunLock(str(tmp_path), beat_s=BEAT):
        pass


def test_a_process_of_the_same_number_that_began_at_another_time_is_another_one(tmp_path: Path) -> None:
    import socket

    left_by(tmp_path, host=socket.gethostname(), pid=1, started=1.0)
    with RunLock(str(tmp_path), beat_s=BEAT):
        pass


def test_a_driver_that_lost_its_run_notices(tmp_path: Path) -> None:
    with RunLock(str(tmp_path), beat_s=BEAT) as run_lock:
        run_lock.check()
        left_by(tmp_path)
        deadline = time.monotonic() + 20
        while run_lock.lost is None and time.monotonic() < deadline:
            time.sleep(BEAT)
        with pytest.raises(StorageError, match="process 1 on elsewhere took over the run"):
            run_lock.check()
    # What belongs to the other one is left to it.
    assert (tmp_path / FILE).exists()


@pytest.mark.parametrize("content", ["", "{", '{"token"'])
def test_a_file_that_was_cut_off_holds_nobody_up(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with RunLock(str(tmp_path), beat_s=BEAT):
        pass
