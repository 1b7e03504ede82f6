"""Training on a Ray Train worker group: restarts, checkpoints, resume, metrics."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from afmrl_ray import errors, storage
from afmrl_ray.config.cluster import WorkersConfig
from afmrl_ray.models.flops import peak_tflops
from afmrl_ray.models.threads import torch_threads
from afmrl_ray.training.cluster import require_resources, workers_demand
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.metrics_log import MetricsLog, results_of

TrainStep = Callable[[int], dict[str, float]]


def fit(
    loop: Callable[[dict[str, Any]], Any],
    loop_config: dict[str, Any],
    *,
    name: str,
    directory: str,
    workers: WorkersConfig,
    wait_s: float = 0.0,
) -> Any:
    """Run a training loop on a Ray Train worker group.

    The same `directory` and `name` resume an interrupted training from its last committed checkpoint, with the same
    number of workers or another.

    Args:
        loop: called on every worker with `loop_config`.
        loop_config: plain data.
        name: Ray Train run name.
        directory: Ray Train's storage path.
        workers: size, resources and fault tolerance of the group.
        wait_s: longest wait for resources, seconds.

    Returns:
        Ray Train's `Result` with the last checkpoint.

    Raises:
        ResourceError: see `require_resources`.
        UserError: raised in a worker, and here again as it was.
        TrainingFailedError: more failures than `workers.max_failures`.
    """
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # A user's mistake stays one however often the group is started again.
    mistake = storage.join(directory, "user_error.json")
    storage.remove(mistake)
    demand = workers_demand(workers)
    require_resources(name, [demand], wait_s=wait_s)
    trainer = TorchTrainer(
        partial(_unless_mistaken, loop, mistake),
        train_loop_config=loop_config,
        torch_config=TorchConfig(timeout_s=int(workers.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=_group_size(workers),
            use_gpu=workers.use_gpu,
            resources_per_worker={key: value for key, value in demand.each.items() if value},
            placement_strategy=_strategy(workers),
            label_selector=dict(workers.placement.labels) or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=directory,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=workers.checkpoints_kept),
            logging_config=LoggingConfig("WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise user_error_inside(error) or _recorded_mistake(mistake) or error from None
    if (found := _recorded_mistake(mistake)) is not None:
        raise found
    return result


def _unless_mistaken(loop: Callable[[dict[str, Any]], Any], mistake: str, loop_config: dict[str, Any]) -> Any:
    """Run the loop of a worker; after a `UserError` of any worker, the group that is started again does nothing.

    Args:
        loop: of the training.
        mistake: file that records the error.
        loop_config: for the loop.
    """
    if storage.exists(mistake):
        return None
    try:
        return loop(loop_config)
    except errors.UserError as error:
        storage.write_json(mistake, {"kind": type(error).__name__, "message": str(error)})
        raise


def _recorded_mistake(mistake: str) -> errors.UserError | None:
    if not storage.exists(mistake):
        return None
    found = storage.read_json(mistake)
    kind = getattr(errors, found["kind"], errors.UserError)
    return kind(found["message"])


def fit_model(
    loop: Callable[[dict[str, Any]], Any],
    loop_config: dict[str, Any],
    *,
    name: str,
    directory: str,
    workers: WorkersConfig,
    wait_s: float = 0.0,
) -> dict[str, float]:
    """Run a training loop as `fit` does, below `<directory>/train`, and copy its last model to `<directory>/model`.

    Returns:
        The metrics of the last step that do not depend on the machine, see `results_of`.
    """
    train = storage.join(directory, "train")
    result = fit(loop, loop_config, name=name, directory=train, workers=workers, wait_s=wait_s)
    with result.checkpoint.as_directory() as checkpoint:
        storage.copy_dir(os.path.join(checkpoint, "model"), storage.join(directory, "model"))
    return results_of(result.metrics)


def _strategy(workers: WorkersConfig) -> str:
    """Ray Train's name of the placement strategy."""
    strategy = workers.placement.strategy
    return "PACK" if strategy == "default" else strategy.upper()


def _group_size(workers: WorkersConfig) -> int | tuple[int, int]:
    """Number of workers as Ray Train takes it: a pair (smallest, largest) makes the group elastic."""
    return workers.num_workers if workers.min_workers is None else (workers.min_workers, workers.num_workers)


