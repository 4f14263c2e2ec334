"""Pipelines that have no file of their own here: how they call their network is recorded."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..runs.choices import TRAINED_GUIDANCE
from .denoiser import Condition, ModelError, check_labels
from .hashing import hash_captions
from .latent import SCALES, TextPipeline
from .process import FlowMatching, Process
from .weights import quiet

NETWORKS = ("transformer", "unet")
_LIBRARIES = ("diffusers", "transformers")
# of several lengths, as a tokenizer counts them
_PROBES = ("a", "two dogs of another day")
# steps that are recorded: two decide how time is told, one tests it
_STEPS = 3
# where one would do, if a schedule with an end of its own had a noise level then
_FEW = 2
# latent tokens along one side of what is recorded
_TOKENS = 8
_PLAIN = (bool, int, float, str, type(None))
_CPU = torch.device("cpu")

# where an argument comes from: the captions, of one length or of theirs, which a mask says; those
# and more for the size of the picture; that size with a row for each sample, with an equal item for
# each, or with one for all
_READ, _LONG, _MASK = "read", "long", "mask"
_GROWN, _ROWS, _ITEMS, _SHARED = "grown", "rows", "items", "shared"
_OF_CAPTIONS = (_READ, _LONG, _MASK)
# numbers that float32 tells apart when they are scaled
_DIGITS = 4096


class _Stop(BaseException):
    """Ends a call of a pipeline whose rest is not needed; no ``except Exception`` takes it."""


class _Order(NamedTuple):
    """How latents of one size are given to the network.

    Attributes:
        shape: without the samples.
        places: ``[C h w]`` int64, where each number of the VAE's latents is.
    """

    shape: tuple[int, ...]
    places: Tensor


class _Called(NamedTuple):
    """How a pipeline calls its network.

    Attributes:
        sample: argument that noise is added to.
        time: argument that says the noise level.
        times: factor, divisor and summand of what it is told, of the process's own time.
        sign: of the network's output in the prediction.
        is_packed: whether latents are given in another shape than the VAE's, as tokens.
    """

    sample: str
    time: str
    times: tuple[float, float, float]
    sign: int
    is_packed: bool


class Recorded(TextPipeline):
    """Any other pipeline of captions or classes, by the arguments of its network in one step.

    A few steps of a small picture are recorded when it is loaded: which argument is the noisy
    sample, how time is told, which arguments the captions decide, which the size of the picture,
    and what becomes of the output; how its latents become what its VAE decodes: in which order, and
    by the VAE's scale, or by one that is read off where its configuration says none. What is not
    understood is refused by name. The network is called with these arguments then, of which the
    sample and the time are replaced.

    Args:
        pipeline: of Diffusers, with ``transformer`` or ``unet``, ``vae`` and ``scheduler``.
        process: of its training schedule.
        guidance: that a network with embedded guidance was trained with.

    Raises:
        ModelError: see above.
    """

    noised_by = "discrete, flow matching"
    adapters = "PEFT"
    parts: ClassVar[dict[str, str]] = {}

    def __init__(self, pipeline: Any, process: Process, guidance: float | None = None) -> None:
        self.network = network_of(pipeline)
        super().__init__(pipeline, process)
        self.name = type(pipeline).__name__
        self._takes = inspect.signature(pipeline.__call__).parameters
        self._asks = next((name for name in ("prompt", "class_labels") if name in self._takes), "")
        self.reads = "labels" if self._asks == "class_labels" else "captions"
        embeds = bool(self.module.config.get("guidance_embeds"))
        if guidance is not None and not embeds:
            raise ModelError(
                f"the trained guidance must go with a model that embeds it, got {guidance:g} for "
                f"a {self.name} without guidance_embeds"
            )
        self.guidance = (TRAINED_GUIDANCE if guidance is None else guidance) if embeds else None
        self.guidance_scale = self._default("guidance_scale")
        self.num_inference_steps = int(self._default("num_inference_steps") or 50)
        self._sizes: dict[tuple[int, int], dict[str, tuple[str, Any]]] = {}
        self._orders: dict[tuple[int, int], _Order] = {}
        # of the numbers of one patch ``[C, p, p]``, where no configuration says it
        self._scaling: tuple[Tensor, Tensor] | None = None

    @property
    def num_classes(self) -> int | None:
        """See `Denoiser`."""
        return self.module.config.get("num_embeds_ada_norm") if self.reads == "labels" else None

    @property
    def encoders(self) -> dict[str, Any]:
        """Every network of the pipeline but its denoiser and its VAE."""
        others = (self.network, "vae")
        return {
            name: part
            for name, part in self.pipeline.components.items()
            if isinstance(part, torch.nn.Module) and name not in others
        }

    @property
    def patch(self) -> int:
        """See `LatentPipeline`; latents of four times the channels are packed two by two."""
        config = self.module.config
        if int(config.get("in_channels") or 0) == 4 * self.latent_channels:
            return 2
        size = config.get("patch_size") or 1
        return int(size if isinstance(size, int) else size[-1])

    @property
    def size(self) -> int | tuple[int, int] | None:
        """See `Denoiser`."""
        side = self.module.config.get("sample_size")
        side = side or getattr(self.pipeline, "default_sample_size", None)
        if side is None or isinstance(side, int):
            return side and side * self.factor
        return int(side[0]) * self.factor, int(side[1]) * self.factor

    def identity(self) -> dict[str, str]:
        """See `LatentPipeline.identity`; with the way the network is called."""
        told = {} if self.guidance is None else {"guidance": f"{self.guidance:g}"}
        return super().identity() | told | {"called": json.dumps([self.name, *self._called])}

    @property
    def encoding(self) -> dict[str, Any]:
        """See `LatentPipeline.encoding`; with the size of what was read off."""
        read = {} if self._scaling is None else {"scaled": _sizes_of(self._scaling)}
        return super().encoding | read

    def scaling(self, shape: Sequence[int]) -> tuple[float | Tensor, float | Tensor]:
        """See `LatentPipeline.scaling`."""
        if self._scaling is None:
            return super().scaling(shape)
        shift, scale = (
            x.repeat(1, *(side // self.patch for side in shape[1:])) for x in self._scaling
        )
        return shift, scale

    def identify_items(self, items: Sequence[Any]) -> str:
        """Hash of captions and of the tokens of every tokenizer, or of labels."""
        texts, rows = [str(item) for item in items], [list[int]() for _ in items]
        parts = self.pipeline.components.values() if texts and self.reads == "captions" else ()
        with quiet("transformers.tokenization_utils_base"):
            for tokenizer in parts:
                if not hasattr(tokenizer, "convert_ids_to_tokens"):
                    continue
                for row, ids in zip(rows, tokenizer(texts).input_ids, strict=True):
                    row.extend(ids)
        return hash_captions(texts, rows)

    @property
    def tokenizers(self) -> list[tuple[Any, int]]:
        """None: how much of a caption is read is the pipeline's own affair."""
        return []

    def condition(self, items: Sequence[Any] | None, device: torch.device) -> Condition:
        """See `TextPipeline.condition`: every argument of the network that has a row a sample."""
        if self.reads == "labels":
            check_labels(items, self.num_classes or 2**31, _CPU)
        return super().condition(items, device)

    def _stacked(self, rows: Sequence[Condition]) -> Condition:
        """See `TextPipeline`; what is as long as a caption is filled up, and the mask says so."""
        return {
            name: pad_sequence([row[name] for row in rows], batch_first=True)
            if source in (_LONG, _MASK)
            else torch.stack([row[name] for row in rows])
            for name, (source, _) in self._sizes[self._own].items()
            if source in _OF_CAPTIONS
        }

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        """See `Denoiser.predict`."""
        rows, channels, *latent = noisy.shape
        height, width = (side * self.factor for side in latent)
        arguments: dict[str, Any] = {}
        for name, (source, value) in self._arguments((height, width)).items():
            if source in _OF_CAPTIONS:
                arguments[name] = condition[name]
            elif source == _GROWN:
                kept, more = value
                more = _like(more, condition[name]).expand(rows, *more.shape[1:])
                arguments[name] = torch.cat([condition[name][:, :kept], more], dim=1)
            elif source == _ROWS:
                arguments[name] = _like(value, noisy).expand(rows, *value.shape[1:])
            else:
                arguments[name] = [value] * rows if source == _ITEMS else _like(value, noisy)
        factor, divisor, summand = self._called.times
        time = self.process.time(timesteps, noisy.shape[1:])
        if (factor, divisor, summand) != (1, 1, 0):
            time = time.float() * factor / divisor + summand
        arguments[self._called.time] = time
        arguments[self._called.sample] = self._packed(noisy, (height, width))
        called = self.module if module is None else module
        output = called(**_nested(arguments), return_dict=False)[0]
        if not self._called.is_packed:
            output = output[:, :channels]
        return self._unpacked(output, (height, width)) * self._called.sign

    # what is recorded

    def _check_parts(self, base: Path | str) -> None:
        """Record how the network is called; raises as the class."""
        self.place = str(base)
        if not self._asks:
            self._refuse("it must be called with a prompt or with class_labels")
        takes, latents = int(self.module.config.get("in_channels") or 0), self.latent_channels
        if takes and takes not in (latents, 4 * latents):
            self._refuse(f"its network takes {takes} channels, its VAE makes {latents}")
        side = self.factor * self.patch * _TOKENS
        own = self.size or side
        self._own = own if isinstance(own, tuple) else (own, own)
        self._small = self._own
        if "height" in self._takes:
            # the network is run once
            self._small = min(side, self._own[0]), min(side, self._own[1])
        self._called = self._learn()
        if isinstance(self.process, FlowMatching):
            self.process.patch = self.patch
        self._sizes[self._own] = self._sort()

    def _refuse(self, why: str) -> NoReturn:
        raise ModelError(
            f"no file here serves a {self.name}, and what it does cannot be recorded ({self.place})"
            f": {why}. Wrap its network with dtrak.models.Denoiser.of to explain it from Python"
        )

    def _probes(self) -> list[Any]:
        return [0, 1] if self.reads == "labels" else list(_PROBES)

    def _learn(self) -> _Called:
        """Record steps of a small picture, with one pass through the network."""
        calls: list[dict[str, Any]] = []
        steps: list[tuple[Tensor, float, Tensor, Tensor]] = []
        results: list[Any] = []
        decoded: list[Tensor] = []
        forward, scheduler = self.module.forward, self._sampler()
        step = scheduler.step

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(self._bound(args, kwargs))
            if not results:
                results.append(forward(*args, **kwargs))
            return results[0]

        @functools.wraps(step)
        def take(prediction: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            result = step(prediction, timestep, sample, **options)
            after = result[0] if isinstance(result, tuple) else result.prev_sample
            steps.append((prediction, float(timestep), sample, after))
            return result

        def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            decoded.append(latents)
            raise _Stop

        scheduler.step = take
        self.vae.decode = decode
        try:
            self._run_with(call, self._probes(), self._small, _CPU, scheduler, _STEPS, "pt")
        finally:
            del self.vae.decode
        if not len(calls) == len(steps) == _STEPS:
            self._refuse(
                f"it calls its network {len(calls)} times in {_STEPS} steps of {len(steps)}"
            )
        output = results[0][0]
        return self._understand(calls, steps, output, decoded)

    def _understand(
        self,
        calls: list[dict[str, Any]],
        steps: list[tuple[Tensor, float, Tensor, Tensor]],
        output: Tensor,
        decoded: list[Tensor],
    ) -> _Called:
        prediction, _, sample, _ = steps[0]
        shape = len(sample), *self.input_shape((self.channels, *self._small))
        is_packed = tuple(sample.shape) != shape
        if math.prod(sample.shape) != math.prod(shape):
            self._refuse(f"its latents are {list(sample.shape)} where {list(shape)} are expected")
        names = [
            name
            for name, value in calls[0].items()
            if isinstance(value, Tensor) and _same(value, sample)
        ]
        lists = [name for name, value in calls[0].items() if _has_parts(value, len(sample))]
        if not names and lists:
            self._refuse(f"its network is given {lists[0]}, a list with a part for each sample")
        if len(names) != 1 or not _same(calls[1][names[0]], steps[1][2]):
            self._refuse("its network is not given the latents as they are")
        changing = [
            name
            for name, value in calls[0].items()
            if name != names[0] and not _equal(value, calls[1].get(name))
        ]
        if len(changing) != 1 or not isinstance(calls[0][changing[0]], Tensor):
            self._refuse(
                "one argument of its network must change with the time, got "
                f"{', '.join(changing) or 'none'}"
            )
        told = [torch.unique(call[changing[0]].double()) for call in calls]
        if any(len(values) != 1 for values in told):
            self._refuse(f"{changing[0]} has several values at one time")
        times = _times([t for _, t, _, _ in steps], [float(values) for values in told])
        if times is None:
            self._refuse(f"{changing[0]} does not rise evenly with the time")
        head = output if is_packed else output[:, : shape[1]]
        sign = next((s for s in (1, -1) if _same(head * s, prediction)), None)
        if sign is None:
            self._refuse("the output of its network is not what its scheduler is given")
        self._called = _Called(names[0], changing[0], times, sign, is_packed)
        frames = 1 if decoded and decoded[0].ndim == 5 else 0
        self.of_videos = bool(frames)
        if not decoded or decoded[0].shape != (*shape[:2], *(1,) * frames, *shape[2:]):
            self._refuse("what its VAE decodes is not its latents")
        is_said = any(self.vae.config.get(name) for name in SCALES)
        if is_packed or not is_said:
            order, shift, factor = self._follow(self._small, output.shape[1:])
            if is_packed:
                self._orders[self._small] = order
            if not is_said:
                self._scaling = self._of_patch(shift), 1 / self._of_patch(factor)
        off, scale = self.scaling(shape[1:])
        last = self._unpacked(steps[-1][3], self._small) / scale + off
        if not _near(decoded[0].reshape(shape), last):
            self._refuse("what its VAE decodes is not its latents by their scale and shift")
        return self._called

    def _follow(
        self, size: tuple[int, int], returned: Sequence[int] = ()
    ) -> tuple[_Order, Tensor, Tensor]:
        """Where latents of a size are when they are decoded, by numbers that are told apart.

        Args:
            size: of the pictures.
            returned: shape of what the network returns, that of its sample where it is empty.

        Returns:
            How they are given to the network; and what each of them has to be multiplied with and
            what has to be added then, ``[C, h, w]``, for what is decoded.
        """
        shape = self.input_shape((self.channels, *size))
        index = torch.arange(math.prod(shape))
        numbers = torch.stack([index * 0, index * 0 + 1, index % _DIGITS, index // _DIGITS])
        scheduler, packed, decoded = self._sampler(), [], []
        step = scheduler.step

        def call(*args: Any, **kwargs: Any) -> Any:
            sample = self._bound(args, kwargs)[self._called.sample]
            return (sample.new_zeros(len(sample), *(returned or sample.shape[1:])),)

        @functools.wraps(step)
        def take(prediction: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            result = step(prediction, timestep, sample, **options)
            packed.append(tuple(sample.shape[1:]))
            after = numbers.view(sample.shape).to(sample)
            if isinstance(result, tuple):
                return (after, *result[1:])
            result.prev_sample = after
            return result

        def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            decoded.append(latents.double().reshape(len(numbers), -1))
            raise _Stop

        scheduler.step = take
        self.vae.decode = decode
        try:
            probes = self._probes()[:1] * len(numbers)
            self._run_with(call, probes, size, _CPU, scheduler, _FEW, "pt")
        finally:
            del self.vae.decode
        if not decoded or decoded[0].shape != numbers.shape:
            self._refuse("what its VAE decodes is not its latents")
        shift, factor = decoded[0][0], decoded[0][1] - decoded[0][0]
        low, high = ((decoded[0][2:] - shift) / factor).round()
        places = low + high * _DIGITS
        if not torch.equal(places.sort().values, index.double()):
            self._refuse("what its VAE decodes is not its latents, each by a scale and a shift")
        return _Order(packed[0], places.long()), shift.view(shape), factor.view(shape)

    def _of_patch(self, values: Tensor) -> Tensor:
        """Values ``[C, h, w]`` of latents that are those of one patch, ``[C, p, p]`` float32."""
        side = self.patch
        blocks = values.unfold(1, side, side).unfold(2, side, side).flatten(1, 2)
        if not _near(blocks, blocks[:, :1].expand_as(blocks)):
            self._refuse("the latents that its VAE decodes are scaled by their place")
        return blocks[:, 0].float()

    def _sort(self) -> dict[str, tuple[str, Any]]:
        """Where each argument of the network comes from, of two captions and of one."""
        two, one = (self._record(self._probes()[:n], self._own, _CPU) for n in (2, 1))
        ends = next((n for n, v in two.items() if _shows_end(v, one.get(n))), "")
        found: dict[str, tuple[str, Any]] = {}
        for name, value in two.items():
            if name in (self._called.sample, self._called.time):
                continue
            known = name == ends
            found[name] = (
                (_MASK, value) if known else self._source(name, value, one.get(name), two.get(ends))
            )
        if ends:
            self._check_end(found, ends)
        return found

    @torch.no_grad()
    def _check_end(self, found: Mapping[str, tuple[str, Any]], ends: str) -> None:
        """Refuse a network to which it matters what a caption is filled up with."""
        alone = self._record(self._probes()[:1], self._small, _CPU)
        longer = dict(alone)
        for name, (source, value) in found.items():
            if source == _LONG:
                filled = value.new_zeros(1, *value.shape[1:])
                filled[:, : alone[name].shape[1]] = alone[name]
                longer[name] = filled
            elif source == _MASK:
                longer[name] = value[:1]
        first, second = (
            self.module(**_nested(arguments), return_dict=False)[0] for arguments in (alone, longer)
        )
        if not _near(second, first):
            self._refuse(f"its {ends} does not hide what follows a caption")

    def _source(self, name: str, two: Any, one: Any, mask: Any) -> tuple[str, Any]:
        if isinstance(two, Tensor) and isinstance(one, Tensor):
            if two.ndim and two.shape[0] == 2 and one.shape[0] == 1:
                if two.shape[1:] == one.shape[1:]:
                    return _READ, two
                ends = None if mask is None else _ends(mask)
                if ends != [one.shape[1], two.shape[1]] or two.shape[2:] != one.shape[2:]:
                    self._refuse(
                        f"its {name} is as long as the longest caption, and no mask says where "
                        "each ends"
                    )
                return _LONG, two
            if _equal(one, two):
                return _SHARED, two
        elif isinstance(two, _PLAIN) and one == two:
            return _SHARED, two
        elif isinstance(two, list | tuple):
            if _equal(one, two):
                return _SHARED, two
            is_plain = not any(isinstance(part, Tensor) for part in two)
            if is_plain and len(two) == 2 and len(one or ()) == 1 and two[0] == two[1] == one[0]:
                return _ITEMS, two[0]
        kind = type(two).__name__
        self._refuse(f"its network is given {name}, a {kind} of which each sample has a part")

    def _arguments(self, size: tuple[int, int]) -> dict[str, tuple[str, Any]]:
        """The arguments for pictures of a size; what captions decide must not depend on it."""
        if size not in self._sizes:
            if "height" not in self._takes:
                self._refuse(f"its pictures are {self._own[1]}x{self._own[0]}, got {size}")
            # the text encoders stay where they are: two short captions
            for encoder in self.encoders.values():
                encoder.to(_CPU)
            # both now: the network may be kept in another dtype meanwhile
            here, there = (self._record(self._probes(), s, _CPU) for s in (self._own, size))
            self._sizes[size] = {
                name: self._resized(name, (source, here.get(name)), there.get(name))
                for name, (source, _) in self._sizes[self._own].items()
            }
        return self._sizes[size]

    def _resized(self, name: str, known: tuple[str, Any], value: Any) -> tuple[str, Any]:
        source, before = known
        if source == _ITEMS:
            return source, value[0]
        if source == _SHARED or _equal(before, value):
            return source, value
        if isinstance(value, Tensor) and torch.equal(value[:1], value[1:2]):
            return _ROWS, value[:1]
        grown = isinstance(value, Tensor) and _grown(before, value)
        if not grown:
            self._refuse(f"its {name} depends on the caption and on the size of the picture")
        return _GROWN, grown

    def _encode(self, captions: list[Any], device: torch.device) -> Condition:
        """What the network is given for captions or labels, a row each."""
        found = self._record(captions, self._own, device)
        known = {n: v for n, v in self._sizes[self._own].items() if v[0] in _OF_CAPTIONS}
        rows: dict[str, Any] = {}
        for name, (source, value) in known.items():
            got = found.get(name)
            if source == _READ:
                if not isinstance(got, Tensor) or got.shape[1:] != value.shape[1:]:
                    shape = list(got.shape[1:]) if isinstance(got, Tensor) else got
                    self._refuse(
                        f"its {name} must be {list(value.shape[1:])} for every caption, got {shape}"
                    )
                rows[name] = got
            elif source == _MASK:
                long = [n for n, (source, _) in known.items() if source == _LONG]
                if got is None:
                    # all captions are of one length
                    got = value.new_ones(found[long[0]].shape[:2])
                ends = _ends(got)
                if ends is None:
                    self._refuse(f"its {name} hides more than what follows a caption")
                for part in (name, *long):
                    tensor = got if part == name else found[part]
                    rows[part] = [row[:end] for row, end in zip(tensor, ends, strict=True)]
        return rows

    def _record(
        self, items: Sequence[Any], size: tuple[int, int], device: torch.device
    ) -> dict[str, Any]:
        """The arguments that the network is called with first; it is not run."""
        seen: dict[str, Any] = {}

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.update(self._bound(args, kwargs))
            raise _Stop

        self._run_with(call, items, size, device, self._sampler(), _FEW, "latent")
        return seen

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the network by name, those in a dict by ``argument.key``."""
        signature = inspect.signature(type(self.module).forward)
        bound = dict(signature.bind(self.module, *args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        flat = {}
        for name, value in list(bound.items())[1:]:
            if name == "return_dict":
                continue
            if not isinstance(value, dict):
                flat[name] = value
                continue
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        return {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in flat.items()}

    @torch.no_grad()
    def _run_with(
        self,
        forward: Callable[..., Any],
        items: Sequence[Any],
        size: tuple[int, int],
        device: torch.device,
        scheduler: Any,
        steps: int,
        output: str,
    ) -> None:
        """Call the pipeline, with another forward in the place of its network's.

        Raises:
            ModelError: it fails.
        """
        options = self._options_of(items, size) | {
            "num_inference_steps": steps,
            "guidance_scale": 1.0 if self.guidance is None else self.guidance,
            "output_type": output,
        }
        pipeline = self.pipeline
        setattr(pipeline, self.network, self.module)
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(disable=True)
        self.module.forward = forward
        try:
            with (
                _on(pipeline, device),
                quiet(*self._talkers()),
                # the network alone is kept in 16 bits
                torch.autocast(device.type, enabled=False),
            ):
                pipeline(**{name: v for name, v in options.items() if name in self._takes})
        except _Stop:
            return
        # whatever a pipeline raises that wants something else than a prompt
        except ModelError:
            raise
        except Exception as error:
            self._refuse(f"it fails with {self._asks} alone ({' '.join(str(error).split())})")
        finally:
            del self.module.forward

    def _options_of(self, items: Sequence[Any], size: tuple[int, int]) -> dict[str, Any]:
        return {
            self._asks: list(items),
            "height": size[0],
            "width": size[1],
            "generator": [torch.Generator().manual_seed(0) for _ in items],
            "true_cfg_scale": 1.0,
            "eta": 0.0,
            # pictures are of the size that is asked for
            "use_resolution_binning": False,
        }

    def _order(self, size: tuple[int, int]) -> _Order:
        if size not in self._orders:
            self._orders[size] = self._follow(size)[0]
        return self._orders[size]

    def _packed(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        if not self._called.is_packed:
            return latents
        order = self._order(size)
        where = order.places.argsort().to(latents.device)
        return latents.flatten(1)[:, where].unflatten(1, order.shape)

    def _unpacked(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        if not self._called.is_packed:
            return latents
        shape, places = self.input_shape((self.channels, *size)), self._order(size).places
        return latents.flatten(1)[:, places.to(latents.device)].unflatten(1, shape)

    # drawing

    def _sampler(self) -> Any:
        is_flow = isinstance(self.process, FlowMatching)
        # latents go beyond 1
        return self.process.sampler(**({} if is_flow else {"clip_sample": False}))

    def drawing_timesteps(self, num_inference_steps: int) -> list[int]:
        """See `Denoiser.drawing_timesteps`: those that the pipeline sets."""
        scheduler, size = self._sampler(), self._drawn_size(None)

        def call(*args: Any, **kwargs: Any) -> Any:
            raise _Stop

        self._run_with(
            call, self._probes()[:1], size, self.device, scheduler, num_inference_steps, "latent"
        )
        if isinstance(self.process, FlowMatching):
            shape = self.input_shape((self.channels, *size))
            return self.process.nearest(scheduler.timesteps, shape)
        timesteps: list[int] = scheduler.timesteps.tolist()
        return timesteps

    def _run(
        self,
        pipeline: Any,
        items: Sequence[Any],
        size: tuple[int, int],
        generators: list[torch.Generator],
        options: dict[str, Any],
    ) -> Tensor:
        chosen = self._options_of(items, size) | options
        chosen |= {"generator": generators, "output_type": "pt"}
        with _on(pipeline, self.device):
            drawn: Tensor = pipeline(
                **{name: value for name, value in chosen.items() if name in self._takes}
            ).images
        return drawn

    def _drawing_pipeline(self, seen: Callable[[Tensor], None], size: tuple[int, int]) -> Any:
        if self._called.is_packed:
            # by the pipeline, which is not asked while it draws
            self._order(size)
        return super()._drawing_pipeline(seen, size)

    def _drawn_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        found = super()._drawn_size(size)
        if "height" not in self._takes and found != self._own:
            raise ValueError(f"size must be that of the model, got {size}")
        return found

    def _default(self, name: str) -> Any:
        """Of an argument of the pipeline."""
        found = self._takes[name].default if name in self._takes else None
        return None if found is inspect.Parameter.empty else found

    # loading

    @classmethod
    def _described(cls, index: Mapping[str, Any]) -> tuple[dict[str, str], str]:
        parts = {
            name: str(value[1])
            for name, value in index.items()
            if isinstance(value, list)
            and value[0] in _LIBRARIES
            and name != "scheduler"
            # a name of older versions is Diffusers' affair
            and hasattr(import_module(value[0]), str(value[1]))
        }
        network = next((name for name in NETWORKS if name in parts), None)
        if network is None or "vae" not in parts:
            raise ModelError(
                f"a {index.get('_class_name')} must have a {' or a '.join(NETWORKS)} and a vae to "
                f"be explained, got {', '.join(parts) or 'neither'}: no file here serves it"
            )
        return parts, network

    @classmethod
    def _network_of(cls, pipeline: Any) -> str:
        return network_of(pipeline)

    @classmethod
    def _options(cls, trained: dict[str, Any]) -> dict[str, Any]:
        return {"guidance": trained.get("guidance")}

    @classmethod
    def _check_process(cls, process: Process, name: str) -> Process:
        return process


def network_of(pipeline: Any) -> str:
    """The name of a pipeline's denoiser; empty where it has none."""
    return next((name for name in NETWORKS if getattr(pipeline, name, None) is not None), "")


@contextmanager
def _on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Let a pipeline work on a device, whichever of its parts are elsewhere."""
    kind, name = type(pipeline), "_execution_device"
    own = vars(kind).get(name)
    setattr(kind, name, property(lambda _: device))
    try:
        yield
    finally:
        if own is None:
            delattr(kind, name)
        else:
            setattr(kind, name, own)


def _ends(mask: Tensor) -> list[int] | None:
    """Where the ones of each row end; None if zeros are among them, or other numbers."""
    ends = mask.sum(1).long()
    first = torch.arange(mask.shape[1], device=mask.device) < ends[:, None]
    found: list[int] = ends.tolist()
    return found if torch.equal(first.to(mask.dtype), mask) else None


def _shows_end(two: Any, one: Any) -> bool:
    """Whether a mask of two captions shows that the first is shorter than the second."""
    if not isinstance(two, Tensor) or two.ndim != 2 or len(two) != 2:
        return False
    ends = _ends(two)
    if ends is None or not 0 < ends[0] < ends[1] == two.shape[1]:
        return False
    return one is None or (isinstance(one, Tensor) and _equal(one, two[:1, : ends[0]]))


def _sizes_of(scaling: Sequence[Tensor]) -> list[str]:
    """Roughly, so that rounding does not tell."""
    return [f"{float(values.double().norm()):.4g}" for values in scaling]


def _grown(before: Tensor, value: Tensor) -> tuple[int, Tensor] | None:
    """How many places of ``before [2, L, ...]`` are kept, and what one row has more; or None."""
    if value.ndim < 2 or value.shape[2:] != before.shape[2:]:
        return None
    kept = min(before.shape[1], value.shape[1])
    left, more = before[:, kept:], value[:, kept:]
    is_shared = torch.equal(left[0], left[1]) and torch.equal(more[0], more[1])
    return (kept, more[:1]) if is_shared and _equal(before[:, :kept], value[:, :kept]) else None


def _times(at: Sequence[float], told: Sequence[float]) -> tuple[float, float, float] | None:
    """Factor, divisor and summand of what is told of time, through all points; None for none."""
    slope = (told[1] - told[0]) / (at[1] - at[0])
    if not slope:
        return None
    factor, divisor = slope, 1.0
    # told in float32: whole numbers and their inverses are meant
    for number in (slope, 1 / slope):
        if abs(number - round(number)) < 1e-4 * abs(number):
            factor, divisor = (round(slope), 1.0) if number == slope else (1.0, round(number))
            break
    summand = told[0] - at[0] * factor / divisor
    if abs(summand - round(summand)) < 1e-4:
        summand = round(summand)
    errors = [
        abs(t * factor / divisor + summand - value) for t, value in zip(at, told, strict=True)
    ]
    is_even = max(errors) <= 1e-4 * max(abs(value) for value in told)
    return (float(factor), float(divisor), float(summand)) if is_even else None


def _like(value: Any, other: Tensor) -> Any:
    """A tensor where another one is, floating ones in its dtype; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_like(part, other) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(other.device, other.dtype if value.is_floating_point() else None)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of ``argument.key`` in a dict."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        argument, _, key = name.partition(".")
        if key:
            found.setdefault(argument, {})[key] = value
        else:
            found[name] = value
    return found


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one.float(), two.float())


def _has_parts(value: Any, count: int) -> bool:
    """Whether it is a list with a tensor, or several, for each of ``count`` samples."""
    is_list = isinstance(value, list | tuple) and len(value) >= count
    return is_list and all(isinstance(part, Tensor) for part in value)


def _near(one: Tensor, two: Tensor) -> bool:
    error = float((one.double() - two.double()).norm())
    return error <= 1e-3 * float(two.double().norm())


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_equal, one, two))
    return not isinstance(one, Tensor) and not isinstance(two, Tensor) and bool(one == two)
