"""TRL's GRPOTrainer on our checkpoint, prompts and images, run one step at a time and timed by part."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, Queue
from typing import Any

import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback

from afmrl_ray.models.item_processor import chat_frame, load_processors
from afmrl_ray.models.sentence_transformers_export import CHAT_TEMPLATE

_PARTS = {"_generate": "generate", "_calculate_rewards": "reward", "_get_per_token_logps_and_entropies": "logprobs"}


def prompt_processor(checkpoint: str, size: dict[str, int]) -> Any:
    """A processor that gives TRL our tokens and pixels, without torchvision, which Qwen's own processor requires."""
    from transformers import PaddleOCRVLProcessor

    tokenizer, image_processor = load_processors(checkpoint, image_token="<|image_pad|>", padding_side="left")
    before, after = (repr(part) for part in chat_frame(tokenizer))
    tokenizer.chat_template = CHAT_TEMPLATE.replace("PREFIX", before).replace("SUFFIX", after)
    image_processor.size = size
    return PaddleOCRVLProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)


class TRL:
    """A GRPOTrainer that waits before each step until `step` is called.

    Args:
        checkpoint: initial policy and reference.
        processor: processor or tokenizer.
        items: images (or None) and texts of the prompts, in order.
        prompts: prompts per step.
        group_size: completions per prompt.
        new_tokens: tokens per completion.
        kl_coef: KL coefficient; 0 = without a reference.
        reward: function of a completion's token IDs.
        settings: further settings of `GRPOConfig`.
    """

    def __init__(
        self,
        checkpoint: str,
        processor: Any,
        items: Sequence[tuple[Image.Image | None, str]],
        *,
        prompts: int,
        group_size: int,
        new_tokens: int,
        kl_coef: float,
        reward: Any,
        **settings: Any,
    ) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        rows = [
            {
                "prompt": [{"role": "user", "content": [*([{"type": "image"}] if image else []), _text(text)]}],
                **({"image": image} if image else {}),
            }
            for image, text in items
        ]
        config = GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="afmrl-bench-"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            use_vllm=False,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            max_steps=10_000,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            per_device_train_batch_size=prompts * group_size,
            gradient_accumulation_steps=1,
            num_generations=group_size,
            num_iterations=1,
            max_completion_length=new_tokens,
            shuffle_dataset=False,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=kl_coef,
            epsilon=0.2,
            loss_type="dapo",
            use_bias_correction_kl=False,
            disable_dropout=True,
            **{"scale_rewards": "group", **settings},
        )
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._seconds: dict[str, float] = {}
        self._asked: Queue[bool] = Queue()
        self._done: Queue[dict[str, float]] = Queue()
        self.first: dict[str, Any] = {}
        self.trainer = GRPOTrainer(
            model=model,
            processing_class=processor,
            reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
            args=config,
            train_dataset=Dataset.from_list(rows),
            callbacks=[_Gate(self)],
        )
        for method, part in _PARTS.items():
            self._time(method, part)
        self._keep_first_step()
        self._running = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(2,)).submit(
            self.trainer.train
        )

    def step(self) -> dict[str, float]:
        """Seconds of the next step and of its parts; `update` is the step without generation and rewards."""
        self._asked.put(True)
        while not self._running.done():
            try:
                found = self._done.get(timeout=1)
            except Empty:
                continue
            return {**found, "update": found["step"] - found["prepare"] + found["reference"]}
        self._running.result()
        raise AssertionError("the training has ended")

    def close(self) -> None:
        """End the training, which waits before a step."""
        self._asked.put(False)

    def _time(self, method: str, part: str) -> None:
        original = getattr(self.trainer, method)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = original(*args, **options)
            name = part if part != "logprobs" else "logprobs" if torch.is_grad_enabled() else "reference"
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            return found

        setattr(self.trainer, method, timed)

    def _keep_first_step(self) -> None:
        """Store the first step's inputs, weights and gradients in `first`."""
        prepare, training_step = self.trainer._prepare_inputs, self.trainer.training_step

        def prepared(batch: Any) -> Any:
            began = time.perf_counter()
            inputs = prepare(batch)
            self._seconds["prepare"] = time.perf_counter() - began
            self.first.setdefault("inputs", inputs)
            return inputs

        def stepped(model: Any, *args: Any) -> Any:
            if "weights" not in self.first:
                self.first["weights"] = {name: value.clone() for name, value in model.state_dict().items()}
            loss = training_step(model, *args)
            if "gradients" not in self.first:
                self.first["gradients"] = {
                    name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
                }
            return loss

        self.trainer._prepare_inputs, self.trainer.training_step = prepared, stepped


class StopTrainingError(Exception):
    """Ends a waiting training."""


class _Gate(TrainerCallback):
    """Makes the training wait before each step, and times the step."""

    def __init__(self, side: TRL) -> None:
        self._side = side

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self._side._asked.get():
            raise StopTrainingError
        self._side._seconds.clear()
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = {"reference": 0.0, **self._side._seconds, "step": time.perf_counter() - self._began}
        self._side._done.put(seconds)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
