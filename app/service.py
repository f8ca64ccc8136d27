"""One model, many users: runs go one after the other through one thread, can be stopped, and end by themselves.

A run is a function that works in the model's thread and hands results to whoever iterates over :meth:`Service.stream`. The
thread is what keeps users apart: a run sees a pipeline that nobody else uses, so its pictures are those of a run alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from arsd.errors import ArsdError, InputError

T = TypeVar("T")
log = logging.getLogger("arsd.app")

STOPPED, TIMED_OUT = "stopped", "time limit"
NO_MEMORY = "not enough memory for this: lower the window, the number of pictures or the frames"


@dataclass(frozen=True)
class Limits:
    """What one user may ask of a shared machine.

    Args:
        seconds: of one run, waiting excluded; it is then stopped and shows what it has.
        waiting: runs in the queue; further ones are refused.
        upload: bytes of an uploaded file.
        pictures: of one gallery.
        prompt: characters of a prompt or question.
        new_tokens: of one description.
        frames: of a clip that are shown to a model.
        clip_frames: of an animated picture that is uploaded.
        pixels: of an uploaded picture.
        clip_pixels: of a frame of an uploaded clip (1920 x 1080 and a little more).
        pass_tokens: of a strategy: window, guesses, columns of a tree, tokens of a pass.
    """

    seconds: float = 120.0
    waiting: int = 16
    upload: int = 64 * 2**20
    pictures: int = 16
    prompt: int = 1000
    new_tokens: int = 512
    frames: int = 128
    clip_frames: int = 2000
    pixels: int = 2**24
    clip_pixels: int = 2**21
    pass_tokens: int = 512

    @property
    def waiting_seconds(self) -> float:
        """After which the last one in a full queue has been served."""
        return (self.waiting + 1) * self.seconds


class Run:
    """One run: whether it is to go on. The model's thread asks between passes; any thread may stop it.

    Args:
        seconds: after which it is stopped, from :meth:`begin` on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._deadline, self._stop = seconds, float("inf"), threading.Event()
        self.ended = threading.Event()
        self.reason = ""  # STOPPED or TIMED_OUT once it was cut short

    def begin(self) -> None:
        """The clock runs."""
        self._deadline = time.monotonic() + self._seconds

    def stop(self) -> None:
        """Have it end after the present pass, or not begin."""
        self._stop.set()

    def over(self) -> bool:
        """Whether it is to end now; ``reason`` says why."""
        if not self.reason and self._stop.is_set():
            self.reason = STOPPED
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = TIMED_OUT
        return bool(self.reason)


class RunFailed(ArsdError):
    """A run broke for a reason that is not the user's; the text is for the user, the log has the rest."""


class Service:
    """The models of an app and the thread that they work in.

    Args:
        pipe: the image pipeline, or ``None``.
        video_llm: the Video-LLM, or ``None``.
        model: what the image pipeline is called in commands that make the same picture again.
        video_model: likewise of the Video-LLM.
        limits: of users.
        reload: loads the image pipeline once more, in another dtype; what it gave is remembered.
        parts: what else the image pipeline was loaded from, as arguments of ``AutoARPipeline.from_pretrained``.
        plugins: modules that registered drafters or rules.
    """

    def __init__(
        self,
        pipe: Any = None,
        video_llm: Any = None,
        model: str = "emoji-128",
        video_model: str = "emoji-video-chat",
        limits: Limits | None = None,
        reload: Callable[[torch.dtype], Any] | None = None,
        parts: Mapping[str, Any] | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        self.pipe, self.video_llm, self.model, self.video_model = pipe, video_llm, model, video_model
        self.limits, self.parts, self.plugins = limits or Limits(), dict(parts or {}), list(plugins)
        self.reload = None if reload is None else lru_cache(maxsize=2)(reload)
        threads = torch.get_num_threads()
        self._worker = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(threads,))
        self._runs: dict[str, list[Run]] = {}
        self._guard = threading.Lock()

    def new_run(self, owner: str = "") -> Run:
        """A run that :meth:`stop` of its owner finds."""
        run = Run(self.limits.seconds)
        with self._guard:
            working = {name: [one for one in runs if not one.ended.is_set()] for name, runs in self._runs.items()}
            self._runs = {name: runs for name, runs in working.items() if runs}
            self._runs.setdefault(owner, []).append(run)
        return run

    def stop(self, owner: str, wait: float = 0.0) -> int:
        """Stop the runs of an owner; wait so many seconds for those that work to end. Returns how many there were."""
        with self._guard:
            runs = [run for run in self._runs.pop(owner, ()) if not run.ended.is_set()]
        for run in runs:
            run.stop()
        until = time.monotonic() + wait
        for run in runs:
            run.ended.wait(max(0.0, until - time.monotonic()))
        return len(runs)

    def stream(self, run: Run, work: Callable[[Callable[[T], None]], object]) -> Iterator[T]:
        """What ``work(hear)`` hands to ``hear``, as it comes. Closing the iterator stops the run.

        Raises:
            ArsdError: what the work raised, where that is the user's mistake.
            RunFailed: for anything else.
        """
        heard: SimpleQueue[tuple[str, Any]] = SimpleQueue()

        def body() -> None:
            try:
                run.begin()
                if not run.over():
                    work(lambda item: heard.put(("item", item)))
                heard.put(("end", None))
            except BaseException as error:  # raised again where it can be shown
                heard.put(("error", error))

        future = self._worker.submit(body)
        future.add_done_callback(lambda done: heard.put(("end", None)) if done.cancelled() else None)  # see close()
        try:
            while True:
                kind, item = heard.get()
                if kind == "error":
                    raise told(item) from None
                if kind == "end":
                    return
                yield item
        finally:
            run.stop()  # of a run that has ended it means nothing
            run.ended.set()  # whoever listened has seen the end

    def call(self, run: Run, work: Callable[[], T]) -> T:
        """The result of ``work`` in the model's thread; raises as :meth:`stream`."""

        def once(hear: Callable[[T], None]) -> None:
            hear(work())

        for result in self.stream(run, once):
            return result
        raise InputError("it was stopped before it began")

    def close(self) -> None:
        """Stop what runs, and end the thread."""
        with self._guard:
            owners = list(self._runs)
        for owner in owners:
            self.stop(owner)
        self._worker.shutdown(wait=True, cancel_futures=True)


def told(error: BaseException) -> ArsdError:
    """An error as a user is to hear of it, in one line."""
    if isinstance(error, ArsdError):
        return error
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        log.error("a run failed: %s", error)
        return RunFailed(NO_MEMORY)
    log.error("a run failed", exc_info=error)
    return RunFailed(
        f"the run failed ({type(error).__name__}); the server's log says more, and the next run is not affected"
    )
