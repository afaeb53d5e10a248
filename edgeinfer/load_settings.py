"""How a model is to be loaded: what a caller gave, checked, and what it left to the environment.

Knows nothing of files or of loading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edgeinfer import config, platform
from edgeinfer.backend import find_device
from edgeinfer.batch import Numerics
from edgeinfer.device import Device
from edgeinfer.errors import DeviceError, InvalidRequestError, Keyword
from edgeinfer.graph import KVType, Segment
from edgeinfer.model import Model
from edgeinfer.options import LoadOptions, Progress
from edgeinfer.parameters import LOAD, POOLINGS, checked, parse_memory


class LoadSettings(NamedTuple):
    """The load options, resolved: whoever loads a model reads these alone."""

    device: Device
    device_note: str  # why it is not the one that people would expect, "" if it is
    further: tuple[Device, ...]  # that share its layers, in this order
    further_if_needed: bool  # where one alone does not hold the model
    may_leave_gpu: bool  # nobody asked for it
    gpu_layers: int | None  # the last ones; -1: all; None: as many as fit
    numerics: Numerics
    n_threads: int
    memory: int | str | None  # as it was given
    n_ctx: int | None  # None: the usual length, or what fits
    kv_types: tuple[KVType, KVType] | None  # of K and V; None: f16, or what fits
    slots: int
    kept_tokens: int | None  # None: as the plan chooses
    chat_template: str | None
    pre: str | None
    may_download: bool
    progress: Callable[[Progress], None] | None
    residuals: tuple[int, ...] = ()  # layers whose entering stream may be watched
    drafts: bool = False  # whether the block that guesses tokens is wanted
    naive: bool = False  # one answer at a time, nothing reused
    pooling: str = ""  # of embeddings; "": as the file says

    @classmethod
    def resolve(cls, function: str, given: LoadOptions) -> LoadSettings:
        """For the public `function`; the error names the option that can't be, and why."""
        options = checked(function, given, LOAD)
        is_naive = options.get("naive", False)
        asked = options.get("device", "auto")
        device, note, further, if_needed = find_device(asked)
        gpu_layers = options.get("gpu_layers", "auto")
        if gpu_layers not in (0, "auto") and not device.has_number:
            raise DeviceError(
                f"gpu_layers is {gpu_layers}, and the device is {device}",
                advice=("leave it out, or choose another ", Keyword("device")),
            )
        numerics = options.get("numerics", "exact")
        if numerics == "fast" and (gpu_layers == 0 or not device.has_number):
            raise DeviceError(
                f"numerics is 'fast', which GPUs have, and the device is "
                f"{'cpu' if gpu_layers == 0 else device}",
                advice=("leave it out, or choose another ", Keyword("device")),
            )
        if gpu_layers == 0:
            device, note = Device("cpu") if device.has_number else device, ""
            further = ()
        return cls(
            device=device,
            device_note=note,
            further=further,
            further_if_needed=if_needed,
            may_leave_gpu=asked == gpu_layers == "auto"
            and numerics == "exact"
            and device.has_number,
            gpu_layers=None if gpu_layers == "auto" else gpu_layers,
            numerics=numerics,
            n_threads=options.get("threads") or _usual_threads(),
            memory=options.get("memory"),
            n_ctx=options.get("n_ctx"),
            kv_types=options.get("kv_type"),
            slots=options.get("slots", 1),
            kept_tokens=options.get("kept_tokens", 0 if is_naive else None),
            chat_template=options.get("chat_template"),
            pre=options.get("pre"),
            may_download=options.get("download", False),
            progress=options.get("progress"),
            residuals=options.get("residuals", ()),
            drafts=options.get("drafts", False),
            naive=is_naive,
            pooling=options.get("pooling", ""),
        )

    def segment(self, model: Model, n_ctx: int | None, kv_types: tuple[KVType, KVType]) -> Segment:
        """The whole model, as it is to be loaded; InvalidRequestError for what it has not."""
        n_layers = model.hparams.n_layers
        if self.residuals and self.residuals[-1] > n_layers:
            raise InvalidRequestError(
                f"residuals names layer {self.residuals[-1]}; the model has 0 to {n_layers - 1}, "
                f"and {n_layers} is what enters the head",
                param="residuals",
            )
        embedded = (n_layers,) if self.pooling_of(model) else ()
        segment = model.graph.segment(
            n_ctx=n_ctx,
            kv_types=kv_types,
            residuals=(*self.residuals, *embedded),
            drafts=self.drafts,
        )
        if self.drafts and segment.draft is None:
            raise InvalidRequestError(
                "drafts is on, and the model holds none; a block that guesses tokens is in some "
                "files of qwen35",
                param="drafts",
            )
        return segment

    def pooling_of(self, model: Model) -> str:
        """How embeddings are pooled, "" where neither the caller nor the file says so."""
        return self.pooling or (model.pooling if model.pooling in POOLINGS else "")

    def on_cpu(self, note: str) -> LoadSettings:
        """The same on the processors, with a line that says why."""
        return self._replace(
            device=Device("cpu"), device_note=note, further=(), may_leave_gpu=False
        )

    def allowed_memory(self, usual: int) -> int:
        """Bytes of the host's that the user allows, `usual` where nothing was said."""
        if self.memory is None:
            return usual
        return parse_memory(self.memory, platform.available_memory())


def _usual_threads() -> int:
    asked = config.threads()
    return platform.default_threads() if asked is None else int(LOAD["threads"].check(asked))