def user_error_inside(error: BaseException) -> errors.UserError | None:
    """The `UserError` of a failed worker, if one ended the training."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, errors.UserError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for a step, so that its random numbers (dropout) are a function of seed, step and rank.

    With another number of workers a rank has another part of the batch, and dropout another effect.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)


def run_steps(
    engine: Engine,
    train_step: TrainStep,
    *,
    steps: int,
    seed: int,
    workers: WorkersConfig,
    log_directory: str,
    label: str,
    save_model: Callable[[str], None],
) -> dict[str, float]:
    """Train from the last checkpoint, or from the start, to the last step; call it on every rank of a worker group.

    Args:
        engine: updates the weights.
        train_step: runs the forward and backward passes of a step (not the optimizer) and returns its metrics; for
            rates it needs `data/samples` and `data/tflop` among them.
        steps: of the whole training.
        seed: see `seed_step`.
        workers: checkpoint interval and peak TFLOP/s of the device.
        log_directory: where rank 0 writes `metrics.jsonl` and TensorBoard events.
        label: of the progress bar.
        save_model: writes the portable model to a folder; called on every rank, writes on rank 0.

    Returns:
        The metrics of the last step: those of `train_step`, `train/learning_rate`, `train/grad_norm`, and under `time/`
        seconds, rates and peak memory.
    """
    import ray.train
    from ray.experimental import tqdm_ray

    context = ray.train.get_context()
    rank = context.get_world_rank()
    start = _restore(engine)
    log = MetricsLog(log_directory, resume_step=start, training=context.get_experiment_name()) if rank == 0 else None
    bar = tqdm_ray.tqdm(total=steps, desc=label) if rank == 0 else None
    if bar is not None:
        bar.update(start)
    peak = _peak_tflops(engine, workers)
    values: dict[str, float] = {}
    for step in range(start, steps):
        began = time.perf_counter()
        seed_step(seed, step, rank)
        values = train_step(step)
        stepped = time.perf_counter()
        values.update({f"train/{name}": value for name, value in engine.step().items()})
        values.update(_measured(values, stepped - began, time.perf_counter() - stepped, engine.device, peak))
        if log is not None and bar is not None:
            log.log(step, values)
            bar.update(1)
        done = step + 1
        if done % workers.checkpoint_every == 0 or done == steps:
            if log is not None:
                log.flush()
            _report(engine, done, values, save_model)
    if log is not None and bar is not None:
        log.close()
        bar.close()
    return values


def _measured(
    values: dict[str, float], step: float, optimizer: float, device: torch.device, peak: float | None
) -> dict[str, float]:
    """Seconds of the step and its optimizer, rates, peak memory (MiB), and MFU if the device's peak is known."""
    cuda = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = step + optimizer
    measured = {"time/step": seconds, "time/optimizer": optimizer, "time/peak_memory_mb": memory / 2**20}
    if "data/samples" in values:
        measured["time/samples_per_second"] = values["data/samples"] / seconds
    if "data/tflop" in values:
        measured["time/tflops_per_second"] = values["data/tflop"] / seconds
        if peak is not None:
            measured["time/mfu"] = measured["time/tflops_per_second"] / peak
    return measured


def _peak_tflops(engine: Engine, workers: WorkersConfig) -> float | None:
    if workers.peak_tflops is not None or engine.device.type != "cuda" or not engine.bf16:
        return workers.peak_tflops
    return peak_tflops(torch.cuda.get_device_name(engine.device))


def _restore(engine: Engine) -> int:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as directory:
        engine.load(
            os.path.join(directory, "engine"),
            location=storage.join(checkpoint.path, "engine"),
            remedy=f"remove {storage.parent(checkpoint.path)} to restart this training from its first step",
        )
        start = int(storage.read_json(os.path.join(directory, "progress.json"))["step"])
        # The folder may be temporary: it must exist until all ranks have read it.
        dist.barrier()
    return start


def _report(engine: Engine, step: int, values: dict[str, float], save_model: Callable[[str], None]) -> None:
    import ray.train
    from ray.train import Checkpoint, CheckpointConsistencyMode

    with tempfile.TemporaryDirectory() as directory:
        engine.save(os.path.join(directory, "engine"))
        save_model(os.path.join(directory, "model"))
        if ray.train.get_context().get_world_rank() == 0:
            storage.write_json(os.path.join(directory, "progress.json"), {"step": step, **engine.layout})
            # A report becomes durable after it has returned: once the previous one is committed, a crash costs at most
            # the steps since it.
            ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        ray.train.report(
            {"step": step, **values},
            checkpoint=Checkpoint.from_directory(directory),
            checkpoint_dir_name=f"step_{step:07d}",
        )


def worker_threads(workers: WorkersConfig) -> None:
    """Set the number of torch threads of this worker by its CPUs."""
    torch.set_num_threads(torch_threads(workers.cpus_per_worker))
